"""What a frozen base in 8 or 4 bits costs in accuracy: the proxy of a run before any training.

The validation answers of a prepared run are read by the proxy as its folder has it and with its
linear layers quantised. Printed: bytes a weight of those layers, teacher-token NLL and its paired
difference with a standard error over rows, the share of tokens at which the two have the same
first choice, KL(plain || quantised) a token.

    python -m benchmarks.quantized_base --config RUN.yaml [--set key=value ...] [--rows 64]
"""

from __future__ import annotations

import argparse
import sys

import jax
import numpy as np

from benchmarks.tail_gradients import answer_logits
from proxykd_jax.config import load_config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.measures import token_mean
from proxykd_jax.losses import forward_kl_tokens, token_logps
from proxykd_jax.models.quantized import METHODS, QuantizedKernel
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model, load_for_training


def main() -> int:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.set)
        split = open_corpus(config.folder / "corpus").split("validation")
        rows = split.read(range(min(options.rows, len(split))))
        mesh = make_mesh(config.mesh)
        models = {
            name: load_for_training(
                config.proxy.model_copy(update={"quantize": name}),
                role="proxy",
                seed=config.seed,
                mesh=mesh,
            )
            for name in ("none", *METHODS)
        }
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    tokens = np.array([len(row.tokens) - row.prompt_length for row in rows])
    sums = {name: np.array([_compare(row, models, name) for row in rows]) for name in models}
    print(f"{len(rows)} answers, {tokens.sum()} tokens\n")
    print("| base | bytes a weight | NLL | more than plain | same first choice | KL |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        nll, same, kl = sums[name].T
        more, error = token_mean(nll - sums["none"][:, 0], tokens)
        print(
            f"| {name} ({config.proxy.dtype}) | {_bytes_a_weight(model):.2f} "
            f"| {token_mean(nll, tokens)[0]:.4f} | {more:+.4f} ± {error or 0:.4f} "
            f"| {token_mean(same, tokens)[0]:.4f} | {token_mean(kl, tokens)[0]:.4f} |"
        )
    return 0


def _compare(row: TokenRow, models: dict[str, Model], name: str) -> tuple[float, float, float]:
    """Sums over an answer: NLL, tokens of the same first choice, KL."""
    tokens, start = row.tokens, row.prompt_length
    plain_LV, logits_LV = (answer_logits(models[m], tokens, start) for m in ("none", name))
    return (
        -float(token_logps(logits_LV, tokens[start:]).sum()),
        float((plain_LV.argmax(-1) == logits_LV.argmax(-1)).sum()),
        float(forward_kl_tokens(plain_LV, logits_LV).sum()),
    )


def _bytes_a_weight(model: Model) -> float:
    kernels = [
        kernel
        for kernel in jax.tree.leaves(
            model.params["layers"], is_leaf=lambda x: isinstance(x, QuantizedKernel)
        )
        if len(kernel.shape) == 3
    ]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(kernels))
    return held / sum(int(np.prod(kernel.shape)) for kernel in kernels)


if __name__ == "__main__":
    sys.exit(main())
