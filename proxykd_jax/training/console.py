"""Progress of a stage on stderr: the status line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Protocol

import jax

from proxykd_jax.peers import is_first
from proxykd_jax.status import LINE, host_memory

_LINE_EVERY_S = 10.0
_SHOWN = ("loss", "nll", "preference", "weighted_kl", "weighted_cross_entropy", "reward_accuracy")


class Report(Protocol):
    """Shows a finished part."""

    def __call__(self, done: int, total: int, tokens: int = 0, /) -> None:
        """``done`` of ``total`` parts are finished, the last one with so many tokens."""


class Console:
    """Shows the steps and parts of a stage; of several processes, only the first prints."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._last_line = 0.0
        self._steps = False  # the stage counts its steps
        self._done = 0
        self._live = is_first() and LINE.enabled
        if self._live:
            _watch_jax()

    def say(self, text: str) -> None:
        """Prints a line."""
        if is_first():
            LINE.say(f"{self._stage}: {text}")

    def begin(self, total: int, done: int = 0) -> None:
        """Tells how many units of work (steps, or parts) the stage has, and how many are done."""
        self._steps, self._done = True, done
        LINE.begin(self._stage, total, done)

    def step(
        self,
        phase: str,
        done: int,
        total: int,
        values: Mapping[str, float],
        *,
        seconds: float = 0.0,
        tokens: float = 0.0,
    ) -> None:
        """Shows that step ``done`` of the ``total`` steps of a phase was taken.

        Args:
          phase, done, total: which step.
          values: its figures.
          seconds: its time.
          tokens: number of tokens that it read.
        """
        if not is_first():
            return
        shown = " ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        self._done += 1
        if self._live:
            LINE.used(seconds)
            self._show(f"{phase} {done}/{total} {shown}", tokens / seconds if seconds else 0.0)
        elif done == total or done == 1 or time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{phase} {done}/{total} {shown}")

    def parts(
        self, what: str, *, unit: str = "parts", counts: bool = False, every_s: float = 0.0
    ) -> Report:
        """Returns what shows the parts of a loop that begins now.

        Args:
          what: what the loop does.
          unit: what is counted.
          counts: whether these are the stage's units of work.
          every_s: least seconds between two plain lines; then the last part has none.

        Returns:
          A function to be called after each part.
        """
        begun = started = self._last_line = time.monotonic()
        before = self._done

        def report(done: int, total: int, tokens: int = 0, /) -> None:
            nonlocal started
            now = time.monotonic()
            seconds, is_first_part, started = now - started, started == begun, now
            if counts:
                self._done = before + done
            if self._live:
                if counts and is_first_part:
                    LINE.skip(max(done - 1, 0) if unit == "parts" else 0)
                LINE.used(seconds)
                self._show(f"{what} {done}/{total} {unit}", tokens / max(seconds, 1e-9))
            elif not every_s or (now - self._last_line > every_s and done < total):
                self._last_line = now
                self.say(f"{what} {done}/{total} {unit}")

        return report

    def _show(self, where: str, rate: float) -> None:
        LINE.show(where, stage=self._stage, rate=rate, done=self._done if self._steps else None)

    def close(self) -> None:
        """Removes the status line."""
        LINE.clear()


@functools.cache
def _watch_jax() -> None:
    """From now on the status line shows the devices' memory, and compilations are not useful."""

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(("/backend_compile_duration", "/jaxpr_to_mlir_module_duration")):
            LINE.idle += duration_secs

    jax.monitoring.register_event_duration_secs_listener(compiled)
    LINE.memory = _memory


def _memory() -> str:
    """The memory in use on this process's first device; the host's if it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = stats.get("bytes_in_use")
    return host_memory() if used is None else f"{used / 1e9:.1f} GB on the device"
