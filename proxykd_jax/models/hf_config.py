"""Converts Hugging Face ``config.json``, in old and new spellings, to and from ``ModelConfig``.

New files (transformers 5) keep rope in ``rope_parameters`` and the dtype in ``dtype``. Old ones
have ``rope_theta``, ``rope_scaling`` and ``torch_dtype``. Absent keys take the defaults of the
family's class in transformers, because published files omit them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.models.config import FAMILIES, LoraConfig, ModelConfig, RopeConfig
from proxykd_jax.small_files import read_object

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MAX_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
_ACTIVATIONS = ("silu", "swish")
_MOST, _MOST_SHOWN = 2**31 - 1, 80


def read_config(folder: str | Path, lora: LoraConfig | None = None) -> ModelConfig:
    """The model described by ``folder/config.json`` (or by a path to such a file).

    Raises:
      UserError: the file is absent, is not a JSON object, or describes an unsupported model.
    """
    path = Path(folder)
    if path.is_dir() or path.suffix != ".json":
        path = path / "config.json"
    if not path.exists():
        raise UserError(
            f"{path} does not exist. A model is a Hugging Face folder with config.json and "
            "safetensors weights."
        )
    record = read_object(path, "model's config")
    try:
        return config_from_hf(record, lora=lora)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from_hf(record: dict[str, Any], lora: LoraConfig | None = None) -> ModelConfig:
    """See ``ModelConfig.from_hf``."""
    family = _family(record)
    if record.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise UserError(
            f"Activation {_shown(record['hidden_act'])} is not supported; the Llama family uses "
            "silu."
        )
    if record.get("quantization_config"):
        raise UserError(
            "The weights are quantised (quantization_config). Use the unquantised checkpoint."
        )
    num_layers = read_integer(record, "num_hidden_layers")
    num_heads = read_integer(record, "num_attention_heads")
    if num_heads < 1:
        raise UserError(f"num_attention_heads must be at least 1, got {num_heads}.")
    model_dim = read_integer(record, "hidden_size")
    default_kv_heads = {"mistral": 8}.get(family, num_heads)
    if family == "qwen3":
        head_dim = read_integer(record, "head_dim", 128)
    elif record.get("head_dim"):
        head_dim = read_integer(record, "head_dim")
    elif model_dim % num_heads:
        raise UserError(
            f"hidden_size ({model_dim}) is not a multiple of num_attention_heads ({num_heads}) "
            "and there is no head_dim."
        )
    else:
        head_dim = model_dim // num_heads
    max_positions = read_integer(record, "max_position_embeddings", _MAX_POSITIONS[family])
    window, sliding_layers = _sliding(record, family, num_layers)
    attention_bias = read_flag(record, "attention_bias") and family in ("llama", "qwen3")
    default_bos, default_eos = (1, 2) if family in ("llama", "mistral") else (None, None)
    return ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=read_integer(record, "vocab_size"),
        num_layers=num_layers,
        model_dim=model_dim,
        ffn_dim=read_integer(record, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=read_integer(record, "num_key_value_heads", default_kv_heads),
        head_dim=head_dim,
        norm_eps=read_number(record, "rms_norm_eps", 1e-6),
        rope=_rope(record, max_positions),
        tie_embeddings=read_flag(record, "tie_word_embeddings"),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and read_flag(record, "mlp_bias"),
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_layers=sliding_layers,
        max_positions=max_positions,
        bos_token_id=_token_id(record, "bos_token_id", default_bos),
        eos_token_ids=_eos_ids(record, default_eos),
        pad_token_id=_token_id(record, "pad_token_id"),
        initializer_range=read_number(record, "initializer_range", 0.02),
        lora=lora,
    )


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """See ``ModelConfig.to_hf``.

    Raises:
      UserError: the family's class in transformers cannot express the model, for example Llama
        with a bias on the queries only.
    """
    _check_expressible(config)
    eos = config.eos_token_ids
    record: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "attention_dropout": 0.0,
        # Readers before transformers 4.56 know only torch_dtype; later ones prefer dtype.
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope),
        "rope_parameters": _rope_parameters_to_hf(config.rope),
    }
    if record["rope_scaling"] is None:
        # transformers 4 writes null here. transformers 5 warns about null, so leave the key out.
        del record["rope_scaling"]
    if config.family in ("llama", "qwen3"):
        record["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        record["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        record["sliding_window"] = config.sliding_window if config.sliding_layers else None
    if config.family in ("qwen2", "qwen3"):
        sliding = set(config.sliding_layers)
        record["use_sliding_window"] = bool(sliding)
        record["sliding_window"] = config.sliding_window if sliding else None
        # Readers that do not know layer_types let the layers from this index on slide.
        record["max_window_layers"] = min(sliding, default=config.num_layers)
        record["layer_types"] = [
            "sliding_attention" if layer in sliding else "full_attention"
            for layer in range(config.num_layers)
        ]
    return record


def _family(record: dict[str, Any]) -> str:
    family = record.get("model_type")
    named = record.get("architectures") or []
    architectures = [named] if isinstance(named, str) else named
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError(f"The key 'architectures' must be a list of names, got {_shown(named)}.")
    if family is None and len(architectures) == 1:
        family = {name: key for key, name in _ARCHITECTURES.items()}.get(architectures[0])
    if family not in FAMILIES:
        raise UserError(
            f"Models of type {_shown(record.get('model_type'))} (architectures "
            f"{', '.join(architectures) or 'none'}) are not supported. Supported: "
            f"{', '.join(_ARCHITECTURES.values())}."
        )
    if architectures and _ARCHITECTURES[family] not in architectures:
        raise UserError(
            f"Architecture {architectures[0]!r} is not supported; a {family} model must be a "
            f"{_ARCHITECTURES[family]}."
        )
    return family


# --- values of a file that nobody has checked -----------------------------------------------------


def read_integer(record: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a file's object; null and an absent key stand for the default.

    Raises:
      UserError: the value is of another type, beyond int32, or missing without a default.
    """
    value = record.get(key)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"The key {key!r} is missing.")
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _MOST:
        raise UserError(f"The key {key!r} must be a whole number below 2^31, got {_shown(value)}.")
    return value


def read_number(record: dict[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a file's object; see ``read_integer``."""
    value = record.get(key)
    if value is None:
        value = default
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond all floats
        pass
    raise UserError(f"The key {key!r} must be a finite number, got {_shown(value)}.")


def read_flag(record: dict[str, Any], key: str, default: bool = False) -> bool:
    """True or false in a file's object; see ``read_integer``."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"The key {key!r} must be true or false, got {_shown(value)}.")
    return value


def _block(record: dict[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key) or {}
    if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
        raise UserError(
            f"Rope parameters that differ between layers are not supported; {key!r} must be one "
            f"set, got {_shown(value)}."
        )
    return value


def _token_id(record: dict[str, Any], key: str, default: int | None = None) -> int | None:
    return None if record.get(key, default) is None else read_integer(record, key, default)


def _eos_ids(record: dict[str, Any], default: int | None) -> tuple[int, ...]:
    value = record.get("eos_token_id", default)
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(read_integer({"eos_token_id": each}, "eos_token_id") for each in ids)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # too many digits
        text = "a whole number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


# --- parts of the file ----------------------------------------------------------------------------


def _sliding(
    record: dict[str, Any], family: str, num_layers: int
) -> tuple[int | None, tuple[int, ...]]:
    if family == "llama":
        return None, ()
    if family == "mistral":
        # transformers takes 4096 for an absent key. Published files with full attention say null.
        window = record.get("sliding_window", 4096)
        every = tuple(range(num_layers))
        return (
            (None, ()) if window is None else (read_integer(record, "sliding_window", 4096), every)
        )
    window = record.get("sliding_window", 4096)
    if not read_flag(record, "use_sliding_window") or window is None:
        return None, ()
    layer_types = record.get("layer_types")
    if layer_types is None:
        start = read_integer(record, "max_window_layers", 28)
        layers = tuple(range(max(min(start, num_layers), 0), num_layers))
    else:
        if not isinstance(layer_types, list) or not all(isinstance(x, str) for x in layer_types):
            raise UserError(
                f"The key 'layer_types' must be a list of names, got {_shown(layer_types)}."
            )
        unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
        if unknown or len(layer_types) != num_layers:
            raise UserError(
                f"layer_types must name sliding_attention or full_attention for each of the "
                f"{num_layers} layers, got {len(layer_types)} entries"
                + (f" with {', '.join(unknown)}." if unknown else ".")
            )
        layers = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
    return (read_integer(record, "sliding_window", 4096), layers) if layers else (None, ())


def _rope(record: dict[str, Any], max_positions: int) -> RopeConfig:
    blocks = [_block(record, key) for key in ("rope_parameters", "rope_scaling")]
    readings = [_rope_from(block, record, max_positions) for block in blocks if block]
    if not readings:
        return _rope_from({}, record, max_positions)
    if any(reading != readings[0] for reading in readings):
        raise UserError(
            "rope_parameters and rope_scaling contradict each other; remove one of them."
        )
    return readings[0]


def _rope_from(block: dict[str, Any], record: dict[str, Any], max_positions: int) -> RopeConfig:
    partial = read_number(
        block, "partial_rotary_factor", read_number(record, "partial_rotary_factor", 1.0)
    )
    if partial != 1.0:
        raise UserError("A partial_rotary_factor other than 1 is not supported.")
    kind = block.get("rope_type", block.get("type", "default"))
    beside = read_number(_block(record, "rope_parameters"), "rope_theta", 10_000.0)
    known: dict[str, Any] = {
        "theta": read_number(block, "rope_theta", read_number(record, "rope_theta", beside)),
        "kind": kind,
    }
    original = read_integer(block, "original_max_position_embeddings", 0)
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        default = max_positions / original if kind == "yarn" and original else None
        if block.get("factor", default) is None:
            raise UserError(f"Rope scaling {kind!r} needs a factor.")
        known["factor"] = read_number(block, "factor", default)
    if kind in ("llama3", "yarn"):
        # As in transformers, the key beside rope_parameters overrides the one inside.
        known["original_max_positions"] = (
            read_integer(record, "original_max_position_embeddings", 0) or original or max_positions
        )
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if key not in block:
                raise UserError(f"Rope scaling 'llama3' needs {key}.")
            known[key] = read_number(block, key)
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if block.get(key):
                known[key] = read_number(block, key)
        known["truncate"] = read_flag(block, "truncate", True)
    return RopeConfig(**known)


def _scaling_fields(rope: RopeConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        fields["beta_fast"] = rope.beta_fast
        fields["beta_slow"] = rope.beta_slow
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, key) is not None:
                fields[key] = getattr(rope, key)
        if not rope.truncate:
            fields["truncate"] = False
    return fields


def _rope_parameters_to_hf(rope: RopeConfig) -> dict[str, Any]:
    fields = {} if rope.kind == "default" else _scaling_fields(rope)
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **fields}


def _rope_scaling_to_hf(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    if rope.kind in ("linear", "dynamic"):
        # Readers before transformers 4.43 accept exactly these two keys.
        return {"type": rope.kind, "factor": rope.factor}
    return {"rope_type": rope.kind, **_scaling_fields(rope)}


def _check_expressible(config: ModelConfig) -> None:
    problems = []
    family = config.family
    if family == "mistral" and (config.qkv_bias or config.o_bias):
        problems.append("attention biases")
    if family == "qwen2" and not (config.qkv_bias and not config.o_bias):
        problems.append("anything but biases on queries, keys and values")
    if family in ("llama", "qwen3") and config.qkv_bias != config.o_bias:
        problems.append("biases on only some of the attention's linear layers")
    if config.mlp_bias and family != "llama":
        problems.append("biases in the MLP")
    if config.qk_norm != (family == "qwen3"):
        problems.append("norms on queries and keys" if config.qk_norm else "their absence")
    if family == "llama" and config.sliding_layers:
        problems.append("a sliding window")
    if family == "mistral" and 0 < len(config.sliding_layers) < config.num_layers:
        problems.append("a sliding window in only some layers")
    if problems:
        raise UserError(
            f"A Hugging Face {family} model cannot have {' or '.join(problems)}; "
            "choose another family for this shape."
        )
