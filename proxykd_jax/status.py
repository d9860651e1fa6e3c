"""The status line: where a run is, how fast it is, and how long it still takes.

On a terminal the last line of stderr is written anew a few times a second. Elsewhere nothing is
written. Uses only the standard library.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping

_EVERY_S = 0.25
_CLEAR, _COLOUR, _PLAIN = "\r\x1b[K", "\x1b[36m", "\x1b[0m"


class StatusLine:
    """The status of this process.

    Args:
      clock: seconds, of any beginning.

    Attributes:
      memory: returns the memory in use as text; replaced by who knows of devices.
      idle: seconds of the loops that were not useful, of compilations for example; who measures
        them adds them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.memory: Callable[[], str] = host_memory
        self.idle = 0.0
        self._begun = self._last = clock()
        self._is_shown = False
        self._costs: dict[str, float] = {}
        self._stages: list[str] = []  # that began in this process
        self._total, self._first = 0, 0
        self._stage_begun = self._begun
        self._useful = 0.0

    @property
    def enabled(self) -> bool:
        """Whether stderr is a terminal."""
        return sys.stderr.isatty()

    def plan(self, costs: Mapping[str, float]) -> None:
        """Tells which stages the run has, in order, and their relative costs."""
        self._costs = dict(costs)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """A stage begins.

        Args:
          stage: its name.
          total: number of its units of work, steps for example.
          done: how many of them an earlier process did.
        """
        if stage not in self._stages:
            self._stages.append(stage)
        self._total, self._first, self._stage_begun = total, done, self._clock()

    def skip(self, count: int) -> None:
        """Says that units of the stage were done by an earlier process."""
        self._first += count

    def used(self, seconds: float) -> None:
        """Adds seconds of useful work; the idle ones among them are taken off."""
        self._useful += max(seconds - self.idle, 0.0)
        self.idle = 0.0

    def show(
        self, where: str, *, stage: str = "", rate: float = 0.0, done: int | None = None
    ) -> None:
        """Shows where the stage is, unless the line is fresh.

        Args:
          where: phase, step and figures.
          stage: its name.
          rate: tokens a second; 0 if unknown.
          done: units of the stage that are done; None if it does not count them.
        """
        now = self._clock()
        if not self.enabled or (self._is_shown and now - self._last < _EVERY_S):
            return
        self._last, self._is_shown = now, True
        parts = [f"{stage} {where}".strip(), f"{rate:,.0f} tokens/s" if rate else "", self.memory()]
        if done is not None:
            parts += self._left(stage, done, now)
        if self._useful:
            parts.append(f"{self._useful / max(now - self._begun, 1e-9):.0%} useful")
        text = " | ".join(part for part in parts if part)
        text = text[: shutil.get_terminal_size().columns - 1]
        if stage and text.startswith(stage) and "NO_COLOR" not in os.environ:
            text = f"{_COLOUR}{stage}{_PLAIN}{text[len(stage) :]}"
        print(f"{_CLEAR}{text}", end="", file=sys.stderr, flush=True)

    def _left(self, stage: str, done: int, now: float) -> list[str]:
        """How long stage and run still take if they go on as they went in this process."""
        new, left = done - self._first, self._total - done
        if new < 1 or left < 0:
            return []
        seconds = (now - self._stage_begun) / new * left
        parts = [f"{duration(seconds)} left"]
        if stage in self._costs:
            own = self._costs[stage]
            share = own * new / max(self._total - self._first, 1)
            before = sum(self._costs[name] for name in self._stages if name in self._costs) - own
            names = list(self._costs)
            after = sum(self._costs[name] for name in names[names.index(stage) + 1 :])
            work = (now - self._begun) / (before + share) if before + share else 0.0
            parts.append(f"run {duration(seconds + work * after)} left")
        return parts

    def say(self, text: str) -> None:
        """Prints a line to stderr, above the status line."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line, so that something else can be printed."""
        if self._is_shown:
            self._is_shown = False
            print(_CLEAR, end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"``, ``"3 h 05 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def host_memory() -> str:
    """The resident memory of this process, where the operating system tells it."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return ""
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"


LINE = StatusLine()
