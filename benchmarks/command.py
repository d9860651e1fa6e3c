"""The end of every benchmark's command line."""

from __future__ import annotations

import sys
from collections.abc import Callable

from proxykd_jax.errors import UserError


def exit_code(work: Callable[[], object]) -> int:
    """Does the work and returns the exit code: an int that it returns, else 0.

    A user's mistake becomes a sentence and code 2.
    """
    try:
        code = work()
        return code if isinstance(code, int) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
