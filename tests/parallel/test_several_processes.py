"""Two processes of one device each do the same as one process of two devices, despite failures.

The tests start real processes, connected by jax's coordination service and gloo.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from proxykd_jax.artifacts import read_json
from proxykd_jax.config import Config, dump_config
from tests.tiny_run import recipe
from tests.training.test_kills import contents, metrics_of

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
# One round, with enough steps to interrupt it.
CHANGES: dict[str, Any] = {
    "align": {"num_rounds": 1, "epochs_per_round": 2, "stop": {"enabled": False}},
    "distill": {"max_steps": 6},
}


LOST = "error: another process of this run has gone; the same command"


class Job:
    """One command on one or two processes.

    Args:
      config: the config of the run.
      folder: folder for the config's file and the output of the processes.
      stage: the command.
    """

    def __init__(self, config: Config, folder: Path, stage: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
        self._command = [sys.executable, "-m", f"proxykd_jax.{stage}"]
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPOSITORY),
            "TF_ENABLE_ONEDNN_OPTS": "0",
        }

    def start(self, count: int, arguments: Mapping[int, Sequence[str]] | None = None) -> Running:
        """Starts ``count`` processes that have two devices together; arguments are per process."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for index in range(count):
            environment = {**self._environment, "JAX_NUM_CPU_DEVICES": str(2 // count)}
            if count > 1:
                environment |= {
                    "PROXYKD_COORDINATOR": f"127.0.0.1:{port}",
                    "PROXYKD_NUM_PROCESSES": str(count),
                    "PROXYKD_PROCESS_INDEX": str(index),
                }
            extra = (arguments or {}).get(index, ())
            with open(self.folder / f"output_{index}.txt", "wb") as file:
                processes.append(
                    subprocess.Popen(
                        [*self._command, "--config", str(self.folder / "run.yaml"), *extra],
                        cwd=self.folder,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        return Running(processes, self.folder)


class Running:
    """Processes that were started."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
        self._processes, self._folder = processes, folder

    def said(self, index: int) -> str:
        """What a process has printed so far."""
        return (self._folder / f"output_{index}.txt").read_text(errors="replace")

    def send(self, index: int, number: int, when: Callable[[], bool]) -> None:
        """Sends a signal to a process as soon as a condition holds."""
        deadline = time.monotonic() + 120
        while not when():
            assert time.monotonic() < deadline, self.said(0)
            assert all(process.poll() is None for process in self._processes), self.said(0)
            time.sleep(0.005)
        self._processes[index].send_signal(number)

    def ends(self, *codes: int, within: float = 150) -> None:
        """Waits for all processes, which must end with these codes in time."""
        deadline = time.monotonic() + within
        try:
            for process in self._processes:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            pytest.fail(f"not over within {within} s:\n{self._all_said()}")
        finally:
            for process in self._processes:
                process.kill()
        found = [process.returncode for process in self._processes]
        assert found == list(codes), self._all_said()

    def _all_said(self) -> str:
        said = [self.said(index)[-4000:] for index in range(len(self._processes))]
        return "\n---- other process\n".join(said)


def checkpoints_of(stage: Path) -> dict[str, tuple[str, list[tuple[str, Any, bytes]]]]:
    """The progress and the arrays of each checkpoint, whatever devices saved it."""
    import orbax.checkpoint as ocp

    found = {}
    for folder in sorted((stage / "checkpoints").iterdir()):
        assert (stage / "digests" / f"{folder.name}.json").is_file()
        with ocp.PyTreeCheckpointer() as reader:
            shapes = reader.metadata(folder.resolve() / "state").item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = reader.restore(folder.resolve() / "state", restore_args=as_numpy)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found[folder.name] = (
            (folder / "progress" / "metadata").read_text(),
            [(jax.tree_util.keystr(p), (x.dtype, x.shape), x.tobytes()) for p, x in leaves],
        )
    return found


def saved(stage: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    return sorted(int(path.stem) for path in (stage / "digests").glob("[0-9]*.json"))


def assert_same(whole: Path, other: Path, stages: Sequence[str]) -> None:
    """Asserts that files, metrics and checkpoints of ``stages`` are bitwise equal."""
    ours, theirs = contents(whole), contents(other)
    if "student" not in stages:
        later = ("student", "soft_labels", "samples/fresh", "export/student")
        ours = {name: data for name, data in ours.items() if not name.startswith(later)}
    assert list(theirs) == list(ours)
    assert [name for name in ours if theirs[name] != ours[name]] == []
    expected = metrics_of(whole)
    if "student" not in stages:
        expected = [line for line in expected if line[0] == ("stage", "align")]
    assert metrics_of(other) == expected
    for stage in stages:
        expected, found = checkpoints_of(whole / stage), checkpoints_of(other / stage)
        assert len(expected) > 1 and found == expected


@pytest.fixture(scope="module")
def whole(tiny_files, tmp_path_factory) -> Config:
    """A run up to the student, by one process with two devices."""
    folder = tmp_path_factory.mktemp("whole")
    config = recipe(tiny_files, folder / "runs", CHANGES)
    Job(config, folder, "distill").start(1).ends(0)
    return config


def test_two_processes_make_the_same_files(whole, tiny_files, tmp_path):
    config = recipe(tiny_files, tmp_path / "runs", CHANGES)
    job = Job(config, tmp_path, "distill").start(2)
    job.ends(0, 0)
    assert_same(whole.folder, config.folder, ("proxy", "student"))
    # Only process 0 prints.
    assert "align: warmup" in job.said(0) and "export: student" in job.said(0)
    assert "align:" not in job.said(1) and "export:" not in job.said(1)


def test_arrays_cut_across_processes(tiny_files, tmp_path):
    change = {"align": {"alignment": "nll", "num_rounds": 1}}
    found = []
    for count in (1, 2):
        runs = tmp_path / f"runs_{count}"
        config = recipe(tiny_files, runs, change, {"mesh": {"data": 1, "tensor": 2}})
        Job(config, tmp_path / str(count), "align").start(count).ends(*[0] * count)
        found.append(config.folder)
    assert_same(*found, ("proxy",))


def test_a_run_that_is_stopped_and_killed_again_and_again(whole, tiny_files, tmp_path):
    config = recipe(tiny_files, tmp_path / "runs", CHANGES)
    job, proxy = Job(config, tmp_path, "align"), config.folder / "proxy"

    # One process gets a preemption notice. Both stop at the same step, which is saved.
    running = job.start(2)
    running.send(1, signal.SIGTERM, lambda: "round_01 1/" in running.said(0))
    running.ends(75, 75, within=60)
    assert "stopped as asked (SIGTERM)" in running.said(0)
    assert read_json(proxy / "manifest.json")["status"] == "running"
    stopped_at = saved(proxy)[-1]
    assert stopped_at > 2  # this is in the round, because the warm-up has two steps

    # If one process is killed, the other ends too, with a sentence.
    running = job.start(2)
    running.send(1, signal.SIGKILL, lambda: saved(proxy)[-1] > stopped_at)
    running.ends(75, -signal.SIGKILL, within=60)
    assert f"going on from step {stopped_at}" in running.said(0)
    assert LOST in running.said(0)
    killed_at = saved(proxy)[-1]

    # The same holds for process 0, which connects them.
    running = job.start(2)
    running.send(0, signal.SIGKILL, lambda: saved(proxy)[-1] > killed_at)
    running.ends(-signal.SIGKILL, 75, within=60)
    assert LOST in running.said(1)

    # A single process can finish the rest.
    job.start(1).ends(0)
    assert_same(whole.folder, config.folder, ("proxy",))


def test_one_process_that_is_stopped(tiny_files, tmp_path):
    # Otherwise no checkpoint is saved within the warm-up.
    change = {"align": {"warmup_epochs": 200, "checkpoint_every": 1000, "stop": {"enabled": False}}}
    config = recipe(tiny_files, tmp_path / "runs", change)
    running = Job(config, tmp_path, "align").start(1)
    running.send(0, signal.SIGTERM, lambda: "align: warmup 1/" in running.said(0))
    running.ends(75, within=60)
    assert "stopped as asked (SIGTERM)" in running.said(0)
    raw, stopped_at = saved(config.folder / "proxy")
    assert raw == 0 < stopped_at < 400
    assert list(checkpoints_of(config.folder / "proxy")) == ["0", str(stopped_at)]


def test_a_mistake_on_one_process_ends_all(tiny_files, tmp_path):
    config = recipe(tiny_files, tmp_path / "runs", CHANGES)
    running = Job(config, tmp_path, "align").start(2, {1: ["--set", "align.num_round=3"]})
    running.ends(2, 2, within=60)
    assert "num_round" in running.said(1)
    assert "error: process 1 ended" in running.said(0) and "num_round" in running.said(0)


def test_a_mistake_on_all_is_told_once(tiny_files, tmp_path):
    config = recipe(tiny_files, tmp_path / "runs", {"proxy": {"path": str(tmp_path / "absent")}})
    running = Job(config, tmp_path, "align").start(2)
    running.ends(2, 2, within=60)
    assert running.said(0).count("absent") == 1
    assert "error:" not in running.said(1)
