"""Checks all that a run needs on this machine, and trains nothing.

Run it as ``python -m proxykd_jax.check --config FILE``.
"""

from __future__ import annotations

import sys

from proxykd_jax.cli import FORCE, run_command
from proxykd_jax.config import Config

SUMMARY = "Check data, models, memory, time and disk of a run; train nothing."


def main(config: Config, *, force: bool = False) -> None:
    """Prints what is right, what deserves a look, and what would stop the run.

    Args:
      config: the config of the run.
      force: warn of a corpus that loses many rows or lacks validation rows, instead of refusing it.

    Raises:
      UserError: the run would stop, or should not start; one message lists all problems.
    """
    from proxykd_jax.checking import full_check

    full_check(config, force=force)


if __name__ == "__main__":
    sys.exit(run_command("check", main, SUMMARY, flags=FORCE))
