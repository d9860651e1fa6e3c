"""The supervisor: a parent process that reports how the working process ended.

When another process of the run is lost, jax calls ``abort`` in this one, and no Python code can
react. So the supervisor forks the worker before jax is imported. It forwards signals to the worker,
copies the worker's stderr to its own, and waits. If the worker was aborted, the supervisor prints a
sentence and returns an exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from types import FrameType

from proxykd_jax.parallel.launchers import Launch

TRY_AGAIN = 75
# jax prints this before it aborts because of a lost process, and in no other case.
_ABORTED_FOR_PEER = b"JAX distributed service detected fatal errors"
# This call failed if the processes never connected.
_NOT_MET = b"CoordinationService/RegisterTask"
_KEPT_BYTES = 1 << 16
PEER_LOST = (
    "another process of this run has gone; the same command, on all processes, continues from the "
    "last checkpoint"
)
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def split_off_worker(launch: Launch) -> int | None:
    """Forks. The worker returns None at once, the supervisor an exit code when the worker ends.

    Args:
      launch: how the processes were started, for messages.

    Returns:
      In the supervisor: the worker's code, 75 if it was aborted because another process was lost,
      or 128 + n after signal n.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = os.getpid()
    reads, writes = os.pipe()
    # A signal that arrives now waits until there is a worker to forward it to.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    worker = os.fork()
    if worker == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.dup2(writes, 2)
        os.close(reads)
        os.close(writes)
        _die_with(supervisor)
        return None
    os.close(writes)
    tail = bytearray()
    copier = threading.Thread(target=_copy, args=(reads, tail), daemon=True)
    copier.start()

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the worker, too
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(worker, 0)
    copier.join(timeout=5)
    return exit_code(status, bytes(tail), launch)


def _copy(source: int, tail: bytearray) -> None:
    """Copies to stderr until the worker and its children close it; keeps the end."""
    while data := os.read(source, 1 << 16):
        with contextlib.suppress(OSError):
            os.write(2, data)
        tail += data
        del tail[:-_KEPT_BYTES]


def exit_code(status: int, last_words: bytes, launch: Launch) -> int:
    """The exit code for a worker's wait status; prints a sentence to stderr if it was killed.

    Args:
      status: as returned by ``os.waitpid``.
      last_words: the end of its stderr.
      launch: see ``split_off_worker``.
    """
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    if number == signal.SIGABRT and _ABORTED_FOR_PEER in last_words:
        not_met = (
            f"the {launch.count} processes ({launch.by}) did not meet in time at "
            f"{launch.coordinator}: all must be running, and this must be an address of process 0 "
            "that the others can reach, with a free port"
        )
        print(f"error: {not_met if _NOT_MET in last_words else PEER_LOST}", file=sys.stderr)
        return TRY_AGAIN
    name = signal.Signals(number).name
    hint = " (the system does so when memory runs out)" if number == signal.SIGKILL else ""
    print(f"error: the process was ended by {name}{hint}", file=sys.stderr)
    return 128 + number


def _die_with(supervisor: int) -> None:
    """Makes the worker die when the supervisor is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(128 + signal.SIGKILL)
