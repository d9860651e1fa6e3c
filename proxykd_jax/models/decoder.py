"""The forward pass over whole rows: hidden states, logits, and the decoder layer.

Precision: matrix products use the dtype of the embedding, which the activations share (float32
products are full float32 on every backend). Norms, softmax, rotation and logits are float32. The
LoRA factors are float32, and their update is added in float32 (``lora_updates``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from proxykd_jax.models.attention import (
    RESULT,
    Backend,
    choose_backend,
    segment_mask,
    window_mask,
)
from proxykd_jax.models.attention import attention as grouped_attention
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.lora import Adapter, lora_updates
from proxykd_jax.models.numerics import dot_precision
from proxykd_jax.models.params import Params
from proxykd_jax.models.quantized import matmul
from proxykd_jax.models.rope import check_length, rotate, rotation
from proxykd_jax.parallel.sharding import constrain_rows
from proxykd_jax.types import TokenBatch

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "dot_general" or "dot_product_attention" in primitive.name


# What the backward pass finds in memory for each layer, beside the layer's input.
# none: results of linear layers and attention; the operations between are cheaper to recompute
#   than to write and read (0.8 of the time on a CPU, with half of the temporaries).
# full: nothing, which costs one more forward pass.
# dots: outputs of the seven linear layers; attention is recomputed.
# outputs: outputs of the attention block and of the MLP.
REMAT_POLICIES: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        _products, jax.checkpoint_policies.save_only_these_names(RESULT)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names("attention_out", "mlp_out"),
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32; the result has x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (x32 * inverse * scale).astype(x.dtype)


def _linear(
    x: jax.Array,
    block: dict[str, Any],
    adapter: dict[str, Any],
    names: Sequence[str],
    lora: LoraConfig | None,
    dropout_key: jax.Array | None,
) -> list[jax.Array]:
    """x W + b for linear layers with the same input, each with its LoRA update if it has one.

    x is flattened to one axis of rows first. With more axes, the kernel's gradient is computed from
    transposed copies, and a backward pass on a CPU takes 1.4 times as long.
    """
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    updates = {}
    if adapter:
        assert lora is not None  # check_adapter guarantees it
        own = {name: adapter[name] for name in names if name in adapter}
        updates = lora_updates(x, own, lora, dropout_key)
    outs = []
    for name in names:
        out = matmul(x, block[name]["kernel"])
        if "bias" in block[name]:
            out = out + block[name]["bias"][None, :]
        if name in updates:
            out = (out.astype(jnp.float32) + updates[name].astype(jnp.float32)).astype(out.dtype)
        outs.append(out.reshape(*lead, out.shape[-1]))
    return outs


def decoder_layer(
    hidden_BLD: jax.Array,
    layer: dict[str, Any],
    adapter: dict[str, Any],
    config: ModelConfig,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One block: attention, then the gated MLP, each on a normed input with a residual.

    Args:
      layer: this layer's slice of ``params["layers"]``; ``adapter`` likewise, ``{}`` for none.
      attend: maps rotated (q_BLHC, k_BLGC, v_BLGC) to (out_BLHC, anything); the second value is
        returned unchanged, so that a cache can pass through.
    """
    num_batch, length, _ = hidden_BLD.shape
    attention_key, mlp_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    block, updates = layer["attention"], adapter.get("attention", {})
    x_BLD = rms_norm(hidden_BLD, layer["input_norm"]["scale"], config.norm_eps)
    three = ("q_proj", "k_proj", "v_proj")
    q_BLHC, k_BLGC, v_BLGC = (
        out.reshape(num_batch, length, -1, config.head_dim)
        for out in _linear(x_BLD, block, updates, three, config.lora, attention_key)
    )
    if config.qk_norm:
        q_BLHC = rms_norm(q_BLHC, block["q_norm"]["scale"], config.norm_eps)
        k_BLGC = rms_norm(k_BLGC, block["k_norm"]["scale"], config.norm_eps)
    out_BLHC, extra = attend(rotate(q_BLHC, *cos_sin), rotate(k_BLGC, *cos_sin), v_BLGC)
    mixed = out_BLHC.reshape(num_batch, length, -1)
    (out_BLD,) = _linear(mixed, block, updates, ("o_proj",), config.lora, attention_key)
    hidden_BLD = hidden_BLD + checkpoint_name(out_BLD, "attention_out")

    block, updates = layer["mlp"], adapter.get("mlp", {})
    x_BLD = rms_norm(hidden_BLD, layer["post_attention_norm"]["scale"], config.norm_eps)
    both = ("gate_proj", "up_proj")
    gate_BLF, up_BLF = _linear(x_BLD, block, updates, both, config.lora, mlp_key)
    mixed = jax.nn.silu(gate_BLF) * up_BLF
    (out_BLD,) = _linear(mixed, block, updates, ("down_proj",), config.lora, mlp_key)
    return hidden_BLD + checkpoint_name(out_BLD, "mlp_out"), extra


def check_adapter(adapter: Adapter | None, config: ModelConfig) -> dict[str, Any]:
    """The adapter's stacked layers, or ``{}`` without an adapter.

    Raises:
      ValueError: there is an adapter but no ``config.lora``, which holds its scale.
    """
    if adapter is None:
        return {}
    if config.lora is None:
        raise ValueError("An adapter needs a model config with lora set (its alpha and rank).")
    return adapter["layers"]


def embed(params: Params, tokens_BL: jax.Array) -> jax.Array:
    """hidden_BLD of the tokens; an id outside the vocabulary gives NaN, not some other row."""
    return jnp.take(params["embed"]["embedding"], tokens_BL, axis=0, mode="fill")


def sliding_flags(config: ModelConfig) -> jax.Array:
    """bool [N]: which layers use the sliding window."""
    return jnp.array([n in config.sliding_layers for n in range(config.num_layers)])


def layer_mask(
    full_BLS: jax.Array | None, windowed_BLS: jax.Array | None, flag: jax.Array, config: ModelConfig
) -> jax.Array | None:
    """The mask of one scanned layer; ``flag`` says whether it uses the sliding window."""
    if windowed_BLS is None:
        return full_BLS
    if len(config.sliding_layers) == config.num_layers:
        return windowed_BLS
    if full_BLS is None:
        return windowed_BLS | ~flag
    return jnp.where(flag, windowed_BLS, full_BLS)


def hidden_states(
    params: Params,
    adapter: Adapter | None,
    tokens_BL: jax.Array,
    *,
    config: ModelConfig,
    positions_BL: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    prefix_B: jax.Array | None = None,
    remat: str = "none",
    dropout_key: jax.Array | None = None,
    attention: Backend = "auto",
) -> jax.Array:
    """``hidden_BLD`` after the last layer and the final norm, in the parameters' dtype.

    Args:
      params: see ``params.py``; adapter: see ``lora.py``, or None for the bare base.
      tokens_BL: int32 token ids.
      positions_BL: rotary positions; default: 0 to L-1 in each row. For packed or left-padded rows
        pass positions that start at 0 in each segment and rise by one with the index.
      segment_ids_BL: 0 for padding; a token sees the tokens of the same positive id at earlier
        indices of the row. By default a row is one segment.
      prefix_B: with segments, the number of first tokens of a row that all of its segments see.
      remat: a name of ``REMAT_POLICIES``.
      dropout_key: switches LoRA dropout on. Omit it wherever log-probs serve as a reference.
      attention: ``auto``, ``xla``, ``cudnn`` (GPU, bfloat16) or ``splash`` (TPU, bfloat16; see
        ``choose_backend``). Splash attention does not support ``prefix_B``, models in which only
        some layers slide, or a window over given positions without segments. In these cases
        ``auto`` takes ``xla``.

    Raises:
      ValueError: shapes that do not fit, an unknown remat or attention name, an attention backend
        that cannot run here, an adapter without ``config.lora``.
      UserError: rows longer than dynamic rope scaling is defined for.
    """
    if tokens_BL.ndim != 2:
        raise ValueError(f"tokens_BL must have two axes, got shape {tokens_BL.shape}.")
    for name, array in (("positions_BL", positions_BL), ("segment_ids_BL", segment_ids_BL)):
        if array is not None and array.shape != tokens_BL.shape:
            raise ValueError(f"{name} has shape {array.shape}, tokens_BL {tokens_BL.shape}.")
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}.")
    adapter_layers = check_adapter(adapter, config)
    length = tokens_BL.shape[1]
    check_length(config, length)
    plain = positions_BL is None
    if positions_BL is None:
        positions_BL = jnp.arange(length, dtype=jnp.int32)[None, :]
    cos_sin = rotation(config, positions_BL)

    hidden_BLD = constrain_rows(embed(params, tokens_BL))
    sliding = len(config.sliding_layers)
    all_slide = 0 < sliding == config.num_layers
    # Within a segment, distances between positions equal distances between indices.
    by_index = all_slide and (plain or segment_ids_BL is not None)
    backend: Any = choose_backend(
        attention,
        hidden_BLD,
        config.head_dim,
        config.num_kv_heads,
        whole_rows=prefix_B is None and (not sliding or by_index),
    )
    full, windowed, segments, window = None, None, None, None
    if backend == "splash":
        segments = segment_ids_BL
        window = config.sliding_window if sliding else None
    else:
        # Build the mask once, not in every layer.
        full = None if segment_ids_BL is None else segment_mask(segment_ids_BL, prefix_B)
        if sliding and plain and all_slide:
            window = config.sliding_window  # by index, so a flash kernel can skip blocks
        elif sliding:
            assert config.sliding_window is not None  # ModelConfig checked it
            windowed = window_mask(positions_BL, positions_BL, config.sliding_window)
            windowed = windowed if full is None else full & windowed

    def body(hidden_BLD: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        index, flag, layer, updates = xs
        mask = layer_mask(full, windowed, flag, config)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return grouped_attention(
                q,
                k,
                v,
                mask_BLS=mask,
                segment_ids_BL=segments,
                causal=True,
                window=window,
                backend=backend,
            ), None

        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        hidden_BLD, _ = decoder_layer(hidden_BLD, layer, updates, config, cos_sin, attend, key)
        return constrain_rows(hidden_BLD), None

    # Inside a scan XLA cannot merge the two computations, so no barrier is needed.
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    xs = (jnp.arange(config.num_layers), sliding_flags(config), params["layers"], adapter_layers)
    hidden_BLD, _ = jax.lax.scan(body, hidden_BLD, xs)
    return rms_norm(hidden_BLD, params["final_norm"]["scale"], config.norm_eps)


def batch_hidden_states(
    params: Params,
    adapter: Adapter | None,
    batch: TokenBatch,
    *,
    config: ModelConfig,
    **options: Any,
) -> jax.Array:
    """``hidden_states`` of a batch of rows, packed or not.

    Rows that can hold only one example start with it, so causality already hides the padding and no
    mask is needed. Flash kernels and the skipping of blocks rely on such masks by index. Hidden
    states of padding are meaningless.
    """
    packed = batch.example_mask_BS.shape[1] > 1
    return hidden_states(
        params,
        adapter,
        batch.tokens_BL,
        config=config,
        positions_BL=batch.positions_BL if packed else None,
        segment_ids_BL=batch.segment_ids_BL if packed else None,
        prefix_B=batch.prefix_B,
        **options,
    )


def unembed(params: Params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """float32 logits ``[..., V]`` of normed hidden states ``[..., D]``.

    Tied embeddings are used as they are, unless ``lm_head`` holds a transposed copy.
    """
    options: dict[str, Any] = {
        "precision": dot_precision(hidden.dtype),
        "preferred_element_type": jnp.float32,
    }
    rows = hidden.reshape(-1, hidden.shape[-1])  # as in ``_linear``
    if config.tie_embeddings and "lm_head" not in params:
        logits = jnp.einsum("md,vd->mv", rows, params["embed"]["embedding"], **options)
    else:
        logits = jnp.einsum("md,dv->mv", rows, params["lm_head"]["kernel"], **options)
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def forward(
    params: Params,
    adapter: Adapter | None,
    tokens_BL: jax.Array,
    *,
    config: ModelConfig,
    **options: Any,
) -> jax.Array:
    """float32 ``logits_BLV``: ``unembed`` of ``hidden_states``, with the same options."""
    hidden_BLD = hidden_states(params, adapter, tokens_BL, config=config, **options)
    return unembed(params, hidden_BLD, config=config)
