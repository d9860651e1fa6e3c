"""A LoRA SFT step in PyTorch, as transformers and PEFT do it best: the peer of ``warmup``.

    python benchmarks/torch_lora_step.py --config configs/models/llama2_7b --rows 16 --length 1024

Random weights, bfloat16 base, float32 adapters under autocast, flash attention (SDPA), fused AdamW;
with and without ``torch.compile`` and gradient checkpointing. Prints the median seconds of a step,
tokens a second and the peak memory of each setting; one that does not fit says so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: str, layers: int | None, checkpointing: bool) -> Any:
    """The model with its adapter, on the GPU."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if layers:
        config.num_hidden_layers = layers
    config.use_cache = False
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=_TARGETS, task_type="CAUSAL_LM")
    found = get_peft_model(model, lora)
    found.train()
    return found


def measure(arguments: argparse.Namespace, compiled: bool, checkpointing: bool) -> str:
    """A line for one setting."""
    model = build(arguments.config, arguments.layers, checkpointing)
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in learnt)
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, weight_decay=0.0, fused=True)
    step_model = torch.compile(model) if compiled else model
    size = (arguments.rows, arguments.length)
    ids = torch.randint(0, model.config.vocab_size, size, device="cuda")
    labels = ids.clone()
    labels[:, : arguments.length // 2] = -100

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step_model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return (
        f"{seconds:8.3f} s {arguments.rows * arguments.length / seconds:9.0f} tokens/s, "
        f"peak {peak:.1f} GiB"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="folder with a Llama's config.json")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--settings", default="all", help="compiled+checkpointing, ...; or all")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for compiled, checkpointing in itertools.product((False, True), (True, False)):
        names = [n for n, on in (("compiled", compiled), ("checkpointing", checkpointing)) if on]
        name = "+".join(names) or "plain"
        if arguments.settings != "all" and name not in arguments.settings.split(","):
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            line = measure(arguments, compiled, checkpointing)
        except torch.cuda.OutOfMemoryError:
            line = "does not fit"
        print(f"{name:24} {arguments.rows} rows {line}", flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
