"""Runs a function of one seed on all seeds, on all devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

SEEDS = "seeds"
CHUNK = 256  # The number of rows in a call, so that one program serves splits of every size.


def use_devices(count: int) -> None:
    """Makes the CPU count as several devices. Call it before jax is first used."""
    jax.config.update("jax_num_cpu_devices", count)


def over_seeds(function: Callable[..., Any], *, num_shared: int = 0) -> Callable[..., Any]:
    """Compiles ``function`` for arguments with a leading axis of seeds.

    The seeds are divided among the largest number of devices that divides their count. Each device
    computes its seeds one after another: nothing is communicated, and ``cond`` computes only the
    branch that a seed takes. On a CPU this is faster than a step on all seeds at once (0.9 of the
    time for the student, 0.77 for the proxy).

    Args:
      function: a traceable function of one seed.
      num_shared: the number of leading arguments that all seeds share; they have no seed axis.
    """

    def run(*args: Any) -> Any:
        num_seeds = jax.tree.leaves(args[num_shared:])[0].shape[0]
        places = range(len(args))
        specs = tuple(PartitionSpec() if i < num_shared else PartitionSpec(SEEDS) for i in places)

        def one_after_another(*args: Any) -> Any:
            shared, own = args[:num_shared], args[num_shared:]
            return jax.lax.map(lambda each: function(*shared, *each), own)

        return jax.shard_map(
            one_after_another,
            mesh=_mesh(num_seeds),
            in_specs=specs,
            out_specs=PartitionSpec(SEEDS),
            check_vma=False,
        )(*args)

    return jax.jit(run)


def _mesh(num_seeds: int) -> Mesh:
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if num_seeds % n == 0)
    return Mesh(np.array(devices[:count]), (SEEDS,))


def stack(trees: Sequence[Any]) -> Any:
    """Joins one tree of NumPy arrays per seed to a tree with a leading axis of seeds."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def filled(trees: Sequence[Any]) -> Any:
    """``stack`` of trees with different numbers of rows; each repeats its last row to the end."""
    most = max(map(_num_rows, trees))
    return _some(trees, 0, most)


def in_chunks(compute: Callable[[Any], Any], trees: Sequence[Any]) -> list[Any]:
    """Computes all rows of all seeds, ``CHUNK`` rows at a time.

    Args:
      compute: takes and returns a tree of arrays ``[S, CHUNK, ...]``.
      trees: the rows of each seed, arrays ``[N, ...]``.

    Returns:
      The tree of each seed, NumPy arrays ``[N, ...]``.
    """
    sizes = list(map(_num_rows, trees))
    pieces = [jax.tree.map(np.asarray, compute(part)) for part in _chunks(trees, max(sizes))]
    return [
        jax.tree.map(lambda *leaves, i=i, n=n: np.concatenate([x[i] for x in leaves])[:n], *pieces)
        for i, n in enumerate(sizes)
    ]


def _chunks(trees: Sequence[Any], most: int) -> Iterator[Any]:
    for start in range(0, most, CHUNK):
        yield _some(trees, start, start + CHUNK)


def _some(trees: Sequence[Any], start: int, stop: int) -> Any:
    def rows(tree: Any) -> Any:
        at = np.minimum(np.arange(start, stop), _num_rows(tree) - 1)
        return jax.tree.map(lambda x: np.asarray(x)[at], tree)

    return stack([rows(tree) for tree in trees])


def _num_rows(tree: Any) -> int:
    return int(jax.tree.leaves(tree)[0].shape[0])
