"""Training steps compared with a float64 computation of eqs. 6 and 11, and their invariances."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from proxykd_jax.config import PreferenceConfig
from proxykd_jax.models.decoder import batch_hidden_states, forward, unembed
from proxykd_jax.training.batch_objectives import AlignObjective, DistillObjective, NllObjective
from proxykd_jax.training.logprobs import label_logps
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.training.state import init_state
from proxykd_jax.training.steps import make_diagnosis, make_train_step, split_rows
from proxykd_jax.types import TokenBatch

from .conftest import random_distill, random_pairs, random_rows

OBJECTIVES = {
    "nll": NllObjective("example_mean"),
    "align": AlignObjective(PreferenceConfig(loss="dpo", beta=0.3), "token_mean", 0.7, 1.3),
    "distill": DistillObjective(10.0, 1.0, "bucket", "example_mean"),
}
BATCHES = {"nll": random_rows, "align": random_pairs, "distill": random_distill}


def _logps(model, batch) -> np.ndarray:
    spec, frozen, trainable = model
    params, adapter = spec.bind(frozen, trainable)
    logits = forward(
        params,
        adapter,
        batch.tokens_BL,
        config=spec.config,
        segment_ids_BL=jnp.asarray(batch.segment_ids_BL),
    )
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _gold(logps, batch) -> np.ndarray:
    return np.take_along_axis(logps, batch.labels_BL[..., None], -1)[..., 0]


@pytest.mark.parametrize("reduction", ["example_mean", "token_mean", "sum"])
def test_nll_is_eq_1(lora_model, reduction) -> None:
    batch = random_rows(np.random.default_rng(0), 5)
    gold, mask = -_gold(_logps(lora_model, batch), batch), batch.mask_BL
    rows = [gold[b][mask[b]] for b in range(5) if mask[b].any()]
    expected = {
        "example_mean": np.mean([r.mean() for r in rows]),
        "token_mean": np.concatenate(rows).mean(),
        "sum": np.mean([r.sum() for r in rows]),
    }[reduction]
    loss = _step(lora_model, NllObjective(reduction), batch)[1]["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_align_is_eq_6(lora_model) -> None:
    batch = random_pairs(np.random.default_rng(1), 6)
    chosen = _gold(_logps(lora_model, batch.chosen), batch.chosen)
    rejected = _gold(_logps(lora_model, batch.rejected), batch.rejected)
    mask = batch.chosen.mask_BL
    nll = -(chosen * mask).sum() / mask.sum()
    ratio = ((chosen * mask).sum(1) - batch.reference_chosen_B) - (
        (rejected * batch.rejected.mask_BL).sum(1) - batch.reference_rejected_B
    )
    dpo = np.log1p(np.exp(-0.3 * ratio))[batch.pair_mask_B].mean()
    loss = _step(lora_model, OBJECTIVES["align"], batch)[1]["loss"]
    np.testing.assert_allclose(loss, 0.7 * nll + 1.3 * dpo, rtol=1e-5)


def test_distill_is_eq_11(full_model) -> None:
    batch = random_distill(np.random.default_rng(2), 5)
    logps, mask = _logps(full_model, batch.rows), batch.rows.mask_BL
    q = np.take_along_axis(logps, batch.topk_ids_BLK, -1)
    p, p_tail = batch.topk_logps_BLK.astype(np.float64), batch.tail_logps_BL.astype(np.float64)
    q_tail = np.log1p(-np.exp(q).sum(-1))
    kl = (np.exp(p) * (p - q)).sum(-1) + np.exp(p_tail) * (p_tail - q_tail)
    gold = -_gold(logps, batch.rows)
    used = [b for b in range(5) if mask[b].any()]
    weighted = np.mean([batch.sample_weight_BS[b, 0] * kl[b][mask[b]].mean() for b in used])
    nll = np.mean([gold[b][mask[b]].mean() for b in used if batch.nll_mask_BS[b, 0]])
    _, metrics = _step(full_model, OBJECTIVES["distill"], batch)
    np.testing.assert_allclose(metrics["loss"], nll + 10 * weighted, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_to_nll"], 10 * weighted / nll, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["lora_model", "full_model"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, kind, request) -> None:
    """Rows and micro-batches have unequal lengths, so a mean of means would differ."""
    model = request.getfixturevalue(kind)
    batch = BATCHES[name](np.random.default_rng(3), 6)
    whole, metrics = _step(model, OBJECTIVES[name], batch, microbatches=1)
    parts, part_metrics = _step(model, OBJECTIVES[name], batch, microbatches=3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    for key in metrics:
        np.testing.assert_allclose(metrics[key], part_metrics[key], rtol=2e-5, err_msg=key)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_starts_at_ln_2_and_raises_the_margin(lora_model, dtype, microbatches) -> None:
    """Rows have unequal lengths, and the references are computed in the step's micro-batches."""
    spec, frozen, trainable = lora_model
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
    model = (dataclasses.replace(spec, remat="full"), frozen, trainable)
    batch = random_pairs(np.random.default_rng(4), 6)
    chosen, rejected = pair_logps(frozen, trainable, batch, spec=spec, microbatches=microbatches)
    assert np.unique(chosen).size > 3
    np.testing.assert_array_equal(chosen == 0, ~batch.chosen.mask_BL.any(1))
    batch = batch.replace(reference_chosen_B=chosen, reference_rejected_B=rejected)
    objective = AlignObjective(PreferenceConfig(loss="dpo", beta=0.3), "example_mean", 0.0, 1.0)
    new, metrics = _step(model, objective, batch, microbatches)
    np.testing.assert_allclose(metrics["preference"], np.log(2), atol=1e-6)
    again = _step((model[0], frozen, new), objective, batch, microbatches)[1]
    assert again["reward_margin"] > 0 and again["preference"] < np.log(2)


def test_frozen_weights_do_not_move_and_padding_does_not_matter(lora_model) -> None:
    batch = random_rows(np.random.default_rng(5), 4)
    noisy = batch.replace(
        tokens_BL=np.where(batch.segment_ids_BL > 0, batch.tokens_BL, 7),
        labels_BL=np.where(batch.mask_BL, batch.labels_BL, 9),
    )
    first, second = (_step(lora_model, OBJECTIVES["nll"], b)[0] for b in (batch, noisy))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_chunked_vocabulary_equals_whole(lora_model, monkeypatch) -> None:
    spec, frozen, trainable = lora_model
    batch = random_distill(np.random.default_rng(6), 4)
    whole = label_logps(frozen, trainable, batch.rows, spec, topk_ids_BLK=batch.topk_ids_BLK)
    monkeypatch.setattr("proxykd_jax.training.logprobs._WHOLE_LOGITS", 5 * 4 * 37)
    monkeypatch.setattr("proxykd_jax.training.logprobs._ON_A_CPU", 1)
    parts = label_logps(frozen, trainable, batch.rows, spec, topk_ids_BLK=batch.topk_ids_BLK)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("positions", [5, 1000])
def test_a_frozen_vocabulary_is_projected_once(lora_model, monkeypatch, positions) -> None:
    spec, frozen, trainable = lora_model
    vocab = spec.config.vocab_size
    rng = np.random.default_rng(6)
    batch = random_rows(rng, 4)
    slopes_BL = rng.normal(size=batch.mask_BL.shape).astype(np.float32) * batch.mask_BL
    monkeypatch.setattr("proxykd_jax.training.logprobs._SLICE_ON_A_CPU", positions * 4 * vocab)

    def sliced(adapter):
        return (label_logps(frozen, adapter, batch, spec)[0] * slopes_BL).sum()

    def plain(adapter):
        hidden_BLD = batch_hidden_states(frozen, adapter, batch, config=spec.config)
        logps_BLV = jax.nn.log_softmax(unembed(frozen, hidden_BLD, config=spec.config))
        logps_BL = jnp.take_along_axis(logps_BLV, batch.labels_BL[..., None], axis=-1)[..., 0]
        return (jnp.where(batch.mask_BL, logps_BL, 0.0) * slopes_BL).sum()

    ours, theirs = (jax.value_and_grad(f)(trainable) for f in (sliced, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)
    program = str(jax.make_jaxpr(jax.grad(sliced))(trainable))
    assert len(re.findall(rf"f32\[\d+,{vocab}\] = dot_general", program)) == 1


def _with_places(batch, answers: int, together: int = 1):
    """Returns the batch with its answers' positions listed in each ``TokenBatch`` of it."""
    if isinstance(batch, TokenBatch):
        inside = batch.mask_BL.reshape(-1, together * batch.mask_BL.shape[1])
        places_GA = np.full((len(inside), answers), inside.shape[1], np.int32)
        for group, inside_of_group in zip(places_GA, inside, strict=True):
            found = np.flatnonzero(inside_of_group)
            group[: len(found)] = found
        return batch.replace(places_GA=places_GA)
    names = [
        f.name for f in dataclasses.fields(batch) if isinstance(getattr(batch, f.name), TokenBatch)
    ]
    return batch.replace(
        **{name: _with_places(getattr(batch, name), answers, together) for name in names}
    )


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind, together", [("lora_model", 1), ("full_model", 3)])
def test_vocabulary_at_answers_alone_gives_the_same_step(name, kind, together, request) -> None:
    model = request.getfixturevalue(kind)
    batch = BATCHES[name](np.random.default_rng(8), 6)
    rows = [b for b in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, TokenBatch))]
    most = max(
        int(b.mask_BL.reshape(6 // together, -1).sum(axis=1).max())
        for b in rows
        if isinstance(b, TokenBatch)
    )
    assert most < 12 * together  # otherwise no position would be left out
    everywhere, answers = (
        _step(model, OBJECTIVES[name], b) for b in (batch, _with_places(batch, most, together))
    )
    for ours, theirs in zip(jax.tree.leaves(answers), jax.tree.leaves(everywhere), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_log_probs_stand_where_they_belong(lora_model) -> None:
    spec, frozen, trainable = lora_model
    batch = random_rows(np.random.default_rng(9), 4)
    whole, _, _ = label_logps(frozen, trainable, batch, spec)
    for together in (1, 2, 4):
        grouped = _with_places(batch, 11 * together, together)
        placed, _, _ = label_logps(frozen, trainable, grouped, spec)
        np.testing.assert_allclose(placed[batch.mask_BL], whole[batch.mask_BL], atol=1e-6)
        assert (np.asarray(placed)[~batch.mask_BL] == 0).all()


def test_rows_that_share_places_are_not_dealt_to_parts() -> None:
    batch = random_rows(np.random.default_rng(9), 4)
    assert split_rows(_with_places(batch, 11), 2).places_GA.shape == (2, 2, 11)
    with pytest.raises(ValueError, match="cut into the same parts"):
        split_rows(_with_places(batch, 22, together=2), 2)


def test_gradient_norms_of_the_terms(full_model) -> None:
    spec, frozen, trainable = full_model
    batch = random_distill(np.random.default_rng(7), 4)
    diagnose = make_diagnosis(spec, OBJECTIVES["distill"], microbatches=1)
    state = init_state(trainable, optax.sgd(1.0))
    norms = diagnose(state, frozen, batch)
    nll_only = DistillObjective(0.0, 1.0, "bucket", "example_mean")
    _, metrics = _step(full_model, nll_only, batch)
    np.testing.assert_allclose(norms["grad_norm/nll"], metrics["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(
        norms["grad_norm/kl_to_nll"], norms["grad_norm/kl"] / norms["grad_norm/nll"], rtol=1e-5
    )


def _step(model, objective, batch, microbatches: int = 1):
    spec, frozen, trainable = model
    step = make_train_step(spec, objective, optax.sgd(0.05), microbatches=microbatches, seed=0)
    state = init_state(jax.tree.map(jnp.copy, trainable), optax.sgd(0.05))
    state, metrics = step(state, frozen, batch)
    return state.trainable, {name: float(value) for name, value in metrics.items()}
