"""One table from parameter names to PartitionSpecs.

Kernels are split along ``fsdp`` on the side of the residual stream, and along ``tensor`` on the
side of heads or hidden units. A factor of an adapter has only one of these sides, so ``fsdp`` also
splits heads and hidden units where it divides them; the rank is never split. Optimizer moments have
the name of their parameter, so the same lines apply. A name that matches no line is an error,
because replicating a large array silently would be noticed too late.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from proxykd_jax.errors import UserError
from proxykd_jax.parallel.mesh import AXES

_WIDE = r"(q_proj|k_proj|v_proj|gate_proj|up_proj)"
_BACK = r"(o_proj|down_proj)"
TABLE: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"score_head/kernel$", P("fsdp")),
    # The codes and scales of a quantised kernel are split like the kernel.
    (rf"{_WIDE}/kernel(/codes|/scales)?$", P(None, "fsdp", "tensor")),
    (rf"{_BACK}/kernel(/codes|/scales)?$", P(None, "tensor", "fsdp")),
    (rf"{_WIDE}/bias$", P(None, "tensor")),
    (rf"{_BACK}/bias$", P(None, "fsdp")),
    (rf"{_WIDE}/a$", P(None, "fsdp", None)),
    (rf"{_WIDE}/b$", P(None, None, ("tensor", "fsdp"))),
    (rf"{_BACK}/a$", P(None, ("tensor", "fsdp"), None)),
    (rf"{_BACK}/b$", P(None, None, "fsdp")),
    (r"norm/scale$", P()),
    (r"(^|/)(count|step)$", P()),
)
ROWS = P(("data", "fsdp"))
# Keys and values [layer, row, head, slot, channel].
CACHE = P(None, ("data", "fsdp"), "tensor")


def spec_of(name: str) -> P:
    """The line of the table for a parameter, adapter factor or optimizer moment by its path.

    Raises:
      ValueError: no line of the table matches.
    """
    for pattern, spec in TABLE:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no sharding is known for {name}: add a line to parallel/sharding.py")


def sharding_of(name: str, mesh: Mesh) -> NamedSharding:
    """The sharding of one parameter by its path; ``tree_shardings`` also knows adapters."""
    return NamedSharding(mesh, spec_of(name))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays (or shapes), by the names of its leaves.

    Raises:
      UserError: an axis of the mesh does not divide an array.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _split(name, leaf.shape, mesh.shape)[0])

    return jax.tree_util.tree_map_with_path(sharding, tree)


def bytes_per_device(tree: Any, axes: Mapping[str, int]) -> int:
    """Bytes that one device holds of a tree of arrays (or shapes), by the table.

    Args:
      tree: parameters, an adapter or a training state.
      axes: sizes of the mesh's axes; missing ones are 1.

    Raises:
      UserError: an axis does not divide an array.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(
        math.prod(leaf.shape)
        * leaf.dtype.itemsize
        // _split(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, axes)[1]
        for path, leaf in leaves
    )


def _split(name: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> tuple[P, int]:
    """The PartitionSpec of an array, and the number of parts that it is split into.

    Of two axes in one place of the table, the second is left out where it does not divide.
    """
    spec: list[Any] = []
    product = 1
    for size, place in zip(shape, spec_of(name), strict=False):
        first, *rest = place if isinstance(place, tuple) else (place,)
        ways = axes.get(first, 1) if first else 1
        if size % ways:
            raise UserError(
                f"mesh: {first} = {ways} does not divide an axis of {size} of {name} "
                f"{tuple(shape)}. Choose a smaller {first}."
            )
        for axis in rest:
            if size % (ways * axes.get(axis, 1)) == 0:
                first, ways = (first, axis), ways * axes.get(axis, 1)
        spec.append(first)
        product *= ways
    return P(*spec), product


def move(tree: Any, mesh: Mesh) -> Any:
    """Moves a tree's arrays to their places on this mesh; arrays that are there already stay.

    Raises:
      UserError: an axis of the mesh does not divide an array.
    """
    return jax.device_put(tree, tree_shardings(tree, mesh))


def put_rows(batch: Any, mesh: Mesh) -> Any:
    """Places a batch that every process has in full: rows are split over ``data`` and ``fsdp``."""
    sharding = NamedSharding(mesh, ROWS)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def num_devices(x: jax.Array, *axes: str) -> int:
    """Devices along some axes (default: all) of a traced array's mesh; 1 without a mesh."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape.get(axis, 1) for axis in axes or shape)


def is_for(platform: Literal["cpu", "tpu"], x: jax.Array) -> bool:
    """Whether a program with this traced array is for CPUs, or for TPUs.

    Its mesh decides, whose devices may be only described; without a mesh, JAX's default device.
    """
    device = jax.typeof(x).sharding.mesh.abstract_device
    kind = jax.default_backend() if device is None else device.device_kind
    return kind.lower().startswith(platform)


def positions_within(elements: int, hidden_BLD: jax.Array, vocab_size: int) -> int:
    """Positions per row, at least 1, whose logits have this many elements on each device."""
    rows = hidden_BLD.shape[0] / num_devices(hidden_BLD, "data", "fsdp")
    entries = vocab_size / num_devices(hidden_BLD, "tensor")
    return max(int(elements / (rows * entries)), 1)


def constrain(x: jax.Array, spec: P, like: jax.Array | None = None) -> jax.Array:
    """Constrains a traced array to a spec, without the axes that do not divide it.

    Args:
      x: the array.
      spec: with the names of ``AXES``.
      like: an array whose mesh is used (default: x itself). Without a mesh, or with one of other
        axes, nothing is done.
    """
    mesh = jax.typeof(x if like is None else like).sharding.mesh
    if not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(spec, x.shape, mesh)))


def fitting(spec: P, shape: tuple[int, ...], mesh: Any) -> P:
    """The spec without the axes that do not divide the array."""

    def ways(axes: Any) -> int:
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        return math.prod(mesh.shape[name] for name in names)

    return P(
        *(None if size % ways(axes) else axes for size, axes in zip(shape, spec, strict=False))
    )


def constrain_rows(x: jax.Array) -> jax.Array:
    """Constrains the rows of a traced array (its first axis) to where ``put_rows`` put the batch's.

    Otherwise the compiler follows the weights' sharding: it gathers the batch, multiplies slices of
    the residual stream, and adds up the products on every device.
    """
    return constrain(x, ROWS)


def row_ways(axes: Mapping[str, int]) -> int:
    """Number of data shards: parts into which a mesh of shape ``axes`` splits a batch's rows."""
    return axes["data"] * axes["fsdp"]


def check_rows(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises UserError if a batch cannot be split evenly."""
    ways = row_ways(mesh.shape)
    if batch_size % ways:
        raise UserError(
            f"{key}: {batch_size} rows cannot be split over data x fsdp = {ways} devices. "
            f"Choose a multiple of {ways}."
        )
