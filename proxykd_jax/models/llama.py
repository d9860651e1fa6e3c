"""The decoder of the Llama family: Llama 1 to 3, Mistral, Qwen 2 to 3, as plain functions.

``forward(params, adapter, tokens_BL, config=...)``: parameters are nested dicts with the layers
stacked and scanned (``params.py``), the adapter is a tree of its own or ``None`` (``lora.py``),
and the config is static under jit. This module gathers the names that other rooms use; they live
in ``params.py``, ``decoder.py`` (whole rows), ``cache.py`` (generation) and ``chunked.py`` (the
vocabulary in pieces).
"""

from proxykd_jax.models.cache import KVCache, forward_cached, init_cache, layers_apart
from proxykd_jax.models.chunked import map_positions
from proxykd_jax.models.decoder import (
    batch_hidden_states,
    forward,
    hidden_states,
    unembed,
)
from proxykd_jax.models.params import abstract_params, first_layers, init_params, param_shapes

__all__ = [
    "KVCache",
    "abstract_params",
    "batch_hidden_states",
    "first_layers",
    "forward",
    "forward_cached",
    "hidden_states",
    "init_cache",
    "init_params",
    "layers_apart",
    "map_positions",
    "param_shapes",
    "unembed",
]
