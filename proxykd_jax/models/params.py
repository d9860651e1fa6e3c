"""The parameter tree: its shapes, its initial values, and a student cut out of it.

A tree is nested dicts. Layers are stacked on a leading axis N and scanned. Kernels are [in, out].
Sharding tables, weight files and fingerprints refer to leaves by path
(``layers/attention/q_proj/kernel``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.quantized import Method, quantized_shapes

Params = dict[str, Any]
ParamPath = tuple[str, ...]


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer of a block."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    return {
        "q_proj": (config.model_dim, queries),
        "k_proj": (config.model_dim, keys),
        "v_proj": (config.model_dim, keys),
        "o_proj": (queries, config.model_dim),
        "gate_proj": (config.model_dim, config.ffn_dim),
        "up_proj": (config.model_dim, config.ffn_dim),
        "down_proj": (config.ffn_dim, config.model_dim),
    }


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The tree with a tuple of ints at each leaf."""
    layers, dim = config.num_layers, config.model_dim
    shapes = linear_shapes(config)

    def linear(name: str, bias: bool) -> dict[str, tuple[int, ...]]:
        leaf: dict[str, tuple[int, ...]] = {"kernel": (layers, *shapes[name])}
        if bias:
            leaf["bias"] = (layers, shapes[name][1])
        return leaf

    attention: dict[str, Any] = {
        name: linear(name, config.qkv_bias) for name in ("q_proj", "k_proj", "v_proj")
    }
    attention["o_proj"] = linear("o_proj", config.o_bias)
    if config.qk_norm:
        attention["q_norm"] = {"scale": (layers, config.head_dim)}
        attention["k_norm"] = {"scale": (layers, config.head_dim)}
    tree: dict[str, Any] = {
        "embed": {"embedding": (config.vocab_size, dim)},
        "layers": {
            "input_norm": {"scale": (layers, dim)},
            "attention": attention,
            "post_attention_norm": {"scale": (layers, dim)},
            "mlp": {
                name: linear(name, config.mlp_bias)
                for name in ("gate_proj", "up_proj", "down_proj")
            },
        },
        "final_norm": {"scale": (dim,)},
    }
    if not config.tie_embeddings:
        tree["lm_head"] = {"kernel": (dim, config.vocab_size)}
    return tree


def flatten(tree: dict[str, Any], prefix: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    """(path, leaf) pairs of nested dicts, in the order of their keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def unflatten(leaves: dict[ParamPath, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def is_linear(path: ParamPath) -> bool:
    """Whether a leaf is a kernel of a linear layer of the blocks; only these can be quantised."""
    return path[0] == "layers" and path[-1] == "kernel"


def abstract_params(
    config: ModelConfig, dtype: Any = jnp.float32, quantize: Method | None = None
) -> Params:
    """The tree of ``jax.ShapeDtypeStruct``, for sharding tables and ahead-of-time compilation.

    Args:
      config: the architecture.
      dtype: dtype of all leaves that are not quantised.
      quantize: how to quantise the linear layers of the blocks; None: not at all.
    """

    def leaf(path: ParamPath, shape: tuple[int, ...]) -> Any:
        if quantize is not None and is_linear(path):
            return quantized_shapes(shape, quantize)
        return jax.ShapeDtypeStruct(shape, dtype)

    return unflatten({path: leaf(path, shape) for path, shape in flatten(param_shapes(config))})


def init_params(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: kernels and embeddings normal with ``initializer_range``, biases 0, norms
    1, as in transformers. Drawn in float32, then cast.
    """
    leaves: dict[ParamPath, Any] = {}
    for index, (path, shape) in enumerate(flatten(param_shapes(config))):
        if path[-1] == "scale":
            leaves[path] = jnp.ones(shape, dtype)
        elif path[-1] == "bias":
            leaves[path] = jnp.zeros(shape, dtype)
        else:
            draw = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
            leaves[path] = (config.initializer_range * draw).astype(dtype)
    return unflatten(leaves)


def first_layers(
    config: ModelConfig, params: Params, num_layers: int
) -> tuple[ModelConfig, Params]:
    """A smaller model of the same vocabulary: the first ``num_layers`` layers of this one.

    Embeddings, final norm and output projection are shared with ``params``, not copied.

    Raises:
      UserError: ``num_layers`` is not in [1, the model's number of layers].
    """
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(
            f"first_layers must lie between 1 and the model's {config.num_layers} layers, "
            f"got {num_layers}."
        )
    sliding = tuple(layer for layer in config.sliding_layers if layer < num_layers)
    smaller = config.replace(
        num_layers=num_layers,
        sliding_layers=sliding,
        sliding_window=config.sliding_window if sliding else None,
    )
    layers = jax.tree.map(lambda leaf: leaf[:num_layers], params["layers"])
    return smaller, {**params, "layers": layers}
