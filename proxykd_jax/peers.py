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

    def get(self, key: str) -> str:
        """The text of a key; waits for it, for hours if need be."""

    def stop_agreed(self, boundary: int) -> bool:
        """Whether all processes agreed to stop at this boundary; counts up from 0, no gaps."""


@dataclass
class _Team:
    index: int = 0
    count: int = 1
    channel: Channel | None = None
    calls: int = 0
    boundaries: int = 0
    telling: bool = False  # process 0, inside of on_first
    term_received: bool = False
    saves_on_stop: bool = False
    stopping: bool = False  # agreed, and true from then on


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
    """
    team = _team
    if team.channel is None or team.telling:
        return make()
    key = f"call/{team.calls}"
    team.calls += 1
    if team.index:
        told = json.loads(team.channel.get(key))
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]
    team.telling = True
    try:
        text = json.dumps({"value": make()}, allow_nan=True)
    except UserError as error:
        team.channel.put(key, json.dumps({"error": str(error)}))
        raise
    finally:
        team.telling = False
    team.channel.put(key, text)
    value: Value = json.loads(text)["value"]
    return value


def stop_wanted() -> bool:
    """Whether all processes stop here, because one was asked to: the same answer on each.

    To be asked wherever a run can be left with nothing lost: after a step, after a part.
    """
    if _team.channel is None:
        return _team.term_received
    if not _team.stopping:
        _team.stopping = _team.channel.stop_agreed(_team.boundaries)
        _team.boundaries += 1
    return _team.stopping


def stop_if_wanted() -> None:
    """Raises Stopped where all that was made is on disk already."""
    if stop_wanted():
        raise Stopped(STOPPED)


class saves_on_stop:  # noqa: N801 (a context manager, read like a word)
    """Inside of it a single process that is told to stop waits for the next ``stop_wanted``.

    Elsewhere it stops at once: what is half made is made anew.
    """

    def __enter__(self) -> None:
        _team.saves_on_stop = True

    def __exit__(self, *_: object) -> None:
        _team.saves_on_stop = False


class sigterm_stops:  # noqa: N801
    """Inside of it SIGTERM ends a single process as ``Stopped``, with a checkpoint.

    Several processes agree by their channel, which listens for the signal itself. Outside of the
    main thread, where Python handles no signals, it does nothing.
    """

    def __enter__(self) -> None:
        self._before: signal._HANDLER | None = None
        _team.term_received = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _on_term)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _on_term(number: int, frame: FrameType | None) -> None:
    _team.term_received = True
    if not _team.saves_on_stop:
        raise Stopped(STOPPED)
