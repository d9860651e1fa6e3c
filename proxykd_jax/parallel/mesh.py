"""The mesh: devices arranged along the axes ``data``, ``fsdp`` and ``tensor``."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from proxykd_jax.config import AxesConfig
from proxykd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: AxesConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Arranges the devices as the config says.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    inner = config.fsdp * config.tensor
    data = config.data if isinstance(config.data, int) else max(len(devices) // inner, 1)
    if data * inner != len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} = "
            f"{data * inner}, but there are {len(devices)} devices. Choose axes whose product is "
            f"{len(devices)}; data: rest takes what the others leave."
        )
    # Without Auto the axes are explicit, and the embedding's gather is refused.
    return jax.make_mesh(
        (data, config.fsdp, config.tensor),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        devices=devices,
    )
