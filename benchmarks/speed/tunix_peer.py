"""The worker of google-tunix 0.1.7: ``python -m benchmarks.speed.tunix_peer``.

Its trainers (``PeftTrainer``, ``DPOTrainer``, ``DistillationTrainer``) make the step, jitted as
their ``train`` does it. What ``train`` does around a step (metrics, checkpoints) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import common
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

from benchmarks.speed.protocol import Program, best_of, serve
from benchmarks.speed.rows import Rows
from benchmarks.speed.shapes import LORA_ALPHA, LORA_RANK, NORM_EPS, ROPE_THETA, shape_of
from benchmarks.speed.tunix_sampling import sampling

LEARNING_RATE = 1e-5
BETA = 0.1
# The lengths of a real corpus's batches are rounded up to a multiple of this, because each length
# is compiled.
_MULTIPLE = 64

Step = Callable[[Any], tuple[Any, Any, Any]]


def load(task: dict[str, Any]) -> Any:
    """Loads the model of a task, with its adapter if it has one."""
    shape = shape_of(task)
    config = llama.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab,
        embed_dim=shape.dim,
        hidden_dim=shape.ffn,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        rope_theta=int(ROPE_THETA),
        norm_eps=NORM_EPS,
        weight_tying=shape.tied,
    )
    folder = Path(task["folder"])
    model = create_model_from_safe_tensors(str(folder / "model"), config, dtype=jnp.float32)
    return _with_adapter(model, folder / "adapter") if task.get("lora") else model


def _with_adapter(model: Any, folder: Path) -> Any:
    """Puts Qwix's LoRA on the seven linear layers, with the factors of the shared adapter."""
    import qwix
    from safetensors.numpy import load_file

    targets = "|".join(
        f".*{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    provider = qwix.LoraProvider(module_path=targets, rank=LORA_RANK, alpha=LORA_ALPHA)
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
    stored = load_file(folder / "adapter_model.safetensors")
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        # layers, 3, attn, q_proj, w_lora_a -> ...layers.3.self_attn.q_proj.lora_A.weight
        names = [str(part) for part in path]
        layer, block, target = names[1], names[2], names[3]
        block = {"attn": "self_attn", "mlp": "mlp"}[block]
        letter = "A" if names[-1].endswith("lora_a") else "B"
        found = stored[
            f"base_model.model.model.layers.{layer}.{block}.{target}.lora_{letter}.weight"
        ]
        variable[...] = jnp.asarray(found.T.reshape(variable[...].shape))
    return model


def optimizer() -> optax.GradientTransformation:
    """The Adam of all tools."""
    return optax.adam(LEARNING_RATE)


def padded(rows: list[np.ndarray], task: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows on the right: (int32 ids, bool valid)."""
    longest = max(len(row) for row in rows)
    if task.get("corpus"):
        longest = -(-longest // _MULTIPLE) * _MULTIPLE
    ids_BL = np.zeros((len(rows), longest), np.int32)
    valid_BL = np.zeros((len(rows), longest), bool)
    for b, row in enumerate(rows):
        ids_BL[b, : len(row)] = row
        valid_BL[b, : len(row)] = True
    return ids_BL, valid_BL


def _answers(rows: Rows, places: list[int], valid_BL: np.ndarray) -> np.ndarray:
    """bool, which tokens belong to answers."""
    columns = np.arange(valid_BL.shape[1])
    return valid_BL & (columns[None, :] >= rows.prompt_lengths[places][:, None])


def sft(task: dict[str, Any], rows: Rows) -> tuple[Step, Callable[[list[int]], Any]]:
    """The step of ``PeftTrainer`` with its default loss, and what collates its batches."""
    trainer = peft_trainer.PeftTrainer(load(task), optimizer(), _config())
    trainer = trainer.with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": common.build_positions_from_mask(x.input_tokens != -1),
            "attention_mask": common.make_causal_attn_mask(x.input_tokens != -1),
        }
    )

    def collate(places: list[int]) -> Any:
        ids_BL, valid_BL = padded([rows.tokens[i] for i in places], task)
        return peft_trainer.TrainingInput(ids_BL, _answers(rows, places, valid_BL))

    return _step(trainer), collate


def dpo(task: dict[str, Any], rows: Rows) -> tuple[Step, Callable[[list[int]], Any]]:
    """The step of ``DPOTrainer``, and what collates its batches.

    On dense rows the references are given, so that the work is equal. On a real corpus the trainer
    computes them in every step, because it cannot store them. For the comparison of results they
    are always given.
    """
    model = load(task)
    reference = load(task) if task.get("corpus") else None
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=1 << 30, beta=BETA, data_sharding_axis=()
    )
    trainer = dpo_trainer.DPOTrainer(model, reference, optimizer(), config)

    first, all_prompts = list(range(task["batch_size"])), rows.prompts

    def collate(places: list[int]) -> Any:
        prompts = [all_prompts[i] for i in places]
        longest, _ = padded(prompts, task)
        prompt_ids = np.zeros_like(longest)
        for b, prompt in enumerate(prompts):
            prompt_ids[b, prompt_ids.shape[1] - len(prompt) :] = prompt
        chosen = [rows.tokens[i][rows.prompt_lengths[i] :] for i in places]
        rejected = [rows.rejected[i][rows.prompt_lengths[i] :] for i in places]
        both, valid = padded([*chosen, *rejected], task)
        size = len(places)
        example = trainer._prepare_inputs(
            dpo_trainer.TrainingInput(
                prompt_ids=prompt_ids,
                prompt_mask=prompt_ids != 0,
                chosen_ids=both[:size],
                chosen_mask=valid[:size],
                rejected_ids=both[size:],
                rejected_mask=valid[size:],
            )
        )
        if reference is not None and places != first:
            return example
        return example.replace(
            ref_chosen_logps=jnp.asarray(rows.reference_chosen[places]),
            ref_rejected_logps=jnp.asarray(rows.reference_rejected[places]),
        )

    return _step(trainer), collate


def distill(task: dict[str, Any], rows: Rows) -> tuple[Step, Callable[[list[int]], Any]]:
    """The step of ``DistillationTrainer`` with our strategy for stored top-k labels, and what
    collates its batches.

    Tunix has no such strategy: its own takes the teacher's whole logits, and its mean counts
    padding and prompts.
    """
    from tunix.distillation import distillation_trainer

    from benchmarks.speed.tunix_strategy import StoredLabels, forward

    model = load(task)
    trainer = distillation_trainer.DistillationTrainer(
        model,
        model,
        StoredLabels(forward, forward, lambda **inputs: inputs["input_tokens"]),
        optimizer(),
        distillation_trainer.TrainingConfig(eval_every_n_steps=1 << 30, data_sharding_axis=()),
    )

    def collate(places: list[int]) -> Any:
        some = [rows.tokens[i] for i in places]
        ids_BL, valid_BL = padded(some, task)
        size = (*ids_BL.shape, rows.topk_ids[0].shape[-1])
        topk_ids = np.zeros(size, np.int32)
        topk_logps = np.full(size, -5.0, np.float32)
        for b, place in enumerate(places):
            answer = slice(int(rows.prompt_lengths[place]), len(some[b]))
            topk_ids[b, answer] = rows.topk_ids[place]
            topk_logps[b, answer] = rows.topk_logps[place]
        stored = {"ids": topk_ids, "logps": topk_logps, "weights": rows.weights[places]}
        return distillation_trainer.TrainingInput(
            input_tokens=ids_BL,
            input_mask=_answers(rows, places, valid_BL),
            teacher_output=jax.tree.map(jnp.asarray, stored),
        )

    return _step(trainer), collate


def _config() -> Any:
    return peft_trainer.TrainingConfig(eval_every_n_steps=1 << 30, data_sharding_axis=())


def _step(trainer: Any) -> Step:
    """The step to (loss, auxiliary, gradient norm), as ``train`` compiles it."""
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    found: Step = step
    return found


WORKS = {"sft": sft, "dpo_plain": dpo, "distill": distill}


def training(task: dict[str, Any]) -> Program:
    """Takes an epoch of steps over the task's rows, in a shuffled order."""
    rows = Rows.load(task["rows"])
    step, collate = WORKS[task["work"]](task, rows)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    size = task["batch_size"]
    planned = [order[start : start + size] for start in range(0, len(order), size)]
    loss, _, norm = step(collate(list(range(size))))
    results = {"loss": float(loss), "grad_norm": float(norm)}

    def run() -> None:
        for places in planned:
            loss, _, norm = step(collate(places))
        jax.block_until_ready((loss, norm))

    way, settings = best_of({"train_step, cache_nnx_graph=True": run})
    return Program(run=way, results=results, settings=settings, units=float(rows.answer_tokens))


def prepare(task: dict[str, Any]) -> Program:
    """The program of one task."""
    return sampling(load(task), task) if task["work"] == "sample" else training(task)


if __name__ == "__main__":
    raise SystemExit(serve(prepare))
