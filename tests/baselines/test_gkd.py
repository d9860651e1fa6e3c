"""GKD: its loss on a batch, who answers a step's batch, and a whole tiny run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.baselines import gkd
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.rollouts import Answering, student_answers
from proxykd_jax.config.online_methods import Gkd
from tests.baselines.online import (
    IN_THE_MIDDLE,
    ONLINE,
    SHORT,
    assert_gradient_is_of_value,
    batch_of,
    check_resumed,
    example_mean,
    logps_of,
    loss_of,
    pair,
    steps_of,
)
from tests.baselines.runs import changed, method_recipe


def expected(spec, frozen, trainable, batch, *, beta, temperature) -> float:
    """Computes the paper's definition in float64, with beta on the scorer."""
    p = np.exp(logps_of(frozen["scorer"][0], batch.rows, temperature, spec.vocab_size))
    q = np.exp(logps_of(trainable, batch.rows, 1.0, spec.vocab_size))
    kl = lambda a, b: (a * np.log(a / b)).sum(-1)  # noqa: E731
    if beta in (0, 1):
        value_BL = kl(p, q) if beta == 0 else kl(q, p)
    else:
        m = beta * p + (1 - beta) * q
        value_BL = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return example_mean(value_BL, batch.rows.mask_BL)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("temperature", "vocab_size"), [(1.0, 37), (0.5, 30)])
def test_the_loss_is_the_papers(beta, temperature, vocab_size):
    spec, frozen, trainable = pair(vocab_size)
    batch = batch_of()
    batch.rows.labels_BL[...] = np.minimum(batch.rows.labels_BL, vocab_size - 1)
    loss = jax.jit(loss_of(GkdObjective(beta, temperature, "example_mean"), spec, frozen, batch))
    want = expected(spec, frozen, trainable, batch, beta=beta, temperature=temperature)
    np.testing.assert_allclose(loss(trainable), want, rtol=2e-4)
    swapped = expected(spec, frozen, trainable, batch, beta=1 - beta, temperature=temperature)
    assert (abs(swapped / want - 1) > 5e-3) == (beta != 0.5)


def test_the_gradient_is_that_of_the_answers_held_constant():
    spec, frozen, trainable = pair()
    loss = loss_of(GkdObjective(0.5, 1.0, "example_mean"), spec, frozen, batch_of())
    assert_gradient_is_of_value(loss, trainable)


def test_who_answers_a_batch():
    for seed in (0, 3):
        assert not any(student_answers(seed, step, 0.0) for step in range(200))
        assert all(student_answers(seed, step, 1.0) for step in range(200))
    found = [student_answers(3, step, 0.3) for step in range(2000)]
    assert abs(np.mean(found) - 0.3) < 0.04
    assert found != [student_answers(4, step, 0.3) for step in range(2000)]
    # A step that the student answers at one lambda, it also answers at any greater lambda.
    more = [student_answers(3, step, 0.6) for step in range(2000)]
    assert all(b for a, b in zip(found, more, strict=True) if a)


@pytest.mark.parametrize("beta", [0.01, 0.99])
def test_a_beta_near_an_end_is_warned_of(beta):
    assert "method.beta" in Gkd(beta=beta).warnings()[0]
    assert not any(Gkd(beta=b).warnings() for b in (0.0, 0.05, 0.5, 0.95, 1.0))


def test_a_run_takes_both_kinds_of_batches_and_resumes_bitwise(tiny_files, tmp_path):
    method = {"name": "gkd", "student_share": 0.5, "beta": 0.5, **ONLINE}
    config = method_recipe(tiny_files, tmp_path / "a", method, SHORT)
    assert config.align.alignment == "none" and config.distill.reduction == "example_mean"
    check_resumed(config, tmp_path / "b", IN_THE_MIDDLE)
    warmup, train = steps_of(config, "warmup"), steps_of(config, "train")
    assert len(warmup) == 2 and len(train) == 4
    shares = [line["student_share"] for line in train]
    assert shares == [float(student_answers(3, step, 0.5)) for step in range(4)]
    assert set(shares) == {0.0, 1.0}
    assert (config.folder / "samples" / "scorer").is_dir()


def test_lambda_1_reads_no_fixed_answers_and_lambda_0_draws_none(tiny_files, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("must not be called")

    short = {"distill": {**SHORT["distill"], "max_steps": 2}}
    method = {"name": "gkd", **ONLINE, "warmup_epochs": 0, "student_share": 1.0}
    config = method_recipe(tiny_files, tmp_path, method, short)
    with monkeypatch.context() as patch:
        patch.setattr(gkd, "given_answers", never)
        patch.setattr(gkd, "scorer_text", never)
        distill.main(config)
    config = changed(
        config, {"name": "fixed", "method": {"student_share": 0.0, "fixed": "teacher"}}
    )
    with monkeypatch.context() as patch:
        patch.setattr(Answering, "answer", never)
        distill.main(config)
    assert not steps_of(config, "warmup")
    assert [line["student_share"] for line in steps_of(config, "train")] == [0.0, 0.0]
