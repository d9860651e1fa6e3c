"""Random models of every family, made by transformers in PyTorch, as references for parity."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.models import lora
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.hf_weights import load_model
from proxykd_jax.models.params import Params, flatten, param_shapes, unflatten

LENGTH = 48  # beyond the sliding windows and the original contexts below

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_HALF_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

# model_type and the keys that differ from the small model, spelled as config.json files spell them.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 5000.0},
    "llama_biases_tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"model_type": "llama", "rope_scaling": _LLAMA3, "rope_theta": 500000.0},
    "llama_yarn_scales": {
        "model_type": "llama",
        "rope_parameters": {
            **_YARN,
            "rope_theta": 1000.0,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    },
    "mistral_window": {"model_type": "mistral", "sliding_window": 8, "head_dim": 16},
    "mistral_full_tied": {
        "model_type": "mistral",
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "rope_scaling": _YARN},
    "qwen2_half_sliding_tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        **_HALF_SLIDING,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3_biases_half_sliding_tied": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": True,
        **_HALF_SLIDING,
    },
}


def _randomise(model: Any) -> None:
    """Sets random weights: logits of about unit size, biases other than 0, norms other than 1."""
    import torch

    generator = torch.Generator().manual_seed(7)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * draw)
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * draw)
            elif "embed_tokens" in name and not tied:
                parameter.copy_(draw)
            else:
                parameter.copy_(draw / parameter.shape[-1] ** 0.5)


class Reference:
    """A model in PyTorch, the folder it was saved to, and what we read from that folder."""

    def __init__(self, case: str, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        record = {**_SMALL, **CASES[case]}
        hf_config = transformers.AutoConfig.for_model(record.pop("model_type"), **record)
        self.torch_model = transformers.AutoModelForCausalLM.from_config(
            hf_config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        _randomise(self.torch_model)
        self.folder = folder
        self.torch_model.save_pretrained(folder)
        self.config, self.params = load_model(folder)

    def logits(self, tokens_BL: np.ndarray, **options: np.ndarray) -> np.ndarray:
        return torch_logits(self.torch_model, tokens_BL, **options)


def torch_logits(model: Any, tokens_BL: np.ndarray, **options: np.ndarray) -> np.ndarray:
    import torch

    tensors = {key: torch.from_numpy(np.array(value)) for key, value in options.items()}
    with torch.no_grad():
        return model(torch.from_numpy(np.array(tokens_BL, np.int64)), **tensors).logits.numpy()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    @functools.cache
    def make(case: str) -> Reference:
        return Reference(case, tmp_path_factory.mktemp(case) / "model")

    return make


@pytest.fixture(params=CASES)
def each_reference(
    request: pytest.FixtureRequest, reference: Callable[[str], Reference]
) -> Reference:
    return reference(request.param)


def random_tokens(seed: int, batch: int, length: int, vocab_size: int = 97) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length)).astype(np.int32)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random weights of unit gain without PyTorch; no bias is 0 and no norm is 1."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in flatten(param_shapes(config)):
        draw = rng.normal(size=shape)
        if path[-1] == "scale":
            draw = 1 + 0.3 * draw
        elif path[-1] == "bias":
            draw = 0.3 * draw
        elif path[-1] == "kernel":
            draw = draw / shape[-2] ** 0.5
        else:
            draw = draw / shape[-1] ** 0.5
        leaves[path] = jnp.asarray(draw, jnp.float32)
    return unflatten(leaves)


def random_adapter(config: ModelConfig, seed: int = 0) -> lora.Adapter:
    """An adapter that changes the model: its b is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
        lora.init_adapter(jax.random.key(seed), config),
    )


@pytest.fixture
def small_config() -> ModelConfig:
    """A config with every option: q/k norms, biases, windows in some layers, adapters in all."""
    return ModelConfig(
        family="qwen3",
        vocab_size=97,
        num_layers=3,
        model_dim=32,
        ffn_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
        sliding_window=6,
        sliding_layers=(1, 2),
        max_positions=64,
        lora=LoraConfig(rank=4, alpha=8.0),
    )


@pytest.fixture
def helpers() -> Any:
    """The functions above, as a fixture, because test folders are no packages here."""

    class Helpers:
        length = LENGTH
        cases = CASES
        tokens = staticmethod(random_tokens)
        params = staticmethod(random_params)
        adapter = staticmethod(random_adapter)
        torch_logits = staticmethod(torch_logits)

    return Helpers
