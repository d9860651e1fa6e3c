"""The random keys of a run: each is a function of the config's seed and of what is drawn.

No random state is kept, so a resumed run draws what an uninterrupted run draws, on any mesh and
with any number of processes.

- The order of an epoch, the slices of the rounds, and who answers a step use ``raw_bits`` of a
  ``purpose_seed``.
- A new adapter uses ``role_key``.
- LoRA dropout uses ``step_key``, then the number of the micro-batch.
- An answer uses ``row_keys``, then the position.
- Soft labels drawn at random use ``run_key``, then ``row_words`` and the position.
- An answer by a server uses ``request_seed``.
"""

from __future__ import annotations

import hashlib
import zlib

import jax
import numpy as np

# The generator is named so that a new default of JAX cannot change what a run draws.
_IMPLEMENTATION = "threefry2x32"
# Number of 32-bit words of a row's digest in its key.
ROW_WORDS = 4


def purpose_seed(seed: int, purpose: str) -> int:
    """Returns a 32-bit seed for one purpose of a run, for example ``align/round_01``."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def raw_bits(count: int, *, seed: int, index: int, purpose: int = 0) -> np.ndarray:
    """Returns uint64[count] from Philox, the same in every version of NumPy.

    Args:
      count: how many numbers.
      seed, index: the key; the index is an epoch or a step.
      purpose: number of an independent stream with the same key.
    """
    generator = np.random.Philox(
        key=np.array([seed, index], np.uint64), counter=np.array([0, 0, 0, purpose], np.uint64)
    )
    return np.asarray(generator.random_raw(count))


def run_key(seed: jax.typing.ArrayLike) -> jax.Array:
    """Returns the key of a run, which other keys are folded from."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def role_key(seed: int, role: str) -> jax.Array:
    """Returns the key of a model's new weights; ``role`` is ``proxy`` or ``student``."""
    return jax.random.fold_in(run_key(seed), zlib.crc32(role.encode()))


def step_key(seed: int, step: jax.typing.ArrayLike) -> jax.Array:
    """Returns the key of a training step; ``step`` counts the steps of the stage."""
    return jax.random.fold_in(run_key(seed), step)


def row_words(row_id: str) -> np.ndarray:
    """Returns uint32 ``[W]``, the part of a row's key that comes from its id."""
    digest = hashlib.sha256(row_id.encode()).digest()
    return np.frombuffer(digest[: 4 * ROW_WORDS], "<u4")


def row_keys(
    seed: jax.typing.ArrayLike, round_index: jax.typing.ArrayLike, row_words_BW: jax.Array
) -> jax.Array:
    """Returns the keys, ``[B]``, of the rows whose answers are drawn in a round."""
    key = jax.random.fold_in(run_key(seed), round_index)

    def fold(words_W: jax.Array) -> jax.Array:
        row_key = key
        for index in range(words_W.shape[0]):
            row_key = jax.random.fold_in(row_key, words_W[index])
        return row_key

    return jax.vmap(fold)(row_words_BW)


def request_seed(seed: int, round_index: int, row_id: str) -> int:
    """Returns a 31-bit seed of a request to a server; some servers keep it in an int32."""
    digest = hashlib.sha256(f"{seed}/{round_index}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
