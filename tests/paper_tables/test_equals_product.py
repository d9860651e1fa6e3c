"""One seed of the vectorised study equals ``align`` and ``distill`` on the same files."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.miniature import make as maker
from benchmarks.miniature import pretrain
from benchmarks.miniature.recipes import HEADLINE
from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.models import logits_of
from benchmarks.paper_tables.study import Study
from proxykd_jax import align, distill
from proxykd_jax.baselines.rollouts import student_answers
from proxykd_jax.config import Config, load_config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.models.hf_weights import load_model
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_aligned_proxy, load_student
from tests.tiny_run import changed, copy_run

pytestmark = pytest.mark.slow  # some 40 programs to compile

SIZES = s.Sizes(
    num_corpus=300,
    num_test=24,
    num_fresh=30,
    steps_share=0.02,
    overrides=(
        "align.warmup_max_steps=3",
        "align.num_rounds=2",
        "align.round_max_steps=3",
        "align.stop.every=3",
        "align.batch_size=16",
        "distill.max_steps=6",
        "distill.stop.every=3",
        "distill.batch_size=16",
        # Adam's first steps are the signs of the gradients. With its usual eps a rounding error
        # of a gradient near 0 would become a whole step.
        "align.optimizer.eps=1e-3",
        "distill.optimizer.eps=1e-3",
    ),
)
ROUNDING = 2e-5  # nats of a log-prob: six float32 roundings of a log-prob of 8 nats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a finished run of the product on the files of seed 0."""
    out = tmp_path_factory.mktemp("miniature")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "STEPS_A_CALL", 2)
        maker.make(
            out,
            steps_share=SIZES.steps_share,
            num_corpus=SIZES.num_corpus,
            num_test=SIZES.num_test,
            num_fresh=SIZES.num_fresh,
        )
    overrides = [*s.ENOUGH, *SIZES.overrides]
    config = load_config(out / "configs" / f"{HEADLINE}.yaml", overrides)
    align.main(config)
    distill.main(config)
    return config


@pytest.fixture(scope="module")
def study(run: Config) -> Study:
    """Two seeds, so that seed 0 is computed beside another; its models are those of the files."""
    made = Study(s.Setting("fmt", "paper", SIZES), [0, 1], lambda line: None)

    def beside(folder: str) -> Any:
        _, params = load_model(Path(folder), dtype="float32")
        return jax.tree.map(lambda x: np.stack([x, np.flip(x, -1)]), params)

    made.__dict__["student_S"] = beside(run.student.path)
    made.__dict__["proxies"] = px.align(made.setting, made.data, [0, 1], beside(run.proxy.path))
    return made


def _logps(study: Study, model: Any, params: Any) -> np.ndarray:
    logits = jax.jit(lambda p: logits_of(model, p, study.data[0].test.batch))(params)
    mask = study.data[0].test.batch.mask_BL
    return np.asarray(jax.nn.log_softmax(logits))[mask]


def _first(params_S: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[0], params_S)


def test_splits_are_those_of_prepare(study: Study, run: Config) -> None:
    corpus = open_corpus(run.folder / "corpus")
    for name, rows in study.data[0].splits.items():
        found = corpus.split(name)
        stored = found.read(range(len(found)))
        assert [row.row_id for row in stored] == rows.ids
        assert all(
            np.array_equal(a.tokens, b.tokens) for a, b in zip(stored, rows.rows, strict=True)
        )


@pytest.mark.parametrize("which", ["best", "last"])
def test_aligned_proxy_is_that_of_align(study: Study, run: Config, which: str) -> None:
    model = load_aligned_proxy(run, make_mesh(run.mesh), which=which)
    states = study.proxies.best if which == "best" else study.proxies.last
    mine = _logps(study, study.setting.proxy_model, _first(states[px.PREFERENCE]))
    theirs = _logps(study, study.setting.proxy_model, model.params)
    np.testing.assert_allclose(mine, theirs, atol=ROUNDING, rtol=0)
    # Training changed the proxy: the raw proxy is far from it.
    raw = _logps(study, study.setting.proxy_model, _first(states[px.RAW]))
    assert np.abs(mine - raw).max() > 100 * ROUNDING


@pytest.mark.parametrize("which", ["best", "last"])
def test_student_is_that_of_distill(study: Study, run: Config, which: str) -> None:
    method = m.make_methods(study.setting)[m.PROXY_KD]
    trained = m.train(study.material, method, study.student_S, study.validation)
    model = load_student(run, make_mesh(run.mesh), which=which)
    params_S = trained.best if which == "best" else trained.last
    mine = _logps(study, study.setting.student_model, _first(params_S))
    theirs = _logps(study, study.setting.student_model, model.params)
    np.testing.assert_allclose(mine, theirs, atol=ROUNDING, rtol=0)
    before = _logps(study, study.setting.student_model, _first(study.student_S))
    assert np.abs(mine - before).max() > 100 * ROUNDING


def test_student_on_its_own_answers_is_that_of_distill(
    study: Study, run: Config, tmp_path: Path
) -> None:
    method = m.make_methods(study.setting)["proxy_kd_mix"]
    kinds = {student_answers(0, step, method.student_share) for step in range(6)}
    assert kinds == {False, True}
    mixed = changed(
        copy_run(run, tmp_path),
        {"method": {"name": "proxy_kd", "student_share": method.student_share}},
    )
    shutil.rmtree(mixed.folder / "student")
    distill.main(mixed)
    trained = m.train(study.material, method, study.student_S, study.validation)
    model = load_student(mixed, make_mesh(mixed.mesh), which="last")
    mine = _logps(study, study.setting.student_model, _first(trained.last))
    theirs = _logps(study, study.setting.student_model, model.params)
    np.testing.assert_allclose(mine, theirs, atol=ROUNDING, rtol=0)
