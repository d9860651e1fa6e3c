"""The sharding table, on shapes alone; ``on_eight_devices.py`` has the arrays."""

import jax
import jax.numpy as jnp
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.parallel.sharding import bytes_per_device


@pytest.mark.parametrize(
    "axes, parts",
    [
        ({"fsdp": 4}, 4),
        ({"fsdp": 8}, 1),  # 8 does not divide 172, and the rank is never split
        ({"tensor": 2}, 2),
        ({"tensor": 2, "fsdp": 2}, 4),
        ({"tensor": 2, "fsdp": 8}, 2),
        ({"data": 4, "fsdp": 2}, 2),
    ],
)
def test_fsdp_splits_a_factor_where_it_divides(axes, parts):
    """a of a layer back to the residual stream, b of a layer from it, and their Adam moments."""
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 172, 8), (3, 8, 172)))
    for name, leaf, factor in (("down_proj", a, "a"), ("up_proj", b, "b")):
        tree = {"mu": {"layers": {"mlp": {name: {factor: leaf}}}}}
        assert bytes_per_device(tree, axes) == 3 * 172 * 8 * 4 // parts


def test_tensor_must_divide_a_factor():
    tree = {"layers": {"mlp": {"up_proj": {"b": jax.ShapeDtypeStruct((1, 8, 172), jnp.float32)}}}}
    with pytest.raises(UserError, match=r"tensor = 8 does not divide .* Choose a smaller tensor"):
        bytes_per_device(tree, {"tensor": 8, "fsdp": 2})
