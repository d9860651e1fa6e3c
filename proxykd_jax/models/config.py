"""Architecture of a decoder as frozen, hashable records that can be static under jit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from proxykd_jax.errors import UserError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
LORA_TARGETS = ATTENTION_TARGETS + MLP_TARGETS
# Far beyond every model, and small enough that names and shapes can be listed.
MOST_LAYERS, MOST_PARAMS = 10_000, 1e14


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2021) and its context extensions.

    ``kind`` decides which other fields are used: ``linear`` and ``dynamic`` use ``factor``;
    ``llama3`` uses ``factor``, ``original_max_positions``, ``low_freq_factor`` and
    ``high_freq_factor``; ``yarn`` (Peng et al., 2023) uses ``factor``, ``original_max_positions``,
    the two betas, ``attention_factor`` or the two mscales, and ``truncate``. ``dynamic`` stretches
    the rotation with the longest row of a batch, so log-probs would depend on the other rows. It is
    accepted up to the model's ``max_positions``, where it equals ``default``, and refused beyond.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UserError(
                f"Rope scaling of type {self.kind!r} is not supported. "
                f"Supported: {', '.join(ROPE_KINDS)}."
            )
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise UserError(f"rope_theta must be positive and finite, got {self.theta!r}.")
        if self.kind != "default" and not (self.factor >= 1 and math.isfinite(self.factor)):
            raise UserError(
                f"The factor of rope scaling must be at least 1 and finite, got {self.factor!r}."
            )
        if self.kind in ("yarn", "llama3") and not self.original_max_positions:
            raise UserError(f"Rope scaling {self.kind!r} needs original_max_position_embeddings.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) on the named linear layers of every block.

    The update of a kernel is ``scale * a @ b``; ``scale`` is alpha / rank, or
    alpha / sqrt(rank) with ``rslora`` (Kalajdzievski, 2023).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        # A list would not be hashable. The order of targets has no meaning.
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise UserError(
                f"LoRA targets must be some of {', '.join(LORA_TARGETS)}; "
                f"got {', '.join(unknown) or 'none'}."
            )
        object.__setattr__(
            self, "targets", tuple(name for name in LORA_TARGETS if name in self.targets)
        )
        if not 1 <= self.rank < 2**31:
            raise UserError(f"The LoRA rank must be at least 1 and below 2^31, got {self.rank}.")
        if not math.isfinite(self.alpha):
            raise UserError(f"The LoRA alpha must be finite, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"The LoRA dropout must lie in [0, 1), got {self.dropout}.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Llama family.

    ``sliding_layers`` are the indices of the layers that see only the last ``sliding_window``
    positions, including their own. The other layers see all earlier positions. ``qkv_bias``,
    ``o_bias`` and ``mlp_bias`` add a bias to the linear layers. ``qk_norm`` applies an RMS norm
    over the head dimension of queries and keys (Qwen 3).
    """

    family: Family
    vocab_size: int
    num_layers: int
    model_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    max_positions: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(
                f"Model family {self.family!r} is not supported. Supported: {', '.join(FAMILIES)}."
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise UserError(f"norm_eps must be finite and not negative, got {self.norm_eps}.")
        if not (math.isfinite(self.initializer_range) and self.initializer_range >= 0):
            raise UserError(
                f"initializer_range must be finite and not negative, got {self.initializer_range}."
            )
        sizes = (
            "vocab_size num_layers model_dim ffn_dim num_heads num_kv_heads head_dim max_positions"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_layers > MOST_LAYERS or self.num_params > MOST_PARAMS:
            raise UserError(
                f"{self.num_layers:,} layers and {self.num_params:.0e} parameters are no real "
                f"model: at most {MOST_LAYERS:,} and {MOST_PARAMS:.0e} are accepted."
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")
        object.__setattr__(self, "sliding_layers", tuple(sorted(set(self.sliding_layers))))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if self.sliding_layers:
            if self.sliding_window is None or self.sliding_window < 1:
                raise UserError(
                    f"Layers with a sliding window need sliding_window >= 1, "
                    f"got {self.sliding_window}."
                )
            if self.sliding_layers[0] < 0 or self.sliding_layers[-1] >= self.num_layers:
                raise UserError(
                    f"sliding_layers must lie in [0, {self.num_layers}), got {self.sliding_layers}."
                )

    @classmethod
    def from_hf(cls, record: dict[str, Any], lora: LoraConfig | None = None) -> ModelConfig:
        """Reads a Hugging Face ``config.json``, in the old or the new spelling.

        Raises:
          UserError: unsupported architecture, activation, quantisation or rope type; missing keys.
        """
        from proxykd_jax.models.hf_config import config_from_hf

        return config_from_hf(record, lora=lora)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A ``config.json`` that old and new readers accept; ``dtype`` names the weights' dtype."""
        from proxykd_jax.models.hf_config import config_to_hf

        return config_to_hf(self, dtype=dtype)

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    @property
    def num_params(self) -> int:
        """Parameters of the base model, without adapters; a tied embedding counts once."""
        attention = self.model_dim * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.model_dim * self.ffn_dim
        layer = attention + mlp + 2 * self.model_dim
        if self.qkv_bias:
            layer += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.o_bias:
            layer += self.model_dim
        if self.mlp_bias:
            layer += 2 * self.ffn_dim + self.model_dim
        if self.qk_norm:
            layer += 2 * self.head_dim
        embeddings = self.vocab_size * self.model_dim * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.model_dim
