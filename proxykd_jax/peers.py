"""The processes of one run and how they agree. Uses only the standard library.

A run is one process, or several that share one mesh and one file system. Then only process 0 writes
and prints. Whatever other processes might see differently or too early (a folder's content, a new
manifest) process 0 tells them with ``on_first``. All processes make the same calls in the same
order. ``parallel.processes`` starts them; before that there is one.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.status import LINE

Value = TypeVar("Value")

STOPPED = "stopped as asked (SIGTERM), with everything saved; the same command continues"


class Channel(Protocol):
    """Communication between processes."""

    def put(self, key: str, text: str) -> None:
        """Publishes a text under a new key."""

    def get(self, key: str, meanwhile: Callable[[], None]) -> str:
        """The text of a key; waits for it, even for hours, and calls ``meanwhile`` at times."""

    def any_under(self, key: str) -> bool:
        """Whether any key starts with this one and a slash."""


@dataclass
class _Team:
    index: int = 0
    count: int = 1
    channel: Channel | None = None
    calls: int = 0
    boundaries: int = 0
    telling: bool = False  # process 0, within on_first
    term_received: bool = False
    term_told: bool = False
    saves_on_stop: bool = False


_team = _Team()


def join(index: int, count: int, channel: Channel) -> None:
    """Makes this process one of several."""
    _team.index, _team.count, _team.channel = index, count, channel


def leave() -> None:
    """Makes this process a single one again."""
    global _team
    _team = _Team()


def index() -> int:
    """The index of this process, from 0."""
    return _team.index


def count() -> int:
    """The number of processes."""
    return _team.count


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return _team.index == 0


def say(text: str) -> None:
    """Prints a line to stderr, from process 0 only."""
    if is_first():
        LINE.say(text)


def on_first(make: Callable[[], Value]) -> Value:
    """Runs ``make`` on process 0 and returns its result on all processes.

    The others wait, so whatever ``make`` wrote exists afterwards. Nested calls within ``make`` run
    on process 0 only.

    Args:
      make: returns a JSON value (with several processes tuples become lists).

    Raises:
      UserError: ``make`` raised it; it is raised on every process.
      Stopped: likewise.
    """
    team = _team
    if team.channel is None or team.telling:
        return make()
    key = f"call/{team.calls}"
    team.calls += 1
    if team.index:
        told = json.loads(team.channel.get(key, _tell_term))
        if "stopped" in told:
            raise Stopped(told["stopped"])
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]
    team.telling = True
    try:
        text = json.dumps({"value": make()}, allow_nan=True)
    except (UserError, Stopped) as error:
        kind = "stopped" if isinstance(error, Stopped) else "error"
        team.channel.put(key, json.dumps({kind: str(error)}))
        raise
    finally:
        team.telling = False
    team.channel.put(key, text)
    value: Value = json.loads(text)["value"]
    return value


def stop_wanted() -> bool:
    """Whether all processes stop here because one was asked to; the answer is the same on each.

    Call it wherever a run can stop without losing anything: after a step, after a part. Process 0
    decides, for itself or at another's request, and the others wait for its answer (about 1 ms).
    """
    team = _team
    if team.channel is None:
        return team.term_received
    key = f"boundary/{team.boundaries}"
    team.boundaries += 1
    if team.index:
        _tell_term()
        return team.channel.get(key, _tell_term) == "stop"
    stops = stop_was_asked()
    team.channel.put(key, "stop" if stops else "go on")
    return stops


def stop_was_asked() -> bool:
    """On process 0: whether any process was asked to stop."""
    channel = _team.channel
    return _team.term_received or (channel is not None and channel.any_under("term"))


def _tell_term() -> None:
    """Tells process 0, once, that this process was asked to stop."""
    team = _team
    if team.channel is not None and team.term_received and not team.term_told:
        team.term_told = True
        team.channel.put(f"term/{team.index}", "")


def stop_if_wanted() -> None:
    """Raises Stopped if a stop was requested; call it where everything is on disk."""
    if stop_wanted():
        raise Stopped(STOPPED)


class saves_on_stop:  # noqa: N801 (a context manager, read like a word)
    """While active, a process that is asked to stop continues to the next ``stop_wanted``.

    Elsewhere a single process stops at once, and so does process 0 while the others wait for it;
    half-finished work is repeated.
    """

    def __enter__(self) -> None:
        _team.saves_on_stop = True

    def __exit__(self, *_: object) -> None:
        _team.saves_on_stop = False


class sigterm_stops:  # noqa: N801
    """While active, SIGTERM ends the run as ``Stopped``, with a checkpoint.

    So does SIGUSR1, which mpirun forwards; after SIGTERM mpirun kills within a second. Outside the
    main thread, where Python cannot handle signals, this does nothing.
    """

    def __enter__(self) -> None:
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        _team.term_received = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, _on_term)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _on_term(number: int, frame: FrameType | None) -> None:
    _team.term_received = True
    if not _team.saves_on_stop and (_team.channel is None or _team.telling):
        raise Stopped(STOPPED)
