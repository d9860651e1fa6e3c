"""The processes of one run: which of them this is, and how they agree. Standard library alone.

A run is one process, or several that compute on one mesh and share one file system. Then process
0 alone writes and speaks, and whatever the others could see otherwise or too early (a folder's
content, a manifest that was just written) it tells them: ``on_first``. All processes come to the
same calls in the same order. ``parallel.processes`` starts them; until it does, there is one.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from proxykd_jax.errors import Stopped, UserError

Value = TypeVar("Value")

STOPPED = "stopped as asked (SIGTERM), with everything saved; the same command goes on from there"


class Channel(Protocol):
    """What processes tell each other by."""

    def put(self, key: str, text: str) -> None:
        """Publishes a text under a new key."""

    def get(self, key: str, meanwhile: Callable[[], None]) -> str:
        """The text of a key; waits for it, for hours if need be, calling ``meanwhile`` at times."""

    def any_under(self, key: str) -> bool:
        """Whether there is a key that begins with this one and a slash."""


@dataclass
class _Team:
    index: int = 0
    count: int = 1
    channel: Channel | None = None
    calls: int = 0
    boundaries: int = 0
    telling: bool = False  # process 0, inside of on_first
    term_received: bool = False
    term_told: bool = False
    saves_on_stop: bool = False


_team = _Team()


def join(index: int, count: int, channel: Channel) -> None:
    """This process is one of several from now on."""
    _team.index, _team.count, _team.channel = index, count, channel


def leave() -> None:
    """This process is the only one again."""
    global _team
    _team = _Team()


def index() -> int:
    """The number of this process, from 0."""
    return _team.index


def count() -> int:
    """How many processes there are."""
    return _team.count


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _team.index == 0


def say(text: str) -> None:
    """A line for a person (stderr), once and not from every process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def on_first(make: Callable[[], Value]) -> Value:
    """Runs ``make`` on process 0 and gives all processes what it returned.

    The others wait, so what ``make`` wrote is there afterwards. Calls inside of ``make`` are its
    own business.

    Args:
      make: returns a JSON value (with several processes lists come back for tuples).

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
    """Whether all processes stop here, because one was asked to: the same answer on each.

    To be asked wherever a run can be left with nothing lost: after a step, after a part. Process 0
    decides, of itself or as asked by another, and the others wait for its word, about 1 ms.
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
    """On process 0: whether any process was told to stop."""
    channel = _team.channel
    return _team.term_received or (channel is not None and channel.any_under("term"))


def _tell_term() -> None:
    """Tells process 0, once, that this one was told to stop."""
    team = _team
    if team.channel is not None and team.term_received and not team.term_told:
        team.term_told = True
        team.channel.put(f"term/{team.index}", "")


def stop_if_wanted() -> None:
    """Raises Stopped where all that was made is on disk already."""
    if stop_wanted():
        raise Stopped(STOPPED)


class saves_on_stop:  # noqa: N801 (a context manager, read like a word)
    """Inside of it a process that is told to stop goes on to the next ``stop_wanted``.

    Elsewhere a single process stops at once, and so does process 0 while the others wait for it:
    what is half made is made anew.
    """

    def __enter__(self) -> None:
        _team.saves_on_stop = True

    def __exit__(self, *_: object) -> None:
        _team.saves_on_stop = False


class sigterm_stops:  # noqa: N801
    """Inside of it SIGTERM ends the run as ``Stopped``, with a checkpoint.

    So does SIGUSR1: mpirun passes that on, and kills a second after SIGTERM. Outside of the main
    thread, where Python handles no signals, it does nothing.
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
