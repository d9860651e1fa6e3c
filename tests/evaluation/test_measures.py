"""Alignment measures are compared with an independent float64 NumPy version."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from proxykd_jax.data.collate import TokenRow
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation import measures
from proxykd_jax.evaluation.calibration import NUM_BINS
from proxykd_jax.evaluation.exact_teacher import TeacherLogps, write_teacher_logps
from proxykd_jax.evaluation.measures import (
    is_argmax,
    measure,
    paired_differences,
    token_mean,
    validation_figures,
)
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.params import init_params
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import ModelSpec

CONFIG = ModelConfig(
    family="llama",
    vocab_size=23,
    num_layers=2,
    model_dim=16,
    ffn_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    initializer_range=0.6,
    lora=LoraConfig(rank=2),
)


def model_of(params, adapter=None) -> Model:
    return Model(ModelSpec(CONFIG, "lora", "float32", "none"), params, adapter, Path())


@dataclass
class Split:
    rows: list[TokenRow]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row.tokens) for row in self.rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: list[int]) -> list[TokenRow]:
        return [self.rows[i] for i in indices]


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    rows = []
    for length in (9, 4, 15, 4, 2, 11, 7):
        tokens = rng.integers(CONFIG.vocab_size, size=length).astype(np.int32)
        rows.append(TokenRow(tokens, int(rng.integers(1, length)), f"{length}"))
    return Split(rows)


def teacher_tables(split: Split, rng: np.random.Generator, vocab: int) -> list[np.ndarray]:
    """Random distributions with zeros in them."""
    tables = []
    for row in split.rows:
        places = len(row.tokens) - row.prompt_length
        probs = rng.dirichlet(np.full(vocab, 0.3), size=places)
        probs[:, 3] = 0
        with np.errstate(divide="ignore"):
            tables.append(np.log(probs / probs.sum(axis=-1, keepdims=True)))
    return tables


def write_teacher(folder: Path, split: Split, tables: list[np.ndarray]) -> TeacherLogps:
    write_teacher_logps(
        folder,
        tokens=[row.tokens for row in split.rows],
        prompt_lengths=[row.prompt_length for row in split.rows],
        logps=tables,
    )
    return TeacherLogps(folder)


def reference(params, adapter, split: Split, tables=None) -> dict[str, np.ndarray]:
    """One row at a time, no padding, float64."""
    found: dict[str, list] = {"nll": [], "agreement": [], "top_mass": [], "bins": [], "kl": []}
    for index, row in enumerate(split.rows):
        logits = np.asarray(
            forward(params, adapter, row.tokens[None, :-1], config=CONFIG)[0], np.float64
        )[row.prompt_length - 1 :]
        logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        answer = row.tokens[row.prompt_length :]
        found["nll"].append(-logps[np.arange(len(answer)), answer].sum())
        found["agreement"].append((logps.argmax(axis=-1) == answer).sum())
        sorted_probs = -np.sort(-np.exp(logps), axis=-1)
        found["top_mass"].append(
            [(sorted_probs[:, :k].sum(axis=-1) > 0.95).sum() for k in (1, 4, 10)]
        )
        bins = np.zeros((NUM_BINS, 3))
        for place, token in enumerate(answer):
            confidence, choice = sorted_probs[place, 0], logps[place].argmax()
            bins[int(confidence * NUM_BINS)] += (1, confidence, choice == token)
        found["bins"].append(bins)
        if tables is not None:
            probs = np.exp(tables[index])
            with np.errstate(invalid="ignore"):
                terms = np.where(probs > 0, probs * (tables[index] - logps), 0)
            found["kl"].append(terms.sum())
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("batch_size", "at_once", "adapted"), [(1, 1 << 26, False), (3, 23 * 3, True), (16, 23, False)]
)
def test_sums_equal_the_reference(
    params, split: Split, tmp_path: Path, batch_size: int, at_once: int, adapted: bool, monkeypatch
) -> None:
    monkeypatch.setattr(measures, "_LOGITS_AT_ONCE", at_once)
    measures._compiled.cache_clear()
    adapter = None
    if adapted:
        adapter = init_adapter(jax.random.key(1), CONFIG)
        adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    tables = teacher_tables(split, np.random.default_rng(1), CONFIG.vocab_size)
    teacher = write_teacher(tmp_path, split, tables)
    got = measure(
        model_of(params, adapter), split, batch_size=batch_size, top_ks=(1, 4, 10), teacher=teacher
    )
    expected = reference(params, adapter, split, tables)
    np.testing.assert_array_equal(got.tokens, [len(r.tokens) - r.prompt_length for r in split.rows])
    np.testing.assert_allclose(got.nll, expected["nll"], atol=2e-5)
    np.testing.assert_array_equal(got.agreement, expected["agreement"])
    np.testing.assert_array_equal(got.top_mass, expected["top_mass"])
    np.testing.assert_allclose(got.bins, expected["bins"], atol=2e-5)
    np.testing.assert_allclose(got.kl, expected["kl"], atol=2e-5)


def test_the_first_choice_is_the_argmax_ties_and_all() -> None:
    rng = np.random.default_rng(3)
    logps = rng.integers(-2, 1, size=(50, 40, 7)).astype(np.float32)  # most positions have ties
    logps[:, ::5] = np.where(logps[:, ::5] == 0, 0, -np.inf)
    logps[:, ::10] = -np.inf
    labels = rng.integers(7, size=(50, 40)).astype(np.int32)
    expected = logps.argmax(axis=-1) == labels
    assert 0.1 < expected.mean() < 0.5
    for function in (is_argmax, jax.jit(is_argmax)):
        np.testing.assert_array_equal(function(logps, labels), expected)
    logps[..., 4] = np.nan
    assert not np.any(is_argmax(logps, labels))


def test_the_teacher_itself_has_no_kl(params, split: Split, tmp_path: Path) -> None:
    tables = []
    for row in split.rows:
        logits = np.asarray(forward(params, None, row.tokens[None, :-1], config=CONFIG)[0])
        tables.append(np.asarray(jax.nn.log_softmax(logits))[row.prompt_length - 1 :])
    teacher = write_teacher(tmp_path, split, tables)
    got = measure(model_of(params), split, batch_size=4, teacher=teacher)
    np.testing.assert_allclose(got.kl, 0, atol=1e-5)


def test_a_teacher_may_know_fewer_tokens_but_not_more(params, split: Split, tmp_path: Path) -> None:
    rows = [TokenRow(r.tokens % 20, r.prompt_length, r.row_id) for r in split.rows]
    small = Split(rows)
    tables = teacher_tables(small, np.random.default_rng(2), 20)
    teacher = write_teacher(tmp_path / "small", small, tables)
    got = measure(model_of(params), small, batch_size=4, teacher=teacher)
    padded = [np.pad(t, ((0, 0), (0, 3)), constant_values=-np.inf) for t in tables]
    np.testing.assert_allclose(got.kl, reference(params, None, small, padded)["kl"], atol=2e-5)
    tables = teacher_tables(small, np.random.default_rng(2), 24)
    teacher = write_teacher(tmp_path / "large", small, tables)
    with pytest.raises(UserError, match="vocabulary"):
        measure(model_of(params), small, batch_size=4, teacher=teacher)


def test_rows_that_the_teacher_lacks_are_named(params, split: Split, tmp_path: Path) -> None:
    tables = teacher_tables(split, np.random.default_rng(1), CONFIG.vocab_size)
    teacher = write_teacher(tmp_path, split, tables)
    changed = TokenRow(split.rows[0].tokens[::-1].copy(), split.rows[0].prompt_length, "x")
    with pytest.raises(UserError, match="holds no row of these tokens"):
        measure(model_of(params), Split([changed]), batch_size=2, teacher=teacher)
    other_cut = TokenRow(split.rows[0].tokens, split.rows[0].prompt_length + 1, "x")
    with pytest.raises(UserError, match="holds no row"):
        measure(model_of(params), Split([other_cut]), batch_size=2, teacher=teacher)


def test_max_rows_takes_the_first(params, split: Split) -> None:
    whole = measure(model_of(params), split, batch_size=4)
    part = measure(model_of(params), split, batch_size=4, max_rows=3)
    np.testing.assert_allclose(part.nll, whole.nll[:3], rtol=1e-6)
    with pytest.raises(UserError, match="no rows"):
        measure(model_of(params), Split([]), batch_size=4)


def test_summary_and_file_form(params, split: Split) -> None:
    got = measure(model_of(params), split, batch_size=4, top_ks=(1, 1000))
    summary = got.summary()
    assert summary["n"] == len(split)
    assert summary["tokens"] == got.tokens.sum()
    np.testing.assert_allclose(
        summary["nll"]["token_mean"], got.nll.sum() / got.tokens.sum(), rtol=1e-12
    )
    np.testing.assert_allclose(
        summary["nll"]["example_mean"], np.mean(got.nll / got.tokens), rtol=1e-12
    )
    assert summary["top_mass"]["1000"] == 1.0  # a K above the vocabulary's size covers all of it
    assert "kl" not in summary
    again = measures.RowMeasures.from_arrays(got.to_arrays())
    assert again.summary() == summary


def test_standard_error_of_a_token_mean_covers() -> None:
    """The standard error from one corpus equals the spread of the ratio over many corpora."""
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(1, 9, size=60).astype(float)
        # Rows differ, and the effect depends on their length.
        row_effect = rng.normal(size=60) + 0.2 * tokens
        value, error = token_mean(row_effect * tokens, tokens)
        ratios.append(value)
        errors.append(error)
    assert abs(np.mean(errors) / np.std(ratios) - 1) < 0.05
    assert token_mean(np.array([2.0]), np.array([4.0])) == (0.5, None)


def test_paired_differences_cancel_what_rows_share(params, split: Split) -> None:
    one = measure(model_of(params), split, batch_size=4)
    shifted = measures.RowMeasures(
        one.tokens,
        one.nll + 0.25 * one.tokens,
        one.agreement,
        one.top_mass,
        one.bins,
        None,
        one.top_ks,
    )
    difference = paired_differences(shifted, one)["nll"]
    np.testing.assert_allclose(difference["token_mean"], 0.25, rtol=1e-9)
    assert difference["token_se"] < 1e-9
    fewer = measure(model_of(params), split, batch_size=4, max_rows=2)
    with pytest.raises(ValueError, match="different rows"):
        paired_differences(one, fewer)


def test_teacher_file_is_checked(tmp_path: Path) -> None:
    logps = np.log(np.full((2, 4), 0.25))
    with pytest.raises(ValueError, match="places"):
        write_teacher_logps(tmp_path, tokens=[np.arange(3)], prompt_lengths=[2], logps=[logps])
    with pytest.raises(ValueError, match="sum to"):
        write_teacher_logps(
            tmp_path, tokens=[np.arange(3)], prompt_lengths=[1], logps=[logps - 0.1]
        )
    with pytest.raises(UserError, match="cannot be read"):
        TeacherLogps(tmp_path / "absent")
    (tmp_path / "teacher.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read"):
        TeacherLogps(tmp_path)


def test_what_training_looks_at(params, split: Split) -> None:
    got = validation_figures(4, None)(model_of(params), split, 5)
    whole = measure(model_of(params), split, batch_size=4, max_rows=5)
    assert set(got) == {"nll", "agreement"}
    np.testing.assert_allclose(got["nll"], whole.nll.sum() / whole.tokens.sum(), rtol=1e-5)
    assert got["agreement"] == whole.agreement.sum() / whole.tokens.sum()
