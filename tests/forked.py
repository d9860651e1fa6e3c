"""Starts commands as forks of a process that has already imported what they import.

A command takes five CPU-seconds to import TensorFlow, Orbax and transformers. A test that starts
forty commands uses a ``Forks``, which imports them once. Nothing has used jax before a fork, so a
command starts its devices itself, as in a process of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTED = (
    "jax",
    "tensorflow",
    "orbax.checkpoint",
    "transformers.models.auto.tokenization_auto",
    "proxykd_jax.run",
    "proxykd_jax.prepare",
    "proxykd_jax.align",
    "proxykd_jax.score",
    "proxykd_jax.distill",
    "proxykd_jax.evaluate",
    "proxykd_jax.report",
)


class Forks:
    """A process that forks at request.

    Args:
      environment: of the process and its forks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=REPOSITORY,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the process, whose forks must have ended."""
        self._process.communicate()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        output: Path,
        environment: Mapping[str, str] | None = None,
        first: str = "",
    ) -> Fork:
        """Starts ``python -m module arguments`` in a fork.

        Args:
          module, arguments: the command.
          cwd: where it runs.
          output: file to which it appends what it prints.
          environment: variables that it has in addition. jax has read its own variables already.
          first: code that the fork runs before the command.
        """
        request = {
            "module": module,
            "arguments": list(arguments),
            "cwd": str(cwd),
            "output": str(output),
            "environment": dict(environment or {}),
            "first": first,
        }
        return Fork(self, self.ask({"start": request}))

    def ask(self, request: Any) -> Any:
        """The process's answer to a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class Fork:
    """A command that was started; its methods are those of ``subprocess.Popen``."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self._forks.ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve() -> dict[str, Any]:
    """Answers requests until there are no more, and returns only in a fork: its request."""
    for name in IMPORTED:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        ((kind, value),) = json.loads(line).items()
        if kind == "start":
            sys.stdout.flush()
            answer: int | None = os.fork()
            if answer == 0:
                return value
        else:
            pid, status = os.waitpid(value, os.WNOHANG if kind == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)
    sys.exit()


def run(request: dict[str, Any]) -> None:
    """Does in a fork what ``python -m`` does."""
    with open(os.devnull, "rb") as nothing, open(request["output"], "ab") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(request["cwd"])
    os.environ |= request["environment"]
    exec(request["first"], {})
    sys.argv = [request["module"], *request["arguments"]]
    sys.modules.pop(request["module"], None)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run(serve())
