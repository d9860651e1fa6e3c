"""Proxy-KD with steps on the student's own answers: their choice, their loss, whole tiny runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import distill, score
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.baselines import beside_scorer as scored_room
from proxykd_jax.baselines import mixing
from proxykd_jax.baselines.beside_scorer import ScoredSpec
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.mixing import MixedObjective
from proxykd_jax.baselines.rollouts import Answer, Answering, answer_batch, student_answers
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.soft_labels import SoftLabelStore
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.params import init_params
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.batch_objectives import DistillObjective
from proxykd_jax.training.restore import load_aligned_proxy
from proxykd_jax.training.state import ModelSpec
from tests.baselines.runs import (
    answer_logps,
    check_stopped_run_equals_unbroken,
    mean_kl,
    untrained_student,
)
from tests.tiny_run import changed, copy_run, files_of, log_lines, recipe
from tests.training.conftest import VOCAB, tiny_config

SHORT: dict[str, Any] = {
    "align": {"alignment": "none"},
    "distill": {"batch_size": 8, "max_steps": 2, "diagnose_every": 2, "stop": {"every": 4}},
}
STEPS, STOP = 7, 3  # of the interrupted run
ALPHA = 10  # from the tiny run's preset


@pytest.fixture(scope="module")
def scored(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns a run with fresh prompts, complete up to ``score``."""
    config = recipe(tiny_files, tmp_path_factory.mktemp("scored"), SHORT)
    assert config.corpus.fresh_prompts and config.distill.alpha == ALPHA
    score.main(config)
    return config


@pytest.fixture(scope="module")
def plain(scored: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns the run without the key."""
    config = copy_run(scored, tmp_path_factory.mktemp("plain"))
    distill.main(config)
    return config


def mixed(scored: Config, runs: Path, share: float, **changes: Any) -> Config:
    """Copies the run with a share of own answers."""
    method = {"name": "proxy_kd", "student_share": share, "max_new_tokens": 4}
    return changed(copy_run(scored, runs), {"method": method, **changes})


def steps_of(config: Config) -> list[dict[str, Any]]:
    return [line for line in log_lines(config, "distill") if "loss" in line]


def timeless(config: Config) -> list[dict[str, Any]]:
    timed = ("time", "time/step_s")
    return [{k: v for k, v in x.items() if k not in timed} for x in log_lines(config, "distill")]


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("must not be called")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Answer]]]:
    """Records the answers of each step that the student answered."""
    found: list[list[Answer]] = []
    answer = Answering.answer

    def noting(self: Answering, *given: Any, **named: Any) -> list[Answer | None]:
        answers = answer(self, *given, **named)
        found.append([a for a in answers if a is not None])
        return answers

    monkeypatch.setattr(Answering, "answer", noting)
    yield found


# --- whole runs -----------------------------------------------------------------------------------


def test_share_0_is_the_run_without_the_key(scored, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(scored_room, "load_scorer", never)
    monkeypatch.setattr(Answering, "answer", never)
    zero = mixed(scored, tmp_path, 0.0)
    distill.main(zero)
    manifests = [read_json(c.folder / "student" / MANIFEST) for c in (plain, zero)]
    assert manifests[0] == manifests[1] and "method" not in manifests[0]["settings"]
    assert files_of(plain.folder / "export") == files_of(zero.folder / "export")
    assert timeless(plain) == timeless(zero)


def test_share_1_takes_no_step_on_stored_labels(scored, tmp_path, monkeypatch, asked):
    """Also checks the first step's loss in float64, from the models and the drawn answers. Rows are
    packed: a step has as many answers as its batch has places."""
    changes = {"max_steps": 2, "batching": "pack", "microbatch_size": 4}
    config = mixed(scored, tmp_path, 1.0, distill=changes)
    monkeypatch.setattr(SoftLabelStore, "read", never)
    distill.main(config)
    steps = steps_of(config)
    assert len(steps) == len(asked) == 2
    assert all(line["student_share"] == 1 and "nll" not in line for line in steps)
    assert all(len(answers) == 8 for answers in asked)
    rows = [answer.row for answer in asked[0]]
    assert all(1 <= len(row.answer) <= 4 for row in rows)
    p = answer_logps(load_aligned_proxy(config, make_mesh(config.mesh)), rows)
    q = answer_logps(untrained_student(config), rows)
    assert steps[0]["own_kl"] == pytest.approx(mean_kl(p, q), rel=1e-4)
    assert abs(mean_kl(q, p) / mean_kl(p, q) - 1) > 1e-2
    assert steps[0]["loss"] == pytest.approx(ALPHA * steps[0]["own_kl"], rel=1e-6)
    assert read_json(config.folder / "student" / MANIFEST)["settings"]["method"]


def test_a_share_in_between_takes_both_and_resumes_bitwise(scored, tmp_path, monkeypatch, asked):
    config = mixed(scored, tmp_path / "a", 0.5, distill={"max_steps": STEPS})
    stopped = copy_run(config, tmp_path / "b")
    check_stopped_run_equals_unbroken(config, Path(stopped.runs_dir), monkeypatch, at=STOP)
    steps = steps_of(config)
    own = [student_answers(config.seed, step, 0.5) for step in range(STEPS)]
    assert set(own[:STOP]) == set(own[STOP:]) == {True, False}
    assert [line["student_share"] for line in steps] == [float(x) for x in own]
    assert [{"own_kl"} <= line.keys() for line in steps] == own
    assert [{"nll", "kl", "weighted_kl"} <= line.keys() for line in steps] == [not x for x in own]
    # Every second step is diagnosed if it has two terms.
    diagnosed = ["grad_norm/kl" in line for line in steps]
    assert diagnosed == [step % 2 == 0 and not own[step] for step in range(STEPS)]
    prompts = open_corpus(config.folder / "corpus").split("fresh")
    fresh = set(AnsweredSplit(prompts, SampleStore(config.folder / "samples" / "fresh")).row_ids)
    learnt = {answer.row.row_id for answers in asked for answer in answers}
    assert learnt & fresh and learnt - fresh


def test_stored_steps_are_those_of_eq_11(scored, plain, tmp_path):
    """Steps before the first own answers equal the plain run's; noise in labels changes them."""
    seed = next(s for s in range(100) if [student_answers(s, i, 0.5) for i in (0, 1)] == [0, 1])
    # Another seed would make another corpus, so only the choice of steps gets one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "student_answers", lambda _, i, s: student_answers(seed, i, s))
        config = mixed(scored, tmp_path / "mixed", 0.5)
        distill.main(config)
        read = SoftLabelStore.read

        def noisy(self: SoftLabelStore, *given: Any) -> Any:
            return [
                SimpleNamespace(ids=x.ids, logps=x.logps[:, ::-1], tail_logps=x.tail_logps)
                for x in read(self, *given)
            ]

        patch.setattr(SoftLabelStore, "read", noisy)
        noise = mixed(scored, tmp_path / "noise", 0.5)
        distill.main(noise)
    first, other, disturbed = (steps_of(c)[0] for c in (config, plain, noise))
    for name in ("loss", "nll", "kl", "weighted_kl", "sample_weight", "grad_norm"):
        assert first[name] == pytest.approx(other[name], rel=1e-5), name
    assert abs(disturbed["kl"] / first["kl"] - 1) > 1e-2
    assert steps_of(config)[1]["student_share"] == 1


# --- the objective --------------------------------------------------------------------------------


def test_the_gradient_on_own_answers_is_alpha_times_the_forward_kls():
    """The reference holds answers constant and uses the plain forward pass; one place is empty, and
    so is one answer."""
    config = tiny_config()
    model = ModelSpec(config, "full", "float32", "none")
    spec = ScoredSpec(model, model, VOCAB)
    proxy, student = (init_params(jax.random.key(i), config) for i in (8, 3))
    rng = np.random.default_rng(0)
    answers: list[Answer | None] = [
        Answer(TokenRow(rng.integers(3, VOCAB, 10).astype(np.int32), n, str(n)), True, True)
        for n in (2, 5, 8, 10)
    ]
    batch = answer_batch([*answers, None], 12)
    alpha = 7.0
    stored = DistillObjective(alpha, 1.0, "bucket", "example_mean")
    objective = MixedObjective(stored, GkdObjective(0.0, 1.0, "example_mean", alpha))

    def loss(trainable: Any) -> jax.Array:
        models = spec.bind({"student": {}, "scorer": (proxy, None)}, trainable)
        return objective.share(models, batch, objective.counts(batch), spec, None)[0]

    def reference(trainable: Any) -> jax.Array:
        logps = [
            jax.nn.log_softmax(
                forward(params, None, jnp.asarray(batch.rows.tokens_BL), config=config)
            )
            for params in (proxy, trainable)
        ]
        mask_BL = jnp.asarray(batch.rows.mask_BL, jnp.float32)
        kl_BL = mask_BL * (jnp.exp(logps[0]) * (logps[0] - logps[1])).sum(-1)
        tokens_B = mask_BL.sum(-1)
        there_B = tokens_B > 0
        return alpha * (kl_BL.sum(-1) / jnp.maximum(tokens_B, 1)).sum() / there_B.sum()

    found, wanted = (jax.jit(jax.value_and_grad(f))(student) for f in (loss, reference))
    assert int(np.asarray(batch.rows.mask_BL).any(-1).sum()) == 3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, sections, said",
    [
        ({"student_share": 1.5}, {}, "method.student_share: .*less than or equal to 1"),
        ({"student_share": -0.1}, {}, "method.student_share: .*greater than or equal to 0"),
        ({"student_share": 0.5}, {"distill": {"alpha": 0}}, "and distill.alpha is 0; give it a"),
        ({"student_share": 0.5}, {"score": {"temperature": 2.0}}, "score.temperature is 2.0; set"),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, sections, said):
    with pytest.raises(UserError, match=said):
        recipe(tiny_files, tmp_path, {"method": {"name": "proxy_kd", **method}}, sections)


@pytest.mark.parametrize("name", ["black_box_kd", "takd", "gkd", "random_labels"])
def test_a_method_without_fresh_prompts_refuses_them(tiny_files, tmp_path, name):
    said = f"corpus.fresh_prompts: method {name} does not use these prompts; remove them"
    with pytest.raises(UserError, match=said):
        recipe(tiny_files, tmp_path, {"method": name})
    none = {"corpus": {"fresh_prompts": []}}
    assert recipe(tiny_files, tmp_path, none, {"method": name}).method.name == name


def test_fresh_prompts_beside_alpha_0_are_warned_of(scored, tmp_path, capsys):
    config = changed(copy_run(scored, tmp_path), {"distill": {"alpha": 0.0, "max_steps": 1}})
    distill.main(config)
    assert "nothing is learnt from corpus.fresh_prompts" in capsys.readouterr().err
