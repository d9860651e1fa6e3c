"""The supervisor of a worker: signals, stderr, exit codes and sentences."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
START = """
import os, signal, sys, time
from proxykd_jax.parallel.supervisor import split_off_worker
from proxykd_jax.parallel.launchers import Launch
code = split_off_worker(Launch("hand", "a:1", 2, 0))
if code is not None:
    sys.exit(code)
print("worker", os.getpid(), flush=True)
"""
FATAL = "Terminating process because the JAX distributed service detected fatal errors."


def start(worker: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


@pytest.mark.parametrize(
    ("worker", "code", "sentence"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('error: a mistake')", 1, "error: a mistake\n"),
        (f"print({FATAL!r}, file=sys.stderr); os.abort()", 75, "another process of this run has"),
        (
            f"print({FATAL!r}, 'RPC: /x.CoordinationService/RegisterTask', file=sys.stderr)\n"
            "os.abort()",
            75,
            "the 2 processes (hand) did not meet in time at a:1",
        ),
        ("os.abort()", 128 + signal.SIGABRT, "ended by SIGABRT\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL (the system does so when memory"),
    ],
)
def test_every_end_has_its_code_and_sentence(worker, code, sentence):
    process = start(worker)
    _, told = process.communicate(timeout=30)
    assert process.returncode == code
    assert sentence in told if sentence else told == ""


def test_long_output_passes_through():
    process = start("print('x' * 300_000, file=sys.stderr); sys.exit(7)")
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (7, "x" * 300_000 + "\n")


def test_sigterm_reaches_the_worker():
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    process.stdout.readline()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="a facility of Linux")
def test_a_killed_supervisor_takes_its_worker_along():
    process = start("time.sleep(60)")
    worker = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait(timeout=30)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
            if "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text():
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")
