"""Finds out from environment variables how the processes of a run were started.

They may be started by SLURM, Open MPI, Kubernetes or a user. This module uses only the standard
library, because it runs before jax is imported. On Cloud TPU jax asks the machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from proxykd_jax.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_INDEX = (
    "PROXYKD_COORDINATOR",
    "PROXYKD_NUM_PROCESSES",
    "PROXYKD_PROCESS_INDEX",
)
# Set in an Indexed Job: the index of the pod.
_JOB_INDEX = "JOB_COMPLETION_INDEX"
# A job's port follows from its number, so that two jobs on a machine do not collide.
_FIRST_PORT, _NUM_PORTS = 61440, 4096
_HOW_TO = (
    f"To start processes by hand set {COORDINATOR}=HOST:PORT (of process 0), "
    f"{NUM_PROCESSES} and {PROCESS_INDEX} for each."
)


@dataclass(frozen=True)
class Launch:
    """One process among several.

    Attributes:
      by: what started the process, for messages.
      coordinator: ``host:port`` of process 0; None: jax asks the machine (Cloud TPU).
      count, index: the number of processes and the index of this one; None: jax asks the machine.
      local_devices: the machine's devices that belong to this process; None for all visible ones.
    """

    by: str
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: tuple[int, ...] | None = None


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process belongs to a group of processes; None for a single process.

    Our own variables come first, then those of SLURM, Open MPI and Cloud TPU.

    Raises:
      UserError: variables are missing or make no sense.
    """
    for find in (_by_hand, _by_slurm, _by_mpi):
        launch = find(environment)
        if launch is not None:
            return launch if launch.count != 1 else None
    return Launch("Cloud TPU") if _on_tpu_machine(environment) else None


def _by_hand(environment: Mapping[str, str]) -> Launch | None:
    if NUM_PROCESSES not in environment:
        if PROCESS_INDEX in environment:
            raise UserError(f"{PROCESS_INDEX} is set, but {NUM_PROCESSES} is not. {_HOW_TO}")
        return None
    index_name = PROCESS_INDEX if PROCESS_INDEX in environment else _JOB_INDEX
    count = _number(environment, NUM_PROCESSES, least=1)
    if count == 1:
        return Launch("hand", count=1)
    for name in (COORDINATOR, index_name):
        if name not in environment:
            missing = PROCESS_INDEX if name == _JOB_INDEX else name
            raise UserError(f"{NUM_PROCESSES} is {count}, but {missing} is not set. {_HOW_TO}")
    return _launch("hand", environment[COORDINATOR], count, _number(environment, index_name))


def _by_slurm(environment: Mapping[str, str]) -> Launch | None:
    # These variables belong to a step; the batch script itself is not one of the tasks.
    if "SLURM_STEP_NUM_TASKS" not in environment or "SLURM_PROCID" not in environment:
        return None
    count = _number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    if count == 1:
        return Launch("SLURM", count=1)
    job = _number(environment, "SLURM_JOB_ID")
    coordinator = environment.get(COORDINATOR) or (
        f"{first_host(_text(environment, 'SLURM_STEP_NODELIST'))}:{_port(job)}"
    )
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", least=1)
    return _launch(
        "SLURM",
        coordinator,
        count,
        _number(environment, "SLURM_PROCID"),
        _local_devices(environment, count > nodes, "SLURM_LOCALID"),
    )


def _by_mpi(environment: Mapping[str, str]) -> Launch | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    count = _number(environment, "OMPI_COMM_WORLD_SIZE", least=1)
    if count == 1:
        return Launch("Open MPI", count=1)
    coordinator = environment.get(COORDINATOR)
    if coordinator is None:
        # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911;tcp6://[fd00::2]:60995 is the address of
        # mpirun, which runs on the machine of process 0.
        uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
        found = re.match(r"(\d+)\..*?;(?:tcp://([^,:;]+)|tcp6://\[([^,\]]+))", uri)
        if found is None:
            raise UserError(
                f"This release of Open MPI does not say where process 0 is. Set {COORDINATOR}="
                f"HOST:PORT on every process: mpirun -x {COORDINATOR}=HOST:PORT ..."
            )
        # Open MPI's job numbers are multiples of 4096.
        coordinator = f"{found[2] or f'[{found[3]}]'}:{_port(int(found[1]) // _NUM_PORTS)}"
    several = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", least=1) > 1
    return _launch(
        "Open MPI",
        coordinator,
        count,
        _number(environment, "OMPI_COMM_WORLD_RANK"),
        _local_devices(environment, several, "OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def _on_tpu_machine(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    there = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    return there and importlib.util.find_spec("libtpu") is not None


def first_host(nodes: str) -> str:
    """The first host in a SLURM node list such as ``gpu[007-015,020],login1``."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node.")
    return found[1] + (found[2] or "")


def _local_devices(
    environment: Mapping[str, str], several: bool, local_index: str
) -> tuple[int, ...] | None:
    """One device for each of a machine's processes, unless the launcher has assigned them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    dealt_out = bool(visible) and "," not in visible
    if not several or dealt_out or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return (_number(environment, local_index),)


def _launch(
    by: str,
    coordinator: str,
    count: int,
    index: int,
    local_devices: tuple[int, ...] | None = None,
) -> Launch:
    if not re.fullmatch(r"([^\s:;,/\[\]]+|\[[\da-fA-F:.]+\]):\d{1,5}", coordinator):
        raise UserError(f"{COORDINATOR} is {coordinator!r}; it must be HOST:PORT. {_HOW_TO}")
    if index >= count:
        raise UserError(
            f"This is process {index} of {count}, but they are numbered from 0 to {count - 1}. "
            f"{_HOW_TO}"
        )
    return Launch(by, coordinator, count, index, local_devices)


def _port(job: int) -> int:
    return _FIRST_PORT + job % _NUM_PORTS


def _number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = _text(environment, name)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}; it must be a number from {least} on. {_HOW_TO}")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(f"{name} is not set. {_HOW_TO}")
    return environment[name]
