"""A tiny model and random batches for the tests of the training room."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.params import init_params
from proxykd_jax.training.state import ModelSpec
from proxykd_jax.types import DistillBatch, PairBatch, TokenBatch

VOCAB = 37


def tiny_config(lora: LoraConfig | None = None) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        }
    ).replace(lora=lora)


@pytest.fixture(scope="session")
def lora_model() -> tuple[ModelSpec, dict, dict]:
    """Returns (spec, frozen, trainable) with an adapter that is not zero."""
    config = tiny_config(LoraConfig(rank=3, alpha=6.0))
    params = init_params(jax.random.key(0), config)
    adapter = init_adapter(jax.random.key(1), config)
    adapter = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapter
    )
    return ModelSpec(config, "lora", "float32", "none"), params, adapter


@pytest.fixture(scope="session")
def full_model() -> tuple[ModelSpec, dict, dict]:
    config = tiny_config()
    return ModelSpec(config, "full", "float32", "none"), {}, init_params(jax.random.key(3), config)


def random_rows(rng: np.random.Generator, rows: int, length: int = 12) -> TokenBatch:
    """Returns rows of unequal length with one example each; the last row is empty."""
    tokens_BL = np.zeros((rows, length), np.int32)
    labels_BL, segments_BL = np.zeros_like(tokens_BL), np.zeros_like(tokens_BL)
    mask_BL = np.zeros((rows, length), bool)
    for row in range(rows - 1):
        total = int(rng.integers(4, length + 2))
        prompt = int(rng.integers(1, total - 1))
        ids = rng.integers(3, VOCAB, total)
        tokens_BL[row, : total - 1], labels_BL[row, : total - 1] = ids[:-1], ids[1:]
        segments_BL[row, : total - 1] = 1
        mask_BL[row, prompt - 1 : total - 1] = True
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    return TokenBatch(
        tokens_BL, labels_BL, mask_BL, segments_BL, positions_BL, segments_BL[:, :1] > 0
    )


def random_pairs(rng: np.random.Generator, rows: int) -> PairBatch:
    pair_mask_B = np.ones(rows, bool)
    pair_mask_B[[0, -1]] = False
    return PairBatch(
        random_rows(rng, rows),
        random_rows(rng, rows),
        rng.normal(-20, 3, rows).astype(np.float32),
        rng.normal(-20, 3, rows).astype(np.float32),
        pair_mask_B,
    )


def random_distill(rng: np.random.Generator, rows: int, top_k: int = 5) -> DistillBatch:
    batch = random_rows(rng, rows)
    logits = rng.normal(0, 2, (*batch.tokens_BL.shape, VOCAB))
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logps, axis=-1)[..., :top_k].astype(np.int32)
    topk = np.take_along_axis(logps, ids, axis=-1)
    nll_mask_BS = np.array(batch.example_mask_BS)
    nll_mask_BS[1] = False
    return DistillBatch(
        batch,
        ids,
        topk.astype(np.float32),
        np.log1p(-np.exp(topk).sum(-1)).astype(np.float32),
        rng.uniform(0.2, 1.5, (rows, 1)).astype(np.float32),
        nll_mask_BS,
    )
