"""How close a model is to the teacher on held-out rows, measured from the teacher's text alone.

- ``nll``: NLL of the teacher's tokens, nats. Table 4 of the paper reports KL(teacher || proxy),
  which needs the teacher's distribution. Text alone gives only differences of it, because the
  teacher's entropy cancels in the difference of two models' NLL on the same rows.
- ``agreement``: share of the teacher's tokens that are the model's most probable ones (Fig. 5).
  Among equally probable tokens the lowest id counts, as in ``argmax`` and greedy decoding.
- ``top_mass``: share of positions whose K most probable tokens hold more than 0.95 (Fig. 4).
- ``calibration``: the model's confidence compared with its agreement
  (``evaluation/calibration.py``).
- ``kl``: exact KL(teacher || model), nats per token, if the teacher is a known process.

Axes: n rows (examples), J values of K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proxykd_jax.data.collate import Rows, collate_rows
from proxykd_jax.data.order import by_length, default_buckets
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.calibration import NUM_BINS, binned, calibration
from proxykd_jax.evaluation.exact_teacher import TeacherLogps
from proxykd_jax.models.chunked import map_positions
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.parallel.sharding import positions_within, put_rows
from proxykd_jax.training.model import Model
from proxykd_jax.types import TokenBatch

TOP_KS = (1, 5, 10, 20, 50)
MASS = 0.95
# Elements of float32 logits that exist at a time (256 MiB).
_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class RowMeasures:
    """Sums over the answer's tokens of each row, float64.

    Attributes:
      tokens: ``[n]`` tokens of each answer.
      nll: ``[n]`` nats.
      agreement: ``[n]`` tokens that are the model's most probable ones.
      top_mass: ``[n, J]`` positions where the K most probable tokens hold more than ``MASS``.
      bins: ``[n, M, 3]`` tokens, confidence and agreement by bin of the confidence.
      kl: ``[n]`` nats, or None if the teacher's distribution is unknown.
      top_ks: the J values of K.
    """

    tokens: np.ndarray
    nll: np.ndarray
    agreement: np.ndarray
    top_mass: np.ndarray
    bins: np.ndarray
    kl: np.ndarray | None
    top_ks: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """Means with standard errors over rows, ready for JSON.

        ``token_mean`` weights tokens equally, ``example_mean`` rows.
        """
        quantities = {"nll": self.nll, "agreement": self.agreement}
        if self.kl is not None:
            quantities["kl"] = self.kl
        summary: dict[str, Any] = {"n": len(self.tokens), "tokens": int(self.tokens.sum())}
        for name, sums in quantities.items():
            summary[name] = {
                **dict(zip(("token_mean", "token_se"), token_mean(sums, self.tokens), strict=True)),
                **dict(zip(("example_mean", "example_se"), mean(sums / self.tokens), strict=True)),
            }
        summary["top_mass"] = {
            str(top_k): float(self.top_mass[:, j].sum()) / float(self.tokens.sum())
            for j, top_k in enumerate(self.top_ks)
        }
        summary["calibration"] = calibration(self.bins)
        return summary

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for a file; ``from_arrays`` is the inverse."""
        arrays = {
            "tokens": self.tokens,
            "nll": self.nll,
            "agreement": self.agreement,
            "top_mass": self.top_mass,
            "bins": self.bins,
            "top_ks": np.array(self.top_ks, np.int64),
        }
        return arrays if self.kl is None else {**arrays, "kl": self.kl}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> RowMeasures:
        """The inverse of ``to_arrays``."""
        values: dict[str, Any] = {"kl": None, **arrays}
        values["top_ks"] = tuple(values["top_ks"].tolist())
        return RowMeasures(**values)


def mean(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and its standard error (None for fewer than two values)."""
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def token_mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float | None]:
    """Mean over all tokens, and its standard error with rows as the independent units.

    This is the ratio estimator: tokens of one row are not independent, and the number of tokens is
    random, too.
    """
    ratio = float(sums.sum()) / float(tokens.sum())
    num = len(tokens)
    if num < 2:
        return ratio, None
    residual = sums - ratio * tokens
    return ratio, float(np.sqrt(num / (num - 1) * np.square(residual).sum()) / tokens.sum())


def paired_differences(first: RowMeasures, second: RowMeasures) -> dict[str, Any]:
    """``first`` minus ``second`` on the same rows: token means with paired standard errors.

    The difference in ``nll`` equals that in KL(teacher || model) up to sampling noise; the steps in
    the paper's Table 4 are 0.66 and 0.31.

    Raises:
      ValueError: the rows differ.
    """
    if not np.array_equal(first.tokens, second.tokens):
        raise ValueError("the measures are of different rows")
    differences: dict[str, Any] = {}
    for name in ("nll", "agreement", "kl"):
        one, other = getattr(first, name), getattr(second, name)
        if one is not None and other is not None:
            value, error = token_mean(one - other, first.tokens)
            differences[name] = {"token_mean": value, "token_se": error}
    return differences


def measure(
    model: Model,
    rows: Rows,
    *,
    batch_size: int,
    max_rows: int | None = None,
    top_ks: Sequence[int] = TOP_KS,
    teacher: TeacherLogps | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RowMeasures:
    """Measures a model on the answers of a split.

    Args:
      model: on the mesh's devices.
      rows: a ``TokenSplit``.
      batch_size: rows computed together.
      max_rows: measure only this many first rows.
      top_ks: values of K for ``top_mass``; larger ones than the vocabulary count as all of it.
      teacher: its true distribution on these rows, if known.
      mesh: mesh over which rows are split; None for the default device.
      progress: called with the number of rows done and in all.

    Returns:
      Sums by row, in the order of the split.

    Raises:
      UserError: no rows, or a teacher that lacks one of them or has more tokens than the model.
    """
    config, (params, adapter) = model.config, model.weights
    num = len(rows) if max_rows is None else min(len(rows), max_rows)
    if num == 0:
        raise UserError("there are no rows to measure on.")
    if teacher is not None and teacher.vocab_size > config.vocab_size:
        raise UserError(
            f"evaluate.teacher_logps has {teacher.vocab_size} tokens, the model "
            f"{config.vocab_size}: they do not share a vocabulary."
        )
    compute = _compiled(config, tuple(min(k, config.vocab_size) for k in top_ks), mesh)
    sums = {
        "tokens": np.zeros(num),
        "nll": np.zeros(num),
        "agreement": np.zeros(num),
        "top_mass": np.zeros((num, len(top_ks))),
        "bins": np.zeros((num, NUM_BINS, 3)),
        "kl": np.zeros(num),
    }
    waiting: tuple[np.ndarray, Any, Any] | None = None
    done = 0
    for indices, batch, teacher_logps in _batches(rows, num, batch_size, config, teacher):
        mask_BL = batch.mask_BL
        if mesh is not None:
            batch, teacher_logps = (put_rows(x, mesh) for x in (batch, teacher_logps))
        found = compute(params, adapter, batch, teacher_logps)
        # Sum on the host while the device works on the next batch.
        done += _add(sums, waiting)
        progress(done, num)
        waiting = (indices, mask_BL, found)
    progress(done + _add(sums, waiting), num)
    if np.any(sums["tokens"] == 0):
        raise UserError("a row has an answer of no tokens.")
    kl = sums.pop("kl")
    return RowMeasures(**sums, kl=None if teacher is None else kl, top_ks=tuple(top_ks))


def is_argmax(logps_BLV: jax.Array, labels_BL: jax.Array) -> jax.Array:
    """bool ``[B, L]``: whether the label is the argmax (lowest id among equals); False for NaN.

    It is ``argmax(...) == labels`` as one reduction. XLA's argmax over 32,000 tokens takes 147 ms
    for 512 positions on a CPU, this takes 8 (49,152 tokens: 224 and 15).
    """
    label_logps = jnp.take_along_axis(logps_BLV, labels_BL[..., None], axis=-1)
    ids = jax.lax.broadcasted_iota(labels_BL.dtype, logps_BLV.shape, logps_BLV.ndim - 1)
    later = ids >= labels_BL[..., None]
    # A condition that must hold for all tokens, so that NaN fails.
    return ((logps_BLV < label_logps) | ((logps_BLV == label_logps) & later)).all(axis=-1)


def validation_figures(
    batch_size: int, mesh: Mesh | None
) -> Callable[[Model, Rows, int], dict[str, float]]:
    """Figures on held-out rows during training: ``(model, rows, most) -> figures``.

    ``most`` limits the number of rows. The figures are means over the answers' tokens: ``nll`` in
    nats, and ``agreement``.
    """

    def figures(model: Model, rows: Rows, most: int) -> dict[str, float]:
        found = measure(model, rows, batch_size=batch_size, max_rows=most, top_ks=(), mesh=mesh)
        tokens = float(found.tokens.sum())
        return {
            "nll": float(found.nll.sum()) / tokens,
            "agreement": float(found.agreement.sum()) / tokens,
        }

    return figures


def _batches(
    rows: Rows, num: int, batch_size: int, config: ModelConfig, teacher: TeacherLogps | None
) -> Iterator[tuple[np.ndarray, TokenBatch, np.ndarray | None]]:
    """Row indices, their batch, and the teacher's log-probs at its positions; similar lengths."""
    lengths = np.asarray(rows.lengths)[:num]
    buckets = default_buckets(int(lengths.max()))
    for indices, length in by_length(lengths - 1, batch_size, buckets):
        found = rows.read(indices.tolist())
        batch = collate_rows(
            [[row] for row in found], length=length, num_segments=1, batch_size=batch_size
        )
        if teacher is None:
            yield indices, batch, None
            continue
        shape = (batch_size, length, config.vocab_size)
        teacher_logps_BLV = np.full(shape, -np.inf, np.float32)
        for place, row in enumerate(found):
            if row.earlier is not None:
                raise UserError(
                    "evaluate.teacher_logps holds the log-probs of last answers alone: set turns: "
                    "last or each for corpus.test."
                )
            logps = teacher.read(row.tokens, row.prompt_length)
            first = row.prompt_length - 1
            teacher_logps_BLV[place, first : first + len(logps), : logps.shape[1]] = logps
        yield indices, batch, teacher_logps_BLV


def _add(sums: dict[str, np.ndarray], waiting: tuple[np.ndarray, Any, Any] | None) -> int:
    if waiting is None:
        return 0
    indices, mask_BL, found = waiting
    count = len(indices)
    mask = np.asarray(mask_BL)[:count]
    sums["tokens"][indices] = mask.sum(axis=1)
    figures = {name: np.asarray(values)[:count] for name, values in jax.device_get(found).items()}
    sums["bins"][indices] = binned(figures.pop("confidence"), figures["agreement"], mask)
    for name, figure in figures.items():
        values = figure.astype(np.float64)
        kept = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
        sums[name][indices] = np.where(kept, values, 0).sum(axis=1)
    return count


def position_measures(
    config: ModelConfig,
    params: Any,
    adapter: Any,
    batch: TokenBatch,
    teacher_logps_BLV: Any | None = None,
    *,
    top_ks: Sequence[int] = (),
    confidence: bool = False,
) -> dict[str, jax.Array]:
    """Figures at each position of a batch, ``{name: [B, L] or [B, L, J]}``; traceable.

    Always ``nll`` and ``agreement``; with ``top_ks`` (each at most the vocabulary) ``top_mass``;
    with ``confidence`` the probability of the most probable token; with the teacher's log-probs
    ``kl``.
    """
    hidden_BLD = batch_hidden_states(params, adapter, batch, config=config)
    length = batch.tokens_BL.shape[1]
    chunk = positions_within(_LOGITS_AT_ONCE, hidden_BLD, config.vocab_size)

    def head(hidden: jax.Array, labels: jax.Array, *teacher: jax.Array) -> Any:
        logps = jax.nn.log_softmax(unembed(params, hidden, config=config), axis=-1)
        label_logps = jnp.take_along_axis(logps, labels[..., None], axis=-1)[..., 0]
        figures = {"nll": -label_logps, "agreement": is_argmax(logps, labels)}
        if confidence:
            figures["confidence"] = jnp.exp(logps.max(axis=-1))
        if top_ks:
            largest = jnp.exp(jax.lax.top_k(logps, max(top_ks))[0])
            mass = jnp.cumsum(largest, axis=-1)
            figures["top_mass"] = jnp.stack([mass[..., k - 1] > MASS for k in top_ks], axis=-1)
        for teacher_logps in teacher:
            # For a token that the teacher never says the term is 0, whatever the model says.
            says = teacher_logps > -jnp.inf
            gap = jnp.where(says, teacher_logps - logps, 0.0)
            figures["kl"] = (jnp.exp(teacher_logps) * gap).sum(axis=-1)
        return figures

    teacher = () if teacher_logps_BLV is None else (teacher_logps_BLV,)
    figures: dict[str, jax.Array] = map_positions(
        head, hidden_BLD, batch.labels_BL, *teacher, chunk=min(chunk, length)
    )
    return figures


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, top_ks: tuple[int, ...], mesh: Mesh | None) -> Any:
    """``(params, adapter, batch, teacher_logps_BLV | None) -> {name: [B, L] or [B, L, J]}``."""
    compute = functools.partial(position_measures, config, top_ks=top_ks, confidence=True)
    if mesh is None:
        return jax.jit(compute)
    return jax.jit(compute, out_shardings=NamedSharding(mesh, PartitionSpec()))
