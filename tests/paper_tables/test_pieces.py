"""Rows, plans, labels and objectives of the study against what they stand for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.paper_tables import adversarial, mixing, models, offline, on_policy, seeds, sweeps
from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.training import every_row, order_of
from benchmarks.paper_tables.vectorise import CHUNK, filled, in_chunks, over_seeds
from proxykd_jax.baselines.gad import GadObjective, GadWarmupObjective, game_batch
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.minillm import MiniLlmObjective, rollout_batch
from proxykd_jax.baselines.mixing import MixedObjective
from proxykd_jax.baselines.on_policy import OnPolicyObjective
from proxykd_jax.baselines.rollouts import AnswerBatch, given_answers
from proxykd_jax.config import PreferenceConfig
from proxykd_jax.config.online_methods import MiniLlm
from proxykd_jax.data.collate import collate_rows
from proxykd_jax.data.sample_weights import weights_of
from proxykd_jax.generation.label_batch import TopKLabels
from proxykd_jax.losses import draw_labels
from proxykd_jax.models.params import init_params
from proxykd_jax.random_keys import purpose_seed, row_words
from proxykd_jax.training.batch_objectives import AlignObjective, DistillObjective, NllObjective
from proxykd_jax.training.batches import make_plan
from proxykd_jax.training.distillation import text_phase
from proxykd_jax.types import DistillBatch

MODEL = pretrain.model_config(16, 24, 1)


@pytest.fixture(scope="module")
def rows() -> seeds.Rows:
    world = w.make_worlds(3, "fmt").teacher
    prompts = w.PromptPool(3).take(40)
    answers = w.sample_answers(world, prompts, np.random.default_rng(0))
    return seeds.rows_of(prompts, answers)


def test_rows_of_samples_are_collated_rows(rows: seeds.Rows) -> None:
    expected = collate_rows([[row] for row in rows.rows], s.ROW_LENGTH - 1, 1, len(rows.rows))
    # What stands beyond an answer's end must not matter.
    found = on_policy.rows_of_samples(
        *map(jnp.asarray, (rows.prompts_NP, rows.answers_NT, rows.answer_lengths))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_orders_are_the_products(rows: seeds.Rows) -> None:
    sizes = s.Sizes(overrides=("distill.max_steps=3", "distill.batch_size=16"))
    setting = s.Setting("fmt", "paper", sizes)
    config = setting.config.distill
    lengths = np.array([len(row.tokens) - 1 for row in rows.rows])
    plan = make_plan(
        lengths,
        seed=purpose_seed(7, "distill"),
        batch_size=config.batch_size,
        batching=config.batching,
        max_length=s.ROW_LENGTH,
    )
    expected = [batch.rows for epoch in range(2) for batch in plan(epoch)]
    phase = text_phase(setting.run("distill", 7, {"distill": rows}), {"distill": rows})
    assert phase.steps == 3 and len(expected) == 6
    for found in (order_of(phase), order_of(phase, 6)):
        steps = [tuple(() if row < 0 else (row,) for row in step) for step in found]
        assert steps == expected[: len(found)]
    empty = {"distill": seeds.Rows([])}
    with pytest.raises(ValueError, match="no rows"):
        order_of(text_phase(setting.run("distill", 7, empty), empty))


def test_padding_of_an_order_takes_the_last_row(rows: seeds.Rows) -> None:
    phase = text_phase(s.Setting("fmt", "paper").run("distill", 7, {}), {"distill": rows})
    assert phase.collate is not None
    pool = phase.collate(every_row(len(rows)))
    jax.tree.map(np.testing.assert_array_equal, pool, rows.batch)
    assert pool.mask_BL[0].any() and not pool.mask_BL[-1].any()
    assert not pool.example_mask_BS[-1].any()


def test_chunks_are_the_whole() -> None:
    sizes = (3, CHUNK + 5)
    trees = [{"x": np.arange(size, dtype=np.int32)[:, None]} for size in sizes]
    found = in_chunks(lambda part: {"x": 2 * part["x"]}, trees)
    for tree, its in zip(trees, found, strict=True):
        np.testing.assert_array_equal(its["x"], 2 * tree["x"])
    np.testing.assert_array_equal(filled(trees)["x"][0, :5, 0], [0, 1, 2, 2, 2])


def test_over_seeds_is_the_function_of_each() -> None:
    x_SN = np.arange(6.0).reshape(3, 2)
    found = over_seeds(lambda factor, x: factor * x.sum(), num_shared=1)(np.float32(2), x_SN)
    np.testing.assert_array_equal(found, 2 * x_SN.sum(axis=1))


def test_true_labels_are_the_teachers(rows: seeds.Rows) -> None:
    world = w.make_worlds(3, "fmt").teacher
    teacher = seeds.AnalyticTeacher([world], [3])
    (logps,) = teacher.logps([rows.prompts_NP], [rows.answers_NT])
    whole = offline.at_places(logps, rows.batch.tokens_BL.shape)
    said = np.take_along_axis(whole, rows.batch.labels_BL[..., None], axis=-1)[..., 0]
    # The teacher wrote these answers, so it finds each of their tokens possible.
    assert np.isfinite(said[rows.batch.mask_BL]).all()
    np.testing.assert_allclose(np.exp(whole).sum(axis=-1), 1, rtol=1e-5)


def test_objectives_are_the_products(material: offline.Material) -> None:
    methods = m.make_methods(material.setting)
    expected = {
        "minillm": MiniLlmObjective(0.2, True, 0.0, 0.0),
        "gkd": GkdObjective(0.5, 1.0, "example_mean"),
        "on_policy": OnPolicyObjective("full", 1.0, "example_mean"),
        "on_policy_mix": GkdObjective(0.5, 1.0, "example_mean"),
    }
    for name, objective in expected.items():
        *_, phases = on_policy.method_phases(material, methods[name].section)
        assert all(phase.objective == objective for phase in phases)
    warmup, preference = on_policy.method_phases(material, on_policy.SODA)
    assert warmup[0].objective == NllObjective("example_mean")
    assert preference[0].objective == AlignObjective(
        PreferenceConfig(loss="dpo", beta=0.1), "example_mean", 0.0, 1.0
    )
    assert [phases[0].objective for phases in adversarial.phases_of(material, 1)] == [
        GadWarmupObjective("token_mean"),
        GadObjective(0.001, 1, 0.8, "token_mean"),
    ]


def labels_of(rows: seeds.Rows, top_k: int) -> TopKLabels:
    """Labels that differ from position to position."""
    rng = np.random.default_rng(0)
    places = rows.batch.tokens_BL.shape
    ids = rng.integers(w.VOCAB_SIZE, size=(*places, top_k)).astype(np.int32)
    logps = -rng.gamma(2.0, size=(*places, top_k + 2)).astype(np.float32)
    return TopKLabels(ids, logps[..., :-2], logps[..., -2], logps[..., -1])


def test_a_students_phase_is_the_methods(material: offline.Material, rows: seeds.Rows) -> None:
    """Tail, temperature and terms; alpha and eq. 9 are in the weights, and labels in places."""
    first = offline.Source("distill", labels=px.NLL)
    written = offline.Source("distill", writer=px.NLL, labels=px.NLL, nll=False)
    method = offline.Method((first, written), 3.0, True, 2.0, tail="bucket")
    labels = labels_of(rows, material.setting.config.score.top_k)
    material._rows["distill", px.NLL] = material.rows("distill")
    for source in method.sources:
        material._labels[dataclasses.replace(source, nll=True), 2.0] = [labels] * 2
    phase = offline.phases_of(material, method)[1]
    assert phase.objective == DistillObjective(1.0, 1.0, "bucket", "example_mean", 2.0, False)
    assert phase.collate is not None
    pool, count = phase.collate(every_row(2 * len(rows))), len(rows)
    mask = rows.batch.mask_BL[:-1]
    np.testing.assert_array_equal(pool.rows.mask_BL[:count], mask)
    for half in (slice(0, count), slice(count, 2 * count)):
        for name, its in (
            ("topk_ids_BLK", labels.ids_K),
            ("topk_logps_BLK", labels.logps_K),
            ("tail_logps_BL", labels.tail_logps),
        ):
            np.testing.assert_array_equal(getattr(pool, name)[half][mask], its[:-1][mask])
    logliks = np.where(mask, labels.gold_logps[:-1], 0).astype(np.float64).sum(axis=1)
    expected = weights_of(logliks, rows.answer_lengths, rows.finished).sample_weight
    np.testing.assert_array_equal(pool.sample_weight_BS[:count, 0], np.float32(3) * expected)
    assert (pool.sample_weight_BS[count:-1] == 3).all() and pool.sample_weight_BS[-1] == 0
    assert pool.nll_mask_BS[:count].all() and not pool.nll_mask_BS[count:].any()


@pytest.mark.parametrize("is_own", [False, True])
def test_a_mixed_step_has_the_loss_of_its_kind(is_own: bool, rows: seeds.Rows) -> None:
    """With stand-ins of the two objectives: value and gradient are those of one alone."""

    class Stored:
        def counts(self, batch: DistillBatch) -> dict[str, float]:
            return {"mine": 1.0}

        def share(self, models, batch, counts, spec, key):
            assert counts == {"mine": 1.0} and spec == "student's"  # not the other's
            return models[0] ** 2, {}

    class Own:
        def counts(self, batch: AnswerBatch) -> dict[str, float]:
            return {"mine": 2.0}

        def share(self, models, batch, counts, spec, key):
            assert counts == {"mine": 2.0} and isinstance(spec, Spec)
            return models["student"][0] ** 3, {"divergence": None}

    class Spec:
        student = "student's"

    nobody_B = np.zeros(len(rows) + 1, bool)
    objective = mixing.EitherObjective(MixedObjective(Stored(), Own()))
    own = AnswerBatch(rows.batch, nobody_B, nobody_B)
    stored = DistillBatch(rows.batch, *[None] * 5)
    batch = mixing.EitherBatch(stored, own, is_own)

    def loss(x: jax.Array) -> jax.Array:
        counts = objective.counts(batch)
        return objective.share({"student": (x, None)}, batch, counts, Spec(), None)[0]

    value, slope = jax.value_and_grad(loss)(5.0)
    assert (float(value), float(slope)) == ((125.0, 75.0) if is_own else (25.0, 10.0))


@pytest.mark.parametrize("preset", s.PRESETS)
def test_sweeps_change_one_thing_each(preset: str) -> None:
    base = s.Setting("fmt", preset)
    for change in sweeps.CHANGES[preset].values():
        sizes = dataclasses.replace(s.Sizes(), overrides=change.overrides, **change.sizes)
        changed = s.Setting("fmt", preset, sizes)
        assert changed.config != base.config or sizes.prompts != base.sizes.prompts
        assert set(change.students) <= set(m.METHODS)
        assert change.students or change.states


def test_rollouts_divide_a_students_steps() -> None:
    assert on_policy.rollout_sizes(s.Setting("fmt", "paper"), MiniLlm()) == (4, 4)
    for steps in (1, 2, 6, 12, 20):
        sizes = s.Sizes(overrides=(f"distill.max_steps={steps}",))
        epochs, count = on_policy.rollout_sizes(s.Setting("fmt", "paper", sizes), MiniLlm())
        assert steps % (epochs * count) == 0


def test_rollout_batch_can_be_traced(rows: seeds.Rows) -> None:
    there_B = rows.batch.mask_BL.any(axis=-1)
    answers = AnswerBatch(rows.batch, there_B, there_B)
    old_BL, scorer_BL = -np.random.default_rng(0).gamma(2.0, size=(2, *rows.batch.mask_BL.shape))
    expected = rollout_batch(answers, old_BL, scorer_BL, None, MiniLlm())
    traced = jax.jit(lambda *arrays: rollout_batch(*arrays, None, MiniLlm()))
    found = traced(answers, old_BL, scorer_BL)
    assert np.abs(expected.advantages_BL).max() > 0.1
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_judged_answers_are_the_products_batch(rows: seeds.Rows) -> None:
    given = given_answers(rows.rows, (w.END,))
    expected = game_batch(given, given, s.ROW_LENGTH)
    found, last = adversarial.judged_answers(
        *map(jnp.asarray, (rows.prompts_NP, rows.answers_NT, rows.answer_lengths)),
        jnp.asarray(rows.finished),
    )
    length = expected.teacher.rows.tokens_BL.shape[1]
    np.testing.assert_array_equal(last, expected.teacher_last_P)
    np.testing.assert_array_equal(found.finished_B, expected.teacher.finished_B)
    for name in ("tokens_BL", "labels_BL", "mask_BL"):
        mine, theirs = getattr(found.rows, name), getattr(expected.teacher.rows, name)
        common = min(length, mine.shape[1])
        np.testing.assert_array_equal(mine[:, :common], theirs[:, :common])
        assert not mine[:, common:].any() and not theirs[:, common:].any()


@pytest.fixture(scope="module")
def material(rows: seeds.Rows) -> offline.Material:
    """Two seeds of a tiny student and a proxy that is another model of its shape."""
    sizes = s.Sizes(
        overrides=("distill.max_steps=4", "distill.stop.every=1", "distill.batch_size=4")
    )
    setting = s.Setting("fmt", "paper", sizes, MODEL, MODEL)
    worlds = w.make_worlds(3, "fmt")
    data = [seeds.Seed(worlds, {"distill": rows}, rows, rows.prompts_NP, np.zeros(0))] * 2
    return offline.Material(setting, data, [0, 1], {px.RAW: models_of(2)}, None)


def models_of(first: int) -> object:
    """One model a seed."""
    return jax.vmap(lambda key: init_params(key, MODEL))(jax.random.split(jax.random.key(first)))


def test_drawn_labels_are_those_of_each_seed(rows: seeds.Rows) -> None:
    params_S = models_of(5)
    found = models.drawn_labels(MODEL, params_S, [rows, rows], seeds=[0, 7], num_draws=4)
    logits_S = models.distributions(MODEL, params_S, [rows, rows])
    words = np.array([row_words(row_id)[0] for row_id in rows.ids])
    for (ids, shares), logits, seed in zip(found, logits_S, (0, 7), strict=True):
        expected = draw_labels(
            jnp.asarray(logits), jax.random.key(seed), num_draws=4, row_ids_B=words
        )
        np.testing.assert_array_equal(ids[:-1], expected.ids_BLK)
        np.testing.assert_allclose(np.exp(shares[:-1]) * 4, expected.counts_BLK, atol=1e-6)


@pytest.mark.slow  # a program of its own to compile
def test_gads_discriminator_learns_at_every_step(material: offline.Material) -> None:
    student_S = models_of(0)
    validation = filled([rows.batch for rows in material.rows("distill")])
    run = adversarial.start(material, student_S, validation)
    heads = [run.state.trainable["discriminator"]["score_head"]["kernel"]]
    for _ in range(2):
        adversarial.warm_up(run, material)
        heads.append(run.state.trainable["discriminator"]["score_head"]["kernel"])
    for before, after in itertools.pairwise(heads):
        assert (np.abs(np.asarray(after - before)).max(axis=-1) > 0).all()
    # What is measured is the student, not the pair.
    assert jax.tree.structure(run.last) == jax.tree.structure(student_S)


def test_presets_differ_in_proxy_kd_alone() -> None:
    paper, recommended = (m.make_methods(s.Setting("fmt", preset)) for preset in s.PRESETS)
    assert set(paper) == set(recommended) == set(m.METHODS)
    for name in m.OF_NO_PRESET:
        assert paper[name] == recommended[name]
    assert paper[m.PROXY_KD].alpha == 100 and recommended[m.PROXY_KD].alpha == 10
    assert [source.prompts for source in paper[m.PROXY_KD].sources] == ["distill"]
    prompts = [source.prompts for source in recommended[m.PROXY_KD].sources]
    assert prompts == ["warmup", "align", "distill", "fresh"]


def test_presets_share_corpus_and_proxies() -> None:
    """What one preset has pre-trained and aligned is not made again for the other."""
    paper, recommended = (s.Setting("fmt", preset) for preset in s.PRESETS)
    assert paper.rows == recommended.rows
    assert paper.config.align == recommended.config.align
    other = s.Sizes(overrides=("corpus.shares={warmup: 0.1, align: 0.8, distill: 0.1}",))
    assert s.Setting("fmt", "paper", other).rows != paper.rows
    assert s.Setting("fmt", "paper", s.Sizes(num_fresh=5)).rows != paper.rows


def test_no_method_but_the_ceiling_sees_the_teachers_distribution() -> None:
    for name, method in m.make_methods(s.Setting("fmt", "paper")).items():
        if isinstance(method, offline.Method):
            seen = any(source.labels == offline.TRUTH for source in method.sources)
            assert seen == (name == "teacher_logits")
