"""Measures what a frozen base in 8 or 4 bits costs in accuracy, on a run's untrained proxy.

The proxy reads the validation answers of a prepared run, as its folder has it and with its linear
layers quantised. The command prints the bytes a weight of those layers, the NLL of the teacher's
tokens with its paired difference and a standard error over rows, the share of tokens with the same
first choice, and KL(plain || quantised) in nats a token.

    python -m benchmarks.quantized_base --config RUN.yaml [--set key=value ...] [--rows 64]
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.on_a_run import answer_logits, run, validation_rows
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.evaluation.measures import token_mean
from proxykd_jax.losses import forward_kl_tokens, token_logps
from proxykd_jax.models.quantized import METHODS, QuantizedKernel
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model, load_for_training


@dataclass(frozen=True)
class Base:
    """The measurements of one form of the base.

    Attributes:
      bytes_a_weight: bytes a weight of the linear layers.
      tokens: ``[n]``, the number of tokens of each answer.
      nll, kl: ``[n]`` sums over an answer's tokens, nats.
      same: ``[n]``, the number of tokens whose first choice is the plain base's.
    """

    bytes_a_weight: float
    tokens: np.ndarray
    nll: np.ndarray
    same: np.ndarray
    kl: np.ndarray


def compare(config: Config, rows: int) -> dict[str, Base]:
    """Measures the plain base (``none``) and each quantised one on the first validation rows.

    Args:
      config: of the prepared run.
      rows: number of validation rows.

    Raises:
      UserError: the run's corpus or the proxy is missing.
    """
    mesh = make_mesh(config.mesh)
    found = validation_rows(config, rows)
    tokens = np.array([len(row.tokens) - row.prompt_length for row in found])
    plain: list[np.ndarray] = []
    bases = {}
    for name in ("none", *METHODS):
        section = config.proxy.model_copy(update={"quantize": name})
        model = load_for_training(section, role="proxy", seed=config.seed, mesh=mesh)
        logits = [answer_logits(model, row) for row in found]
        plain = plain or logits
        sums = zip(*map(_sums, found, plain, logits), strict=True)
        bases[name] = Base(_bytes_a_weight(model), tokens, *map(np.array, sums))
    return bases


def _sums(row: TokenRow, plain_LV: np.ndarray, logits_LV: np.ndarray) -> tuple[float, float, float]:
    """The NLL of an answer, its tokens with the same first choice, and its KL."""
    return (
        -float(token_logps(logits_LV, row.tokens[row.prompt_length :]).sum()),
        float((plain_LV.argmax(-1) == logits_LV.argmax(-1)).sum()),
        float(forward_kl_tokens(plain_LV, logits_LV).sum()),
    )


def _bytes_a_weight(model: Model) -> float:
    leaves = jax.tree.leaves(
        model.params["layers"], is_leaf=lambda x: isinstance(x, QuantizedKernel)
    )
    kernels = [leaf for leaf in leaves if len(leaf.shape) == 3]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(kernels))
    return held / sum(int(np.prod(kernel.shape)) for kernel in kernels)


def _show(config: Config, rows: int) -> None:
    bases = compare(config, rows)
    plain = bases["none"]
    print(f"{len(plain.tokens)} answers, {plain.tokens.sum()} tokens\n")
    print("| base | bytes a weight | NLL | more than plain | same first choice | KL |")
    print("|---|---|---|---|---|---|")
    for name, base in bases.items():
        more, error = token_mean(base.nll - plain.nll, base.tokens)
        nll, same, kl = (token_mean(x, base.tokens)[0] for x in (base.nll, base.same, base.kl))
        print(
            f"| {name} ({config.proxy.dtype}) | {base.bytes_a_weight:.2f} | {nll:.4f} "
            f"| {more:+.4f} ± {error or 0:.4f} | {same:.4f} | {kl:.4f} |"
        )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, which prints a Markdown table, and returns the exit code."""
    description = "Compare a prepared run's proxy with itself in 8 and 4 bits."
    return run("quantized_base", description, _show, argv)


if __name__ == "__main__":
    raise SystemExit(main())
