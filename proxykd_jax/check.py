"""Checks all that a run needs on this machine, and trains nothing.

proxykd check run.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from proxykd_jax.cli import FORCE, run_command
from proxykd_jax.config import ConfigLike, as_config

SUMMARY = "Check data, models, memory, time and disk of a run; train nothing."


def main(config: ConfigLike, *, force: bool = False) -> None:
    """Prints what is right, what deserves a look, and what would stop the run.

    Args:
      config: the run, see ``as_config``.
      force: warn of a corpus that loses many rows or lacks validation rows, instead of refusing it.

    Raises:
      UserError: the run would stop, or should not start; one message lists all problems.
    """
    config = as_config(config)
    from proxykd_jax.checking import full_check

    full_check(config, force=force)


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("check", main, SUMMARY, argv, flags=FORCE)


if __name__ == "__main__":
    sys.exit(command())
