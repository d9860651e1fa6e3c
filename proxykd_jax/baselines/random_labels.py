"""RS-KD (arXiv 2503.16870): Proxy-KD with soft labels drawn at random.

At each position of the teacher's answers N ids are drawn with replacement from the aligned proxy's
distribution p (or from p^tau), and stored with their counts. The target t = counts / N (x p over
the proposal, not renormalised) has mean p. The forward KL's expected gradient therefore equals that
of the whole vocabulary, unlike with top-k labels. Everything else is as in Proxy-KD, including the
weights of eq. 9; ``distill.tail`` has no effect.

A draw depends on (seed, digest of the row, position in the answer), so restarts and other batches
draw the same. The cross-entropy is logged instead of the KL, because its mean over draws is
unbiased and that of the plug-in KL is not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.artifacts import complete_stage, open_stage
from proxykd_jax.config import Config
from proxykd_jax.config.methods import RandomLabels
from proxykd_jax.data.collate import Rows, TokenRow
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.drawn_labels import DrawnLabels, DrawnRow
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.generation.label_rows import Piece, Positions
from proxykd_jax.losses import draw_labels
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import unembed
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.peers import stop_if_wanted
from proxykd_jax.random_keys import run_key
from proxykd_jax.training.distillation import (
    DrawnTargets,
    label_phase,
    teacher_rows,
    teacher_splits,
)
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun

STORE = "drawn_labels"


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Draws the labels, and returns the teacher's answers that the student sees."""
    config, rows = scoring.config, scoring.teacher_rows()
    method = _method(config)
    settings = {
        "seed": config.seed,
        "draws": method.draws,
        "proposal_power": method.proposal_power,
        "rows_per_part": config.score.rows_per_part,
        "splits": list(rows),
    }
    folder = config.folder / STORE
    if not open_stage(folder, "draw", settings, scoring.made_from):
        for name, split in rows.items():
            _draw_split(scoring, split, _store(config, scoring.corpus, name))
        complete_stage(folder, counts={name: len(split) for name, split in rows.items()})
    return rows


def phases(run: StageRun) -> list[Phase]:
    """Returns the phase of eq. 11 with drawn targets instead of the most probable ids."""
    config, rows = run.config, teacher_rows(run.config, run.corpus)
    num_draws, splits = _method(config).draws, teacher_splits(config)
    if run.scorer is not None:  # a sketch
        slots = min(num_draws, run.corpus.vocab_size)
        return [label_phase(run, rows, nll_splits=splits, drawn=DrawnTargets({}, slots))]
    stores = {name: _store(config, run.corpus, name) for name in rows}
    drawn = DrawnTargets(
        {name: functools.partial(_targets, store, num_draws) for name, store in stores.items()},
        next(iter(stores.values())).slots,
    )
    return [label_phase(run, rows, nll_splits=splits, drawn=drawn)]


def _method(config: Config) -> RandomLabels:
    assert isinstance(config.method, RandomLabels)
    return config.method


def _store(config: Config, corpus: TokenCorpus, split: str) -> DrawnLabels:
    method = _method(config)
    return DrawnLabels(
        config.folder / STORE,
        split,
        vocab_size=corpus.vocab_size,
        num_draws=method.draws,
        weighted=method.proposal_power != 1,
    )


def _targets(
    store: DrawnLabels, num_draws: int, indices: list[int], row_ids: list[str]
) -> list[SoftLabels]:
    """Returns drawn targets in the form of soft labels, without tails and gold tokens."""
    found = []
    for row in store.read(indices, row_ids):
        nothing = np.full(len(row.ids), -np.inf, np.float32)
        found.append(SoftLabels(row.row_id, row.ids, row.log_targets(num_draws), nothing, nothing))
    return found


# --- drawing --------------------------------------------------------------------------------------


class _Draws(NamedTuple):
    ids_MK: jax.Array
    counts_MK: jax.Array
    weights_MK: jax.Array


@functools.partial(
    jax.jit, static_argnames=("config", "seed", "draws", "proposal_power", "vocab_size", "slots")
)
def _draw(
    params: Any,
    positions: Positions,
    *,
    config: ModelConfig,
    seed: int,
    draws: int,
    proposal_power: float,
    vocab_size: int,
    slots: int,
) -> _Draws:
    """Draws the labels of M positions, only from ids that the tokenizer has."""
    logits_MV = unembed(params, positions.hidden_MD, config=config).astype(jnp.float32)
    ids_V = jnp.arange(logits_MV.shape[-1])
    logits_MV = jnp.where((ids_V < vocab_size)[None], logits_MV, -jnp.inf)
    found = draw_labels(
        logits_MV[:, None],
        run_key(seed),
        num_draws=draws,
        row_ids_B=positions.row_words_M,
        positions_BL=positions.offsets_M[:, None],
        proposal_power=proposal_power,
    )
    # Slots hold the most frequent ids first, and there are never more distinct ids than slots.
    return _Draws(*(array[:, 0, :slots] for array in found))


def _draw_split(scoring: Scoring, rows: Rows, store: DrawnLabels) -> None:
    """Draws the parts of a split that are missing."""
    config, method = scoring.config, _method(scoring.config)
    scorer = scoring.scorer(
        functools.partial(
            _draw,
            config=scoring.model.config,
            seed=config.seed,
            draws=method.draws,
            proposal_power=method.proposal_power,
            vocab_size=scoring.corpus.vocab_size,
            slots=store.slots,
        )
    )
    size = config.score.rows_per_part
    for index in store.missing(-(-len(rows) // size)):
        token_rows = rows.read(range(index * size, min((index + 1) * size, len(rows))))
        store.commit(index, _assembled(token_rows, scorer.dispatch(token_rows), store.slots))
        stop_if_wanted()


def _assembled(
    token_rows: Sequence[TokenRow], pieces: Sequence[Piece], slots: int
) -> list[DrawnRow]:
    """Waits for the draws and assembles them into rows."""
    out = [
        DrawnRow(
            row.row_id,
            np.zeros((row.num_learnt, slots), np.int32),
            np.zeros((row.num_learnt, slots), np.int32),
            np.ones((row.num_learnt, slots), np.float32),
        )
        for row in token_rows
    ]
    for piece in pieces:
        found = fetch(piece.labels)
        for number, place, some in piece.by_row():
            row = out[number]
            row.ids[place], row.counts[place] = found.ids_MK[some], found.counts_MK[some]
            row.weights[place] = found.weights_MK[some]
    return out
