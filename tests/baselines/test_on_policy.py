"""On-policy distillation: two forms of one gradient, and a whole tiny run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.baselines import on_policy
from proxykd_jax.baselines import online as online_phases
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.on_policy import OnPolicyObjective
from proxykd_jax.baselines.rollouts import Answer, answer_batch
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.training.batch_objectives import NllObjective
from tests.baselines.online import (
    ONLINE,
    SHORT,
    assert_gradient_is_of_value,
    batch_of,
    check_resumed,
    logps_of,
    loss_of,
    pair,
    steps_of,
)
from tests.baselines.runs import method_recipe
from tests.training.conftest import VOCAB


def test_the_sampled_forms_expected_gradient_is_the_full_forms():
    """Each token is once a one-token answer, weighted with its probability."""
    spec, frozen, trainable = pair()
    prompt = np.array([5, 9, 4], np.int32)
    every = [
        Answer(TokenRow(np.append(prompt, token).astype(np.int32), 3, str(token)), False, True)
        for token in range(VOCAB)
    ]
    batch = answer_batch(every, 12)
    q_V = np.exp(logps_of(trainable, batch.rows)[0, 2])

    def expected_gradient(form):
        objective = OnPolicyObjective(form, 2.0, "token_mean")
        rows = jax.tree.map(lambda x: jnp.asarray(x)[:, None], batch)
        losses = lambda t: jax.lax.map(  # noqa: E731
            lambda row: loss_of(objective, spec, frozen, row)(t), rows
        )
        return jax.jit(jax.grad(lambda t: jnp.vdot(losses(t), jnp.asarray(q_V, jnp.float32))))(
            trainable
        )

    for sampled, full in zip(
        *(jax.tree.leaves(expected_gradient(form)) for form in ("sampled", "full")), strict=True
    ):
        scale = np.abs(full).max()
        np.testing.assert_allclose(sampled, full, atol=2e-4 * scale + 1e-7)


def test_the_full_form_is_gkd_with_beta_1():
    spec, frozen, trainable = pair()
    batch = batch_of()
    values = [
        jax.jit(jax.value_and_grad(loss_of(objective, spec, frozen, batch)))(trainable)
        for objective in (
            OnPolicyObjective("full", 1.0, "example_mean"),
            GkdObjective(1.0, 1.0, "example_mean"),
        )
    ]
    for a, b in zip(*(jax.tree.leaves(v) for v in values), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_the_sampled_value_is_the_mean_log_ratio_times_coef():
    spec, frozen, trainable = pair()
    batch = batch_of()
    ratio_BLV = logps_of(trainable, batch.rows) - logps_of(frozen["scorer"][0], batch.rows)
    gold_BL = np.take_along_axis(ratio_BLV, batch.rows.labels_BL[..., None], -1)[..., 0]
    loss = loss_of(OnPolicyObjective("sampled", 3.0, "token_mean"), spec, frozen, batch)
    np.testing.assert_allclose(loss(trainable), 3 * gold_BL[batch.rows.mask_BL].mean(), rtol=1e-4)
    full = loss_of(OnPolicyObjective("full", 3.0, "token_mean"), spec, frozen, batch)
    assert_gradient_is_of_value(full, trainable)


def test_a_run_uses_prompts_alone_fresh_ones_too_and_resumes_bitwise(
    tiny_files, tmp_path, monkeypatch
):
    """Without a warm-up there is no NLL, and batches hold no row's own answer."""

    def never(*_, **__):
        raise AssertionError("must not be called")

    monkeypatch.setattr(NllObjective, "share", never)
    monkeypatch.setattr(on_policy, "scorer_text", never)
    seen = []
    monkeypatch.setattr(
        online_phases,
        "answer_batch",
        lambda answers, length: seen.extend(answers) or answer_batch(answers, length),
    )
    fresh = [{"path": str(tiny_files / "fresh.jsonl"), "format": "prompt_response"}]
    method = {"name": "on_policy", "scorer": "unaligned", **ONLINE, "warmup_epochs": 0}
    method |= {"samples_per_prompt": 2}
    config = method_recipe(
        tiny_files,
        tmp_path / "a",
        method,
        {**SHORT, "corpus": {"fresh_prompts": fresh}, "align": {"alignment": "none"}},
    )
    check_resumed(config, tmp_path / "b", 3)
    train = steps_of(config, "train")
    assert len(train) == 4 and not any("nll" in line for line in train)
    assert all(line["student_share"] == 1.0 for line in train)
    assert all(answer.sampled for answer in seen if answer is not None)
    results = distill.main(config).results
    assert results[0]["rows"] == 11 + 65 + 52 + 14
    assert [found["phase"] for found in results] == ["untrained", "warmup", "train"]


@pytest.mark.parametrize("form", ["full", "sampled"])
def test_the_aligned_proxy_is_the_default_scorer(tiny_files, tmp_path, form):
    method = {"name": "on_policy", "form": form, **ONLINE}
    config = method_recipe(tiny_files, tmp_path, method, SHORT)
    assert config.align.alignment == "nll_preference" and config.needs == "proxy"
