"""The decoder of the Llama family as plain functions: Llama 1 to 3, Mistral, Qwen 2 to 3.

``forward(params, adapter, tokens_BL, config=...)``: parameters are nested dicts whose layers are
stacked and scanned (``params.py``). The adapter is a separate tree or ``None`` (``lora.py``). The
config is static under jit. This module collects the names that other rooms use from ``params.py``,
``decoder.py`` (whole rows), ``cache.py`` (generation) and ``chunked.py`` (the vocabulary in
pieces).
"""

from proxykd_jax.models.cache import KVCache, forward_cached, init_cache, unstack_layers
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
    "map_positions",
    "param_shapes",
    "unembed",
    "unstack_layers",
]
