"""Exports the student (and the proxy) of a run as folders that transformers and peft load."""

from __future__ import annotations

import sys
from pathlib import Path

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config


def main(config: Config) -> Path:
    """Exports the trained models of a run; trains them first if necessary.

    Args:
      config: the config of the run.

    Returns:
      The folder ``<run>/export``. It holds ``student`` and, depending on ``export.proxy``,
      ``proxy`` or ``proxy_adapter``.

    Raises:
      UserError: as in ``distill.main``.
    """
    from proxykd_jax import distill

    # Both training stages end with their export, so running them does everything.
    distill.main(config)
    return config.folder / "export"


if __name__ == "__main__":
    sys.exit(run_command("export", main, "Export the models of a run."))
