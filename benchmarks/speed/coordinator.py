"""Starts workers, lets them prepare, compares their results, and lets them run in turns."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PREPARE_SECONDS, RUN_SECONDS = 900.0, 900.0


class WorkerFailed(Exception):  # noqa: N818 (The failure is the tool's, not this program's.)
    """A worker reported an error, or did not answer in time."""


class Worker:
    """A process of one tool, which answers each line by a line."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                cwd=REPOSITORY,
                env={**os.environ, **(environment or {})},
            )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
          WorkerFailed: the worker reports an error, ends, or takes longer than ``seconds``.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise WorkerFailed(self._last_words()) from None
        if not self._selector.select(seconds):
            raise WorkerFailed(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with code {code}: {lines[-1] if lines else 'no output'}"

    def close(self) -> None:
        """Ends the process."""
        self._selector.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


@dataclass
class Timed:
    """The measurements of one entry of a case.

    Attributes:
      described: the answer to ``prepare``.
      wall, cpu: the seconds of each repetition.
      peak_bytes: the most memory beyond that of a process that has imported its libraries.
    """

    described: dict[str, Any] = field(default_factory=dict)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def a_step(self, steps: int) -> Timed:
        """The measurements of one of so many equal steps."""
        sums = {name: self.described.get(name, 0.0) / steps for name in ("units", "flops")}
        wall, cpu = ([seconds / steps for seconds in each] for each in (self.wall, self.cpu))
        return Timed({**self.described, **sums}, wall, cpu, self.peak_bytes)


def prepare(workers: Mapping[str, Worker], tasks: Mapping[str, Any]) -> dict[str, Timed | str]:
    """Lets the workers prepare one after another, because compiling takes all cores.

    Returns:
      What each worker described, or a string that says what failed.
    """
    found: dict[str, Timed | str] = {}
    for label, worker in workers.items():
        try:
            described = worker.ask({"do": "prepare", "task": tasks[label]}, PREPARE_SECONDS)
            found[label] = Timed(described)
        except WorkerFailed as failure:
            found[label] = str(failure)
    return found


def differences(timed: Mapping[str, Timed], same: Sequence[str], tolerance: float) -> str:
    """Lists the results of the entries ``same`` that differ from those of the first; empty if none
    does."""
    labels = [label for label in same if label in timed]
    said = []
    for label in labels[1:]:
        first, other = (timed[one].described["results"] for one in (labels[0], label))
        for name, value in first.items():
            if name not in other:
                said.append(f"{label} has no {name}")
            elif not abs(other[name] - value) <= tolerance * max(abs(value), 1e-6):
                said.append(f"{name}: {labels[0]} {value:.6g}, {label} {other[name]:.6g}")
    return "; ".join(said)


def take_turns(
    workers: Mapping[str, Worker], timed: dict[str, Timed], repetitions: int
) -> dict[str, str]:
    """Runs every worker once a turn, A B C A B C, and notes what each took.

    Returns:
      The errors of the workers that failed; the later turns leave these out.
    """
    failed: dict[str, str] = {}
    for _ in range(repetitions):
        for label, worker in workers.items():
            if label not in timed or label in failed:
                continue
            try:
                answer = worker.ask({"do": "run", "times": 1}, RUN_SECONDS)
            except WorkerFailed as failure:
                failed[label] = str(failure)
                continue
            one = timed[label]
            one.wall += answer["wall"]
            one.cpu += answer["cpu"]
            beyond = answer["peak_bytes"] - one.described.get("base_bytes", 0)
            one.peak_bytes = max(one.peak_bytes, beyond)
    return failed
