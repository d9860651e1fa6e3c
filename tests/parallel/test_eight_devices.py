"""Starts ``on_eight_devices.py``: the number of devices is fixed when jax starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


# Eight threads share two cores with other tests, so 40 s (the default) do not mean a deadlock.
FLAGS = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def run_on_eight(choice: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " " + FLAGS
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(HERE / "on_eight_devices.py"), "-k", choice],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_data_fsdp_and_tensor_together():
    run_on_eight("2x2x2 and not qwen or there_are")


@pytest.mark.slow
def test_all_other_arrangements():
    """Llama on every mesh; families with other arrays on three, which split each axis."""
    run_on_eight("not 2x2x2 and not qwen or qwen and (2x2x2 or 1x8x1 or 1x1x8)")
