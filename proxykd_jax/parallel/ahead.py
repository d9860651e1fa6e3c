"""Compiles programs for devices that are not present, to learn their memory and communication.

A device's compiler comes as a plugin (extra ``plan``). ``prepare_process`` must run before jax is
first imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import write_json
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.collectives import count_collectives
from proxykd_jax.parallel.devices import Device, gpu_target, topology_name

# Increase it when the stored results of a compilation change.
_CACHE_VERSION = 1
# The packages of the compilers; the CUDA one must have jaxlib's version.
_CUDA, _TPU = ("jax-cuda13-plugin", "jax-cuda12-plugin"), ("libtpu",)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports about a program, for one device.

    Attributes:
      argument_bytes, output_bytes, alias_bytes, temporary_bytes: sizes. Outputs that reuse donated
        arguments are included in the first two and in the third.
      peak_bytes: most bytes alive at once, including arguments.
      refused: the compiler found that the program cannot fit (TPU); then only ``peak_bytes`` is
        set.
      collectives: bytes that a device sends or receives, by kind; None if the compiler does not
        show its program.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    refused: bool = False
    collectives: dict[str, int] | None = field(default=None)


def has_compiler(device: Device) -> bool:
    """Whether the device's own compiler is installed.

    Raises:
      UserError: it is installed, but for another version of jaxlib.
    """
    names = _CUDA if device.gpu else _TPU
    versions = {name: _version(name) for name in names}
    found = {name: version for name, version in versions.items() if version is not None}
    jaxlib = _version("jaxlib")
    if device.gpu and found and jaxlib not in found.values():
        name, version = next(iter(found.items()))
        raise UserError(
            f"{name} is {version}, but jaxlib is {jaxlib}; the compiler must be of its version: "
            f"pip install {name}=={jaxlib} {name.replace('plugin', 'pjrt')}=={jaxlib}"
        )
    return bool(found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare_process(count: int) -> None:
    """Keeps jax away from real accelerators and gives it ``count`` CPU devices.

    Raises:
      UserError: jax was imported before, so the compilers cannot be found.
    """
    if "jax" in sys.modules:
        raise UserError(
            "A plan needs a process in which jax was not imported yet: plan first, or call the "
            "command proxykd plan."
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"


def target_devices(device: Device, count: int) -> Sequence[Any]:
    """Devices to compile for: the target's, or CPUs if its compiler is missing.

    Raises:
      ValueError: no topology is known for this number of devices.
    """
    name = topology_name(device, count)
    if not has_compiler(device):
        import jax

        return jax.devices()[:count]
    from jax.experimental import topologies

    if device.gpu is not None:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=gpu_target(device), topology=name
        ).devices
    # By default the compiler assumes hosts of four chips, which a single chip cannot fill.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices


class Compiler:
    """Compiles lowered programs and caches the results on disk.

    Args:
      device: the device that they are lowered for.
      cache: folder of results; None: no cache.
    """

    def __init__(self, device: Device, cache: Path | None) -> None:
        self._device, self._cache = device, cache

    def __call__(self, lowered: Any) -> Compiled:
        """What the compiler reports about a program."""
        import jax
        import jaxlib

        versions = (_CACHE_VERSION, jax.__version__, jaxlib.__version__)
        target = (self._device, has_compiler(self._device))
        identity = f"{versions} {target} {lowered.as_text()}"
        digest = hashlib.sha256(identity.encode()).hexdigest()
        path = None if self._cache is None else self._cache / f"{digest}.json"
        if path is not None and path.exists():
            return Compiled(**json.loads(path.read_text()))
        found = compiled_program(lowered)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(found))
        return found


def compiled_program(lowered: Any) -> Compiled:
    """Compiles a lowered program for its own devices; returns what the compiler reports."""
    import jax

    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"[Uu]sed ([0-9.]+)([KMG]?) of [0-9.]+[KMG]? hbm", str(error))
        if needed is None:
            raise
        peak = int(float(needed.group(1)) * _UNITS[needed.group(2)])
        return Compiled(0, 0, 0, 0, peak, refused=True)
    memory = compiled.memory_analysis()
    try:
        collectives = count_collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        collectives = None  # some TPU compilers do not show their programs
    alias, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return Compiled(
        arguments,
        outputs,
        alias,
        temporary,
        max(memory.peak_memory_in_bytes, arguments + outputs - alias + temporary),
        collectives=collectives,
    )
