"""A function of one seed, run over all seeds at once and on all the devices there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

SEEDS = "seeds"


def use_devices(count: int) -> None:
    """Lets the CPU count as so many devices; before jax is used for the first time."""
    jax.config.update("jax_num_cpu_devices", count)


def over_seeds(function: Callable[..., Any], *, num_shared: int = 0) -> Callable[..., Any]:
    """Compiles ``function`` for arguments with a leading axis of seeds.

    The seeds are split over the largest number of devices that divides theirs, and each device
    takes its own one after another: nothing is communicated, a branch of one seed is not computed
    for the others, and on a CPU a step is faster than one on all seeds at once (0.9 of the time
    for the student, 0.77 for the proxy).

    Args:
      function: of one seed, traceable.
      num_shared: its first so many arguments are the same for all seeds and have no such axis.
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


def stack(trees: list[Any]) -> Any:
    """Trees of NumPy arrays, one a seed, as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def seed_of(tree: Any, index: int) -> Any:
    """One seed's part, on the host."""
    return jax.tree.map(lambda x: np.asarray(x[index]), tree)
