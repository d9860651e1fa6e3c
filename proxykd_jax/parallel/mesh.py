"""The mesh: devices arranged along the axes ``data``, ``fsdp`` and ``tensor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import AxesConfig
from proxykd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)


def make_mesh(config: AxesConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices as the config says, with neighbours on the inner axes.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    # Without Auto the axes are explicit, and JAX refuses the embedding's gather.
    return jax.make_mesh(axis_sizes(config, len(devices)), AXES, axis_types=_AUTO, devices=devices)


def arrange(config: AxesConfig, devices: Sequence[Any]) -> Mesh:
    """``make_mesh`` for devices that are only described.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    sizes = axis_sizes(config, len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=_AUTO)


def axis_sizes(config: AxesConfig, count: int) -> tuple[int, int, int]:
    """Sizes of the axes for this number of devices.

    Raises:
      UserError: the product of the sizes is another number.
    """
    inner = config.fsdp * config.tensor
    data = config.data if isinstance(config.data, int) else max(count // inner, 1)
    if data * inner != count:
        raise UserError(
            f"mesh: data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = "
            f"{data * inner}, but there are {count} devices. Choose axes whose product is "
            f"{count}; data: rest takes what the others leave."
        )
    return data, config.fsdp, config.tensor
