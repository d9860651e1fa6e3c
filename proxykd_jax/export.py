"""Exports the student (and the proxy) of a run as folders that transformers and peft load."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from proxykd_jax.cli import run_command
from proxykd_jax.config import ConfigLike, as_config

SUMMARY = "Export the models of a run."


def main(config: ConfigLike) -> Path:
    """Exports the trained models of a run; trains them first if necessary.

    Args:
      config: the run, see ``as_config``.

    Returns:
      The folder ``<run>/export``. It holds ``student`` and, depending on ``export.proxy``,
      ``proxy`` or ``proxy_adapter``.

    Raises:
      UserError: as in ``distill.main``.
    """
    config = as_config(config)
    from proxykd_jax import distill

    # Both training stages end with their export, so running them does everything.
    distill.main(config)
    return config.folder / "export"


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("export", main, SUMMARY, argv)


if __name__ == "__main__":
    sys.exit(command())
