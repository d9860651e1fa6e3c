"""Reports how many rows a long loop has done: in place on a terminal, rarely elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from proxykd_jax.status import LINE

_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.5, 30.0


class Progress:
    """``progress("rows read", 1000)`` may be called often; it writes to stderr now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
        self._last = time.monotonic()

    def __call__(self, what: str, rows: int) -> None:
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        if self._terminal:
            LINE.show(f"{rows:,} {what}")
        else:
            print(f"{rows:,} {what}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        LINE.clear()
