"""The worker of PyTorch, transformers, PEFT and TRL: ``python -m benchmarks.speed.torch_peer``.

It times and lists these settings: TRL's fused head (which its trainers put on a model) or whole
logits with its losses, both with the kernels of PyTorch, with ``torch.compile``, and on a GPU with
Liger's kernels for layers (TRL's ``use_liger_kernel``). Attention is SDPA, the optimizer is fused
AdamW, and all cores work.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.models.llama import modeling_llama

from benchmarks.speed.protocol import Program, best_of, serve
from benchmarks.speed.rows import Rows, mean_ids
from benchmarks.speed.shapes import compared, shape_of
from benchmarks.speed.torch_losses import LOSSES

# The rate is so small that all settings begin at the same loss; a step takes as long with any rate.
LEARNING_RATE = 1e-8
IGNORED = -100

Batch = dict[str, torch.Tensor]
Kernels = Literal["eager", "compiled", "liger"]


def device() -> torch.device:
    """The accelerator, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def _own_kernels() -> dict[str, Any]:
    """The parts of transformers that Liger replaces."""
    names = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
    return {name: getattr(modeling_llama, name) for name in names}


def load(task: dict[str, Any]) -> Any:
    """The base model of a task."""
    folder = Path(task["folder"])
    dtype = getattr(torch, shape_of(task).dtype)
    model: Any = modeling_llama.LlamaForCausalLM.from_pretrained(
        folder / "model", dtype=dtype, attn_implementation="sdpa", device_map={"": device()}
    )
    model.config.use_cache = False
    return model


def with_adapter(model: Any, task: dict[str, Any]) -> Any:
    """PEFT's model around a base, or the whole base to be trained, where there is no adapter."""
    if not task.get("lora"):
        return model
    from peft import PeftModel

    folder = Path(task["folder"]) / "adapter"
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(int64 ids, mask), padded on the right to the longest row."""
    longest = max(len(row) for row in rows)
    ids_BL = np.zeros((len(rows), longest), np.int64)
    mask_BL = np.zeros((len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        ids_BL[b, : len(row)] = row
        mask_BL[b, : len(row)] = 1
    return ids_BL, mask_BL


def collate(work: str, rows: Rows, places: list[int]) -> Batch:
    """Makes what TRL's collators make: the rows of a batch, the rejected ones after the chosen."""
    some = [rows.tokens[i] for i in places]
    prompts = [int(rows.prompt_lengths[i]) for i in places]
    if work.startswith("dpo"):
        some += [rows.rejected[i] for i in places]
        prompts += prompts
    ids_BL, mask_BL = padded(some)
    labels_BL = np.where(mask_BL == 1, ids_BL, IGNORED)
    for b, prompt in enumerate(prompts):
        labels_BL[b, :prompt] = IGNORED
    batch = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    if work.startswith("dpo"):
        batch["reference_chosen"] = rows.reference_chosen[places]
        batch["reference_rejected"] = rows.reference_rejected[places]
    if work == "distill":
        # The labels of position t stand where token t is, as in `labels`.
        size = (*ids_BL.shape, rows.topk_ids[0].shape[-1])
        topk_ids, topk_logps = np.zeros(size, np.int64), np.full(size, -5.0, np.float32)
        for b, (place, prompt) in enumerate(zip(places, prompts, strict=True)):
            topk_ids[b, prompt : len(some[b])] = rows.topk_ids[place]
            topk_logps[b, prompt : len(some[b])] = rows.topk_logps[place]
        batch["topk_ids"], batch["topk_logps"] = topk_ids, topk_logps
        batch["weights"] = rows.weights[places]
    return {name: torch.from_numpy(array).to(device()) for name, array in batch.items()}


def batches(work: str, rows: Rows, task: dict[str, Any]) -> list[list[int]]:
    """The rows of each batch: a shuffled order, cut into pieces, as a data loader does it."""
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    size = task["batch_size"]
    return [order[start : start + size] for start in range(0, len(order), size)]


class Trainer:
    """A model in training with one kind of kernels."""

    def __init__(self, task: dict[str, Any], kernels: Kernels) -> None:
        self._work = task["work"]
        for name, one in _own_kernels().items():
            setattr(modeling_llama, name, one)  # Another setting may have replaced it.
        base = load(task)
        if kernels == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            # As TRL does, this replaces the layers alone, because TRL has its own head.
            apply_liger_kernel_to_llama(model=base, fused_linear_cross_entropy=False)
        if "fused" in LOSSES[self._work]:
            from trl.trainer.utils import add_fused_lm_head

            extra = ("entropy", "is_top1") if self._work == "sft" else ()
            add_fused_lm_head(base, outputs=("log_probs", *extra))
        self.model = with_adapter(base, task).train()
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self._learnt = learnt
        self._autocast = shape_of(task).dtype != "float32"
        self._call: Any = self.model
        if kernels == "compiled" and device().type == "cuda":
            # All layers share one program: a whole model of 32 layers compiles for many minutes.
            for layer in base.model.layers:
                layer.compile()
        elif kernels == "compiled":
            # Rows of one length are compiled for this length, others for any length.
            self._call = torch.compile(self.model, dynamic=task.get("dynamic"))

    def gradients(self, batch: Batch, head: str) -> torch.Tensor:
        """Returns the loss and leaves its gradients in the parameters."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device().type, torch.bfloat16, enabled=self._autocast):
            loss = LOSSES[self._work][head](self._call, batch)
        loss.backward()
        return loss

    def step(self, batch: Batch, head: str) -> None:
        """Takes a step."""
        self.gradients(batch, head)
        self._optimizer.step()

    def check(self, batch: Batch, head: str) -> dict[str, float]:
        """Computes the loss and the gradient norm."""
        loss = self.gradients(batch, head)
        squares = [p.grad.float().square().sum() for p in self._learnt if p.grad is not None]
        return {"loss": float(loss), "grad_norm": float(torch.stack(squares).sum().sqrt())}


def training(task: dict[str, Any]) -> Program:
    """Takes an epoch of steps over the task's rows, in the fastest setting."""
    work = task["work"]
    rows = Rows.load(task["rows"])
    planned = batches(work, rows, task)
    first = collate(work, rows, list(range(task["batch_size"])))
    kept: dict[Kernels, Trainer] = {}
    checked: set[str] = set()
    results: dict[str, float] = {}

    def trainer(kernels: Kernels) -> Trainer:
        """The trainer with these kernels; the memory of another is freed before it is made."""
        if kernels not in kept:
            kept.clear()
            gc.collect()
            if device().type == "cuda":
                torch.cuda.empty_cache()
            kept[kernels] = Trainer(task, kernels)
        return kept[kernels]

    def epoch(head: str, kernels: Kernels) -> None:
        name = _name(head, kernels)
        if name not in checked:
            checked.add(name)
            found = trainer(kernels).check(first, head)
            _same(results.setdefault("loss", found["loss"]), found["loss"], name)
            results.setdefault("grad_norm", found["grad_norm"])
        for places in planned:
            trainer(kernels).step(collate(work, rows, places), head)
        if device().type == "cuda":
            torch.cuda.synchronize()

    # The head that was faster when measured comes first: what is far behind is not run again.
    heads = list(LOSSES[work])[:: -1 if device().type == "cpu" else 1]
    tried: list[tuple[str, Kernels]] = [(head, "eager") for head in heads]
    if task.get("compile") and device().type == "cuda":
        tried += [(heads[0], "compiled"), (heads[0], "liger")]
    elif task.get("compile"):
        tried += [(head, "compiled") for head in heads]
    ways: dict[str, Callable[[], object]] = {
        _name(head, kernels): functools.partial(epoch, head, kernels) for head, kernels in tried
    }
    run, settings = best_of(ways)
    if run not in [ways[_name(*way)] for way in tried if way[1] in kept]:
        run()  # Its trainer is made anew, because the last one had other kernels.
    if not task.get("compile"):
        settings.append({"name": "torch.compile", "error": "not tried here"})
    return Program(
        run=run,
        results=results,
        settings=settings,
        units=float(rows.answer_tokens),
        peak=peak() if device().type == "cuda" else None,
    )


def _name(head: str, kernels: Kernels) -> str:
    return f"head={head}, kernels={kernels}"


def _same(first: float, second: float, name: str) -> None:
    if abs(first - second) > 1e-2 * abs(first):
        raise RuntimeError(f"{name}: its loss is {second:.6f}, that of the first way {first:.6f}")


def peak() -> Callable[[], int]:
    """A function that returns the most bytes of the tensors since its last call."""

    def read() -> int:
        found = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return found

    return read


def sampling(task: dict[str, Any]) -> Program:
    """Draws answers by ``generate``; a batch goes on to the longest of its answers."""
    rows = Rows.load(task["rows"])
    prompts = rows.prompts

    def generate(model: Any, draw: bool, places: list[int], most: int) -> torch.Tensor:
        longest = max(len(prompts[i]) for i in places)
        ids_BL = np.zeros((len(places), longest), np.int64)
        mask_BL = np.zeros((len(places), longest), np.int64)
        for b, i in enumerate(places):
            ids_BL[b, longest - len(prompts[i]) :] = prompts[i]
            mask_BL[b, longest - len(prompts[i]) :] = 1
        options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if draw else {}
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.from_numpy(ids_BL).to(device()),
                attention_mask=torch.from_numpy(mask_BL).to(device()),
                do_sample=draw,
                max_new_tokens=most,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
                **options,
            )
        return out[:, longest:]

    few = list(range(task["greedy_rows"]))
    answers = generate(load(compared(task)).eval(), False, few, task["greedy_tokens"])
    draw = functools.partial(generate, load(task).eval(), True)
    run, settings = best_of(rows.drawing_ways(task["batch_sizes"], draw))
    return Program(
        run=run,
        results=mean_ids(answers.cpu().numpy()),
        settings=settings,
        units=float(rows.answer_tokens),
        peak=peak() if device().type == "cuda" else None,
    )


def prepare(task: dict[str, Any]) -> Program:
    """The program of one task."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return sampling(task) if task["work"] == "sample" else training(task)


if __name__ == "__main__":
    raise SystemExit(serve(prepare))
