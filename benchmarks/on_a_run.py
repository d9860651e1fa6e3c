"""Shared parts of benchmarks on the models of a run: the command line, and logits of answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import exit_code
from proxykd_jax.config import Config, load_config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.models.decoder import forward
from proxykd_jax.training.model import Model

_forward = jax.jit(forward, static_argnames="config")


def validation_rows(config: Config, rows: int) -> list[TokenRow]:
    """Reads the first ``rows`` validation rows of the run's corpus.

    Raises:
      UserError: there is no corpus.
    """
    split = open_corpus(config.folder / "corpus").split("validation")
    return split.read(range(min(rows, len(split))))


def answer_logits(model: Model, row: TokenRow) -> np.ndarray:
    """float32 [R, V] logits at the positions that predict the answer.

    Rows are padded to few lengths, so that few programs are compiled.
    """
    padded = np.zeros((1, -(-len(row.tokens) // 64) * 64), np.int32)
    padded[0, : len(row.tokens)] = row.tokens
    logits = _forward(model.params, model.adapter, jnp.asarray(padded), config=model.config)
    return np.asarray(logits[0, row.prompt_length - 1 : len(row.tokens) - 1])


def run(
    name: str, description: str, show: Callable[[Config, int], None], argv: list[str] | None
) -> int:
    """Runs a benchmark's command line and returns the exit code.

    Args:
      name: the name of its module.
      description: one sentence for ``--help``.
      show: takes (config, rows) and prints what it finds.
      argv: arguments (default: the process's).
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], help="key=value over the file")
    parser.add_argument("--rows", type=int, default=64, help="number of validation rows to read")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: show(load_config(arguments.config, arguments.set), arguments.rows))
