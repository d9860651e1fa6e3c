"""A round's reference log-probs, computed by the training forward pass or by the sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proxykd_jax.config import MeshConfig, PreferenceConfig
from proxykd_jax.data.collate import Rows, RowsInMemory, TokenRow
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.generation.samples import EQUALS_CHOSEN, KEPT, SampledRow, SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training import reference
from proxykd_jax.training.batches import Plan, answer_positions, make_plan
from proxykd_jax.training.model import Model
from proxykd_jax.training.pairs import PairRows
from tests.training.conftest import VOCAB

COUNT, BATCH, DROPPED = 15, 4, 6


def made_rows(seed: int) -> list[TokenRow]:
    """Returns the same prompts for every seed, with another answer to each."""
    prompts, rng = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    for index in range(COUNT):
        prompt = prompts.integers(3, VOCAB, prompts.integers(1, 9))
        answer = rng.integers(3, VOCAB, rng.integers(1, 12))
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        rows.append(TokenRow(tokens, len(prompt), f"{index:064x}"))
    return rows


def logps_of(model: tuple, rows: list[TokenRow]) -> np.ndarray:
    """Computes each row alone, as the sampler would have summed it."""
    spec, frozen, trainable = model
    logps = []
    for row in rows:
        plan = plan_of(RowsInMemory([row]))
        batch = reference.token_collate(RowsInMemory([row]))(plan(0)[0])
        (logps_B,) = reference.answer_logps(frozen, trainable, batch, spec=spec, microbatches=1)
        logps.append(float(logps_B[0]))
    return np.array(logps)


def plan_of(rows: Rows, together: int = BATCH) -> Plan:
    return make_plan(
        rows.lengths - 1,
        seed=1,
        batch_size=BATCH,
        batching="bucket",
        max_length=32,
        answers=answer_positions(rows),
        together=together,
    )


class Round:
    """Pairs in a store; records which forward passes made their references."""

    def __init__(
        self, folder: Path, model: tuple, monkeypatch: pytest.MonkeyPatch, shift: float = 0.0
    ) -> None:
        self.model, self.chosen, own = model, RowsInMemory(made_rows(1)), made_rows(2)
        self.logps = logps_of(model, own) + shift
        drops = [EQUALS_CHOSEN if place == DROPPED else KEPT for place in range(COUNT)]
        self.store = SampleStore(folder)
        self.store.append(
            0,
            [
                SampledRow(place, row.row_id, row.answer, True, drop, float(logp))
                for place, (row, drop, logp) in enumerate(zip(own, drops, self.logps, strict=True))
            ],
        )
        self.calls: list[str] = []
        for name in ("pair_logps", "answer_logps"):
            monkeypatch.setattr(reference, name, self._counting(name))

    def _counting(self, name: str):
        real = getattr(reference, name)

        def call(*arguments, **options):
            self.calls.append(name)
            return real(*arguments, **options)

        return call

    def run(self, *, take: bool = True, microbatches: int = 1) -> np.ndarray:
        spec, frozen, trainable = self.model
        pairs = PairRows(self.chosen, self.store, PreferenceConfig(beta=1.0), spec.config)
        together = BATCH if microbatches == 1 else 1
        plan = make_plan(
            pairs.positions,
            seed=0,
            batch_size=BATCH,
            batching="bucket",
            max_length=64,
            answers=pairs.answers,
            together=together,
        )

        def plan_chosen(rows: Rows) -> Plan:
            return plan_of(rows, together)

        reference.store_references(
            self.store,
            plan,
            pairs.collate,
            Model(spec, frozen, trainable, self.store.folder),
            rows=self.chosen,
            plan_chosen=plan_chosen if take else None,
            microbatches=microbatches,
            batches_per_part=2,
            mesh=make_mesh(MeshConfig()),
            report=lambda done, parts: None,
        )
        return np.array(self.store.references())

    @property
    def expected(self) -> np.ndarray:
        """Returns log-probs that are computed row by row."""
        chosen = logps_of(self.model, self.chosen.read(range(COUNT)))
        own = logps_of(self.model, made_rows(2))
        return np.stack([chosen, np.where(np.arange(COUNT) == DROPPED, 0, own)])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_samplers_log_probs_serve_where_they_agree(
    tmp_path, lora_model, monkeypatch, microbatches
):
    """Both answers are computed for the first batch, and y alone for the others."""
    made = Round(tmp_path, lora_model, monkeypatch)
    found, calls = made.run(microbatches=microbatches), made.calls[:]
    assert calls == ["pair_logps", "answer_logps", "answer_logps", "answer_logps"]
    np.testing.assert_allclose(found, made.expected, atol=1e-4)
    assert made.store.num_references == COUNT
    as_sampled = found[1] == made.logps.astype(np.float32)
    assert as_sampled.sum() >= COUNT - BATCH - 1  # all but the first batch and the dropped one


@pytest.mark.parametrize(
    "shift, take, why",
    [
        (0.01, True, "another model's, or bfloat16's"),
        (np.nan, True, "a server's"),
        (0.0, False, "the reference is another model than the one that answered"),
    ],
)
def test_else_both_are_computed(tmp_path, lora_model, monkeypatch, shift, take, why):
    made = Round(tmp_path, lora_model, monkeypatch, shift)
    found, calls = made.run(take=take), made.calls[:]
    assert calls == ["pair_logps"] * 4, why
    np.testing.assert_allclose(found, made.expected, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, lora_model, monkeypatch):
    whole = Round(tmp_path / "whole", lora_model, monkeypatch)
    whole.run()
    cut = Round(tmp_path / "cut", lora_model, monkeypatch)

    def stop() -> None:
        raise Stopped("here")

    with monkeypatch.context() as patch:
        patch.setattr(reference, "stop_if_wanted", stop)
        with pytest.raises(Stopped):
            cut.run()
    cut.calls.clear()
    cut.run()
    assert cut.calls == ["answer_logps"]

    def files(folder: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (folder / "reference").iterdir()}

    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_parts_that_leave_out_pairs_are_refused(tmp_path, lora_model, monkeypatch):
    """A version that cuts the round into other parts leaves this state."""
    made = Round(tmp_path, lora_model, monkeypatch)
    zeros = np.zeros(2, np.float32)
    made.store.append_references(1, np.arange(2, dtype=np.int32), zeros, zeros)
    with pytest.raises(UserError, match=r"leave out some .* Remove .* to sample again"):
        made.run()


def test_nothing_to_compare_is_no_agreement():
    assert not reference.sampled_logps_serve(np.zeros(0), np.zeros(0))
    assert reference.sampled_logps_serve(np.array([-5.0]), np.array([-5.0009]))
    assert not reference.sampled_logps_serve(np.array([-5.0, -5.0]), np.array([-5.0, -5.0011]))
