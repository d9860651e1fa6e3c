"""Runs that are killed: a process kills itself at a chosen call, or is killed from outside.

The environment variable ``KILL_AT`` lists calls as ``kind|pattern``, separated by ``;``. The
process waits for them in this order and sends itself SIGKILL at the last one:

    rename    before a file or folder gets a matching name; a file is cut in half first, as if the
              kill had come while it was written
    renamed   after it got the name
    unlink    before a file of that name is removed

``RENAME_TAKES_S`` simulates a slow disk: each rename first waits for this many seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.forked import REPOSITORY, Fork, Forks

# Orbax needs about 50 ms for the smallest checkpoint.
LOOK_EVERY_S = 0.005

HOOK = """
import os, re, signal, sys, time

# A user's environment has no PyTorch; transformers would take seconds to import it.
sys.modules["torch"] = None
slow = float(os.environ.get("RENAME_TAKES_S", "0"))
waiting = [step.split("|") for step in filter(None, os.environ.get("KILL_AT", "").split(";"))]

def reached(kind, path):
    if not waiting or waiting[0][0] != kind or not re.search(waiting[0][1], os.fspath(path)):
        return False
    waiting.pop(0)
    return not waiting

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def renaming(call):
    def rename(source, target, **options):
        time.sleep(slow)
        if reached("rename", target):
            if os.path.isfile(source):
                os.truncate(source, os.path.getsize(source) // 2)
            die()
        call(source, target, **options)
        if reached("renamed", target):
            die()
    return rename

def removing(call):
    def remove(path, **options):
        if reached("unlink", os.path.basename(path)):
            die()
        call(path, **options)
    return remove

if waiting or slow:
    os.rename, os.replace = renaming(os.rename), renaming(os.replace)
    os.unlink, os.remove = removing(os.unlink), removing(os.remove)
"""


class Runner:
    """Starts one command repeatedly, and kills it.

    A process that is killed is a fork (``tests/forked.py``), unless it has variables other than the
    hook's. One that runs to its end is a process of its own.

    Args:
      module, arguments: the command, the same each time.
      folder: folder of the hook, the output and, if they have no place yet, Python's compiled
        modules; runners may share it.
      environment: variables in addition to this process's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        self._module, self._arguments = module, list(arguments)
        self._output = folder / "output.txt"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "TF_ENABLE_ONEDNN_OPTS": "0",
            **environment,
        }
        self._environment.setdefault("PYTHONPYCACHEPREFIX", str(folder / "modules"))
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._forks: Forks | None = None

    def close(self) -> None:
        """Ends the process that forks."""
        if self._forks is not None:
            self._forks.close()

    def finish(self) -> None:
        """Runs the command to its end."""
        code = self._alone().wait()
        assert code == 0, f"exit code {code}\n{self._last_output()}"

    def dies_at(self, calls: str) -> None:
        """Runs the command until it kills itself at ``calls``."""
        code = self._start(KILL_AT=calls).wait()
        assert code == -signal.SIGKILL, f"{calls}: exit code {code}\n{self._last_output()}"

    def killed_when(
        self, seen: Callable[[], bool], delay_s: float = 0.0, **environment: str
    ) -> bool:
        """Runs the command and kills it ``delay_s`` seconds after ``seen`` returns True.

        Returns:
          False if ``environment`` has a ``KILL_AT`` and the process killed itself there first.
        """
        process = self._start(**environment)
        while process.poll() is None and not seen():
            time.sleep(LOOK_EVERY_S)
        time.sleep(delay_s)
        ours = process.poll() is None
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert code == -signal.SIGKILL, f"exit code {code} before a kill\n{self._last_output()}"
        return ours

    def _start(self, **environment: str) -> Fork | subprocess.Popen[bytes]:
        if environment.keys() - {"KILL_AT", "RENAME_TAKES_S"}:
            return self._alone(**environment)
        if self._forks is None:
            self._forks = Forks(self._environment)
        return self._forks.start(
            self._module,
            self._arguments,
            cwd=REPOSITORY,
            output=self._output,
            environment=environment,
            first=HOOK,
        )

    def _alone(self, **environment: str) -> subprocess.Popen[bytes]:
        with open(self._output, "ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", self._module, *self._arguments],
                cwd=REPOSITORY,
                env={**self._environment, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def _last_output(self) -> str:
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-40:])
