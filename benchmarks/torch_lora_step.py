"""Measures a LoRA SFT step in PyTorch, transformers and PEFT: the peer of ``warmup``.

    python benchmarks/torch_lora_step.py --config configs/models/llama2_7b --rows 16 --length 1024

The model has random weights, a bfloat16 base, float32 adapters under autocast, flash attention
(SDPA) and fused AdamW. It runs with and without ``torch.compile`` and gradient checkpointing. The
command prints the median seconds of a step, tokens a second and the peak memory of each setting, or
that the setting does not fit.
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
    """Makes the model with its adapter on the GPU."""
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
    """Measures one setting and returns its line."""
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
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="folder with a Llama's config.json")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--layers", type=int, help="number of layers (default: the config's)")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps")
    parser.add_argument(
        "--settings", default="all", help="settings to run, such as compiled+checkpointing,plain"
    )
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
