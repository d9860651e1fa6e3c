"""Compares the gradient of a top-k KL with the full KL's, for each treatment of the tail.

Proxy and student are those of a finished run. Gradients are taken with respect to the student's
logits at each position of the validation answers. For each top_k the command prints the mean cosine
of the two gradients and the mean ratio of their lengths.

    python -m benchmarks.tail_gradients --config RUN.yaml [--set key=value ...] [--rows 64]
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_a_run import answer_logits, run, validation_rows
from proxykd_jax.config import Config
from proxykd_jax.generation.label_batch import soft_labels_of_logits
from proxykd_jax.losses import forward_kl_tokens, topk_kl_tokens, topk_logps
from proxykd_jax.losses.topk import TAILS
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import load_for_training
from proxykd_jax.training.restore import load_student

TOP_KS = (1, 3, 10, 50)
_POSITIONS = 1024  # The gradients of so many positions are taken at once.


def compare(config: Config, rows: int) -> Iterator[tuple[int, str, float, float]]:
    """Yields (top_k, tail, mean cosine, mean ratio of lengths) over the first validation rows.

    Args:
      config: of the finished run.
      rows: number of validation rows.

    Raises:
      UserError: the run's corpus or student is missing.
    """
    mesh = make_mesh(config.mesh)
    proxy = load_for_training(config.proxy, role="proxy", seed=config.seed, mesh=mesh)
    student = load_student(config, mesh)
    found = validation_rows(config, rows)
    proxy_MV, student_MV = (
        np.concatenate([answer_logits(model, row) for row in found]) for model in (proxy, student)
    )
    for top_k in (k for k in TOP_KS if k <= proxy_MV.shape[-1]):
        for tail in TAILS:
            pieces = [
                _cosines(proxy_MV[first:last], student_MV[first:last], top_k, tail)
                for first in range(0, len(proxy_MV), _POSITIONS)
                for last in [first + _POSITIONS]
            ]
            cosine, ratio = np.concatenate(pieces, axis=1).mean(axis=1)
            yield top_k, tail, float(cosine), float(ratio)


def _cosines(proxy_MV: np.ndarray, student_MV: np.ndarray, top_k: int, tail: str) -> np.ndarray:
    """[2, M], the cosine and the ratio of lengths at each position."""
    labels = soft_labels_of_logits(
        jnp.asarray(proxy_MV), jnp.zeros(len(proxy_MV), jnp.int32), top_k=top_k
    )

    def top(logits: jax.Array) -> jax.Array:
        proxy = (labels.logps_K, labels.tail_logps)
        return topk_kl_tokens(topk_logps(logits, labels.ids_K), proxy, tail=tail).sum()

    student = jnp.asarray(student_MV)
    full_MV = jax.grad(lambda logits: forward_kl_tokens(proxy_MV, logits).sum())(student)
    top_MV = jax.grad(top)(student)
    lengths = jnp.linalg.norm(full_MV, axis=-1), jnp.linalg.norm(top_MV, axis=-1)
    cosine = (full_MV * top_MV).sum(axis=-1) / jnp.maximum(lengths[0] * lengths[1], 1e-20)
    return np.stack([cosine, lengths[1] / jnp.maximum(lengths[0], 1e-20)])


def _show(config: Config, rows: int) -> None:
    for top_k, tail, cosine, ratio in compare(config, rows):
        print(f"top_k {top_k:3d}  {tail:18s} cosine {cosine:.3f}  length ratio {ratio:.2f}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    description = "Compare top-k KL gradients with the full KL's on a finished run's models."
    return run("tail_gradients", description, _show, argv)


if __name__ == "__main__":
    raise SystemExit(main())
