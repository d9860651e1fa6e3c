"""Progress of a stage on stderr: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from proxykd_jax.peers import is_first

_LINE_EVERY_S = 10.0
_SHOWN = ("loss", "nll", "preference", "weighted_kl", "weighted_cross_entropy", "reward_accuracy")


class Console:
    """Shows the steps of each phase; of several processes, only the first prints."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: Any = None
        self._phase = ""
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Prints a line."""
        if not is_first():
            return
        if self._bar is not None:
            self._bar.write(f"{self._stage}: {text}", file=sys.stderr)
        else:
            print(f"{self._stage}: {text}", file=sys.stderr, flush=True)

    def step(self, phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """Shows that step ``done`` of the ``total`` steps of a phase was taken."""
        if not is_first():
            return
        shown = {name: f"{values[name]:.4g}" for name in _SHOWN if name in values}
        if sys.stderr.isatty():
            from tqdm import tqdm

            if self._bar is None or phase != self._phase:
                self.close()
                # ``initial`` excludes the steps before a checkpoint from the shown speed.
                name = f"{self._stage} {phase}"
                self._bar = tqdm(total=total, desc=name, unit="step", initial=done)
            self._bar.n = done
            self._bar.set_postfix(shown)
        elif done == total or done == 1 or time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(f"{phase} {done}/{total} " + " ".join(f"{k} {v}" for k, v in shown.items()))
        self._phase = phase

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
