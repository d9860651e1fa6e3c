"""Makes the model of a shape once, as files that every tool reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.speed.rows import Rows
from benchmarks.speed.shapes import LORA_ALPHA, LORA_RANK, NORM_EPS, ROPE_THETA, Shape, shape_of
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.models.config import LoraConfig, ModelConfig, RopeConfig
from proxykd_jax.models.hf_weights import load_model, save_model
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.params import init_params
from proxykd_jax.models.peft import load_adapter, save_adapter


def model_config(shape: Shape) -> ModelConfig:
    """The library's config of a shape."""
    return ModelConfig(
        family="llama",
        vocab_size=shape.vocab,
        num_layers=shape.layers,
        model_dim=shape.dim,
        ffn_dim=shape.ffn,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        norm_eps=NORM_EPS,
        rope=RopeConfig(theta=ROPE_THETA),
        tie_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_ids=(2,),
        # The range is so wide that the layers matter beside the embedding. With a smaller one a
        # tied model repeats its last token, and a greedy answer would not test the cache.
        initializer_range=shape.dim**-0.5,
    )


def make(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the random model of a shape and a LoRA adapter that changes it a little."""
    shape = shape_of(task)
    folder = Path(task["folder"])
    config = model_config(shape)
    if not (folder / "model").exists():
        init = jax.jit(init_params, static_argnames=("config", "dtype"))
        params = init(jax.random.key(0), config, shape.dtype)
        save_model(folder / "model", config, params, dtype=shape.dtype)
    if not (folder / "adapter").exists():
        lora_config = config.replace(lora=LoraConfig(rank=LORA_RANK, alpha=LORA_ALPHA))
        adapter = init_adapter(jax.random.key(1), lora_config)
        # With b = 0 every gradient towards a is zero, and the comparison would not see it.
        adapter = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                0.01 * jax.random.normal(jax.random.key(2), leaf.shape)
                if path[-1].key == "b"
                else leaf
            ),
            adapter,
        )
        save_adapter(folder / "adapter", adapter, lora_config, str(folder / "model"))
    return {"params": config.num_params}


def load(task: dict[str, Any]) -> tuple[ModelConfig, Any, Any]:
    """(config, params, adapter or None) of a task."""
    shape = shape_of(task)
    folder = Path(task["folder"])
    config, params = load_model(folder / "model", dtype=shape.dtype)
    if not task.get("lora"):
        return config, params, None
    lora, adapter = load_adapter(folder / "adapter", config)
    return config.replace(lora=lora), params, jax.tree.map(jax.numpy.asarray, adapter)


def token_rows(rows: Rows, *, rejected: bool = False) -> list[TokenRow]:
    """The library's rows, whose ids are numbers."""
    tokens = rows.rejected if rejected else rows.tokens
    return [
        TokenRow(row, int(prompt), f"{index:064x}")
        for index, (row, prompt) in enumerate(zip(tokens, rows.prompt_lengths, strict=True))
    ]


def device_peak() -> Callable[[], int] | None:
    """A function that returns the most bytes that the accelerator held; None on a CPU."""
    device = jax.local_devices()[0]
    if device.memory_stats() is None:
        return None
    return lambda: int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
