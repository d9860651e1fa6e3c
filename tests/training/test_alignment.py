"""align.main on a tiny run: the reference of a round, its samples, and the kept checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import align
from proxykd_jax.artifacts import MANIFEST, complete_stage, read_json, read_manifest
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import TokenCorpus, open_corpus
from proxykd_jax.data.parts import PartFolder
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import KEPT, SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training import draw_answers, reference
from proxykd_jax.training import phase as phase_module
from proxykd_jax.training.model import Model
from proxykd_jax.training.restore import load_aligned_proxy
from proxykd_jax.training.state import TrainState
from tests.tiny_run import (
    copy_run,
    files_of,
    log_lines,
    recipe,
    scripted_validation,
    unfinish,
    whole_logps,
)

LN_2 = math.log(2)


def proxy_at(config: Config, which: Any) -> Model:
    return load_aligned_proxy(config, make_mesh(config.mesh), which)


def steps_of(config: Config) -> dict[str, int]:
    """Returns the step at which each phase ended."""
    results = read_json(config.folder / "proxy" / MANIFEST)["results"]
    return {result["phase"]: result["step"] for result in results}


def logliks(model: Model, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns log pi(answer | prompt) of each pair, from whole softmaxes."""
    rows = [np.concatenate(pair) for pair in pairs]
    sums = []
    for (prompt, _), tokens, logps_LV in zip(pairs, rows, whole_logps(model, rows), strict=True):
        places = np.arange(len(prompt), len(tokens))
        sums.append(logps_LV[places - 1, tokens[places]].sum())
    return np.array(sums)


@dataclasses.dataclass
class Round:
    """A round's pairs, y and y-hat, with their stored references, without dropped y-hat."""

    chosen: list[tuple[np.ndarray, np.ndarray]]
    rejected: list[tuple[np.ndarray, np.ndarray]]
    references: np.ndarray  # [2, n]


def read_round(config: Config, corpus: TokenCorpus, number: int) -> Round:
    store = SampleStore(config.folder / "samples" / f"round_{number:02d}")
    rows = corpus.split("align").read(store.rows)
    kept = store.drops == KEPT
    pairs = []
    for row, sample in zip(rows, store.read(range(len(store))), strict=True):
        assert row.row_id == sample.row_id
        if sample.drop == KEPT:
            pairs.append((row, sample))
    return Round(
        [(row.prompt, row.tokens[row.prompt_length :]) for row, _ in pairs],
        [(row.prompt, sample.tokens) for row, sample in pairs],
        np.stack(store.references())[:, kept],
    )


@pytest.fixture(scope="module")
def corpus(finished_run: Config) -> TokenCorpus:
    return open_corpus(finished_run.folder / "corpus")


@pytest.fixture
def before_round_two(finished_run: Config, tmp_path: Path) -> Config:
    """Copies the run and cuts it off after the answers of the second round were drawn."""
    config = copy_run(finished_run, tmp_path)
    unfinish(config, "proxy", steps_of(config)["round_01"])
    return config


@pytest.mark.parametrize("number, start", [(1, "warmup"), (2, "round_01")])
def test_the_reference_is_the_proxy_at_the_rounds_start(finished_run, corpus, number, start):
    """It is neither the base model (with the adapter off) nor the model after the round."""
    steps = steps_of(finished_run)
    pairs = read_round(finished_run, corpus, number)
    assert len(pairs.chosen) > 20

    def gap(which: int) -> float:
        model = proxy_at(finished_run, which)
        found = np.array([logliks(model, pairs.chosen), logliks(model, pairs.rejected)])
        return float(np.abs(found - pairs.references).mean())

    model = proxy_at(finished_run, steps[start])
    for sums, stored in zip((pairs.chosen, pairs.rejected), pairs.references, strict=True):
        np.testing.assert_allclose(logliks(model, sums), stored, atol=1e-4)
    assert gap(steps["raw"]) > 0.3
    assert gap(steps[f"round_{number:02d}"]) > 0.3


@pytest.mark.parametrize("phase", ["round_01", "round_02"])
def test_a_round_begins_at_ln_2_and_leaves_it(finished_run, phase):
    """Policy and reference are the same model only at the start of a round: the round starts from
    the adapter of the round before, and the reference does not follow it."""
    steps = [line for line in log_lines(finished_run, "align") if "preference" in line]
    steps = [line for line in steps if line["phase"] == phase]
    assert len(steps) >= 4
    assert abs(steps[0]["preference"] - LN_2) < 1e-3
    assert abs(steps[0]["reward_chosen"]) < 1e-4 and abs(steps[0]["reward_rejected"]) < 1e-4
    assert all(abs(line["preference"] - LN_2) > 1e-2 for line in steps[1:])


def test_adam_goes_on_from_round_to_round(finished_run):
    """One optimizer serves the whole stage, so its count is the number of steps taken."""
    import orbax.checkpoint as ocp

    last = steps_of(finished_run)["round_02"]
    path = finished_run.folder.resolve() / "proxy" / "checkpoints" / str(last) / "state"
    state = ocp.StandardCheckpointer().restore(path)
    counts = [
        int(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(state["opt_state"])
        if "count" in jax.tree_util.keystr(key)
    ]
    assert counts and set(counts) == {last}


def test_slices_are_disjoint_and_cover_the_split(finished_run, corpus):
    slices = [
        SampleStore(finished_run.folder / "samples" / name).rows
        for name in ("round_01", "round_02")
    ]
    assert all(len(rows) for rows in slices)
    together = np.concatenate(slices)
    assert sorted(together) == list(range(len(corpus.split("align"))))
    assert list(together) != sorted(together)


def test_a_finished_alignment_is_left_alone(finished_run):
    before = files_of(finished_run.folder, times=True)
    result = align.main(finished_run)
    assert files_of(finished_run.folder, times=True) == before
    assert result.last_step == steps_of(finished_run)["round_02"]


def test_a_restarted_round_does_not_sample_again(finished_run, before_round_two, monkeypatch):
    config = before_round_two
    samples = files_of(config.folder / "samples", times=True)

    def never(*args, **options):
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr(draw_answers, "make_draw", lambda *args, **options: never)
    align.main(config)
    assert files_of(config.folder / "samples", times=True) == samples
    keys = ("content", "results", "best_step", "last_step")
    ours, theirs = (read_json(c.folder / "proxy" / MANIFEST) for c in (config, finished_run))
    assert [ours[key] for key in keys] == [theirs[key] for key in keys]


def test_the_log_says_what_a_round_did(finished_run, corpus):
    lines = log_lines(finished_run, "align")
    for number, phase in enumerate(("round_01", "round_02"), 1):
        (after,) = (x for x in lines if x["phase"] == phase and "after/reward_margin" in x)
        validation = [x for x in lines if x["phase"] == phase and "validation/nll" in x][-1]
        step = steps_of(finished_run)[phase]
        assert after["step"] == validation["step"] == step
        assert 0 <= validation["validation/agreement"] <= 1
        store = SampleStore(finished_run.folder / "samples" / phase)
        assert {k: v for k, v in after.items() if k.startswith("samples/")} == {
            f"samples/{k}": v for k, v in store.counts().items()
        }
        assert after["samples/finish_rate"] == pytest.approx(store.finished.mean())
        assert after["time/sampled_rows"] == len(store) and after["time/sampling_s"] > 0
        for reason in ("empty", "equals_chosen"):
            assert after[f"samples/dropped_{reason}"] <= after["samples/rows"]
        # The rewards are those of the round's last state relative to its stored references (eq. 4).
        pairs, model = read_round(finished_run, corpus, number), proxy_at(finished_run, step)
        beta = finished_run.align.preference.beta
        sums = np.array([logliks(model, pairs.chosen), logliks(model, pairs.rejected)])
        chosen, rejected = beta * (sums - pairs.references)
        assert after["after/reward_margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-3)
        assert after["after/reward_accuracy"] == pytest.approx((chosen > rejected).mean())
        assert after["after/reward_margin"] > 0.1


# --- the kinds of alignment -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Returns ``(alignment, loss) -> config`` of a run aligned in this way; each is made once."""
    runs = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def make(alignment: str, loss: str = "dpo") -> Config:
        section = {"alignment": alignment, "preference": {"loss": loss}}
        config = recipe(tiny_files, runs, {"align": section}, name=f"{alignment}_{loss}")
        align.main(config)
        return config

    return make


@pytest.mark.parametrize(
    "kind, phases",
    [
        ("none", ["raw"]),
        ("warmup", ["raw", "warmup"]),
        ("nll", ["raw", "warmup", "round_01", "round_02"]),
    ],
)
def test_kinds_of_alignment_without_a_preference(aligned, kind, phases):
    config = aligned(kind)
    assert list(steps_of(config)) == phases
    assert not (config.folder / "samples").exists()
    assert not any("preference" in line for line in log_lines(config, "align"))
    assert (steps_of(config)[phases[-1]] == 0) == (kind == "none")
    first, last = (jax.tree.leaves(proxy_at(config, which).trainable) for which in (0, "last"))
    same = [np.array_equal(a, b) for a, b in zip(first, last, strict=True)]
    assert all(same) if kind == "none" else not any(same)


def test_preference_none_is_nll_alone(aligned):
    """It takes the same steps as ``alignment: nll``, without sampling."""
    configs = aligned("nll"), aligned("nll_preference", "none")
    assert not (configs[1].folder / "samples").exists()
    contents = [read_json(config.folder / "proxy" / MANIFEST)["content"] for config in configs]
    assert contents[0] == contents[1]


def test_all_kinds_begin_alike(finished_run, aligned):
    """The warm-up of a run does not depend on what follows it."""
    configs = finished_run, aligned("warmup")
    warm = [proxy_at(config, steps_of(config)["warmup"]).trainable for config in configs]
    jax.tree.map(np.testing.assert_array_equal, *warm)


def test_rounds_end_when_one_brings_no_new_best(tiny_files, tmp_path, monkeypatch):
    """Scripted validation of raw, warm-up and rounds is best after the first round."""
    nlls = [5.0, 4.0, 3.0, 3.5, 3.2, 3.4]
    align_section = {
        "alignment": "nll",
        "num_rounds": 4,
        "round_max_steps": 1,
        "stop": {"every": 1000},
    }
    for stops, phases in ((True, 4), (False, 6)):
        scripted_validation(monkeypatch, nlls)
        config = recipe(
            tiny_files,
            tmp_path,
            {"align": {**align_section, "stop_rounds": stops}},
            name=f"stops_{stops}",
        )
        result = align.main(config)
        names = ["raw", "warmup", "round_01", "round_02", "round_03", "round_04"]
        assert [found["phase"] for found in result.results] == names[:phases]
        assert result.best_step == steps_of(config)["round_01"] < result.last_step
        # Both checkpoints are kept, and they differ.
        best, last = (proxy_at(config, which).trainable for which in ("best", "last"))
        assert not np.array_equal(jax.tree.leaves(best)[0], jax.tree.leaves(last)[0])


def test_without_validation_rows_the_proxy_is_watched_on_the_students(tiny_files, tmp_path):
    corpus = {"validation_fraction": 0.0, "validation_rows": 0}
    config = recipe(tiny_files, tmp_path, {"corpus": corpus, "align": {"alignment": "warmup"}})
    result = align.main(config)
    assert result.best_step is None
    raw, warm = result.results
    assert warm["held_out/nll"] < raw["held_out/nll"]
    assert 0 <= warm["held_out/agreement"] <= 1
    assert "validation/nll" not in (config.folder / "metrics.jsonl").read_text()


# --- errors and warnings --------------------------------------------------------------------------


def still_unfinished(config: Config, finished_run: Config) -> bool:
    """Whether a run that was cut off after the first round has saved nothing since."""
    kept = [int(path.name) for path in (config.folder / "proxy" / "checkpoints").iterdir()]
    running = read_json(config.folder / "proxy" / MANIFEST)["status"] == "running"
    return running and max(kept) == steps_of(finished_run)["round_01"]


def test_stored_references_of_another_model_are_refused(before_round_two, finished_run):
    folder = PartFolder(before_round_two.folder / "samples" / "round_02" / "reference")
    for index in folder.complete():
        arrays = {name: np.array(array) for name, array in folder.open(index).arrays.items()}
        arrays["chosen"] += 0.5
        folder.commit(index, arrays)
    # As if they had been computed so; changed files alone would be made again.
    store = folder.folder.parent
    complete_stage(store, counts=read_manifest(store)["counts"])
    with pytest.raises(UserError, match=r"first DPO loss is 0\.\d+, .* must be ln 2 = 0\.693147"):
        align.main(before_round_two)
    assert still_unfinished(before_round_two, finished_run)


def test_the_base_model_as_reference_is_refused(before_round_two, finished_run, monkeypatch):
    """Some other implementations switch the adapter off to get the reference."""
    shutil.rmtree(before_round_two.folder / "samples" / "round_02")
    forward = reference.pair_logps
    monkeypatch.setattr(
        reference,
        "pair_logps",
        lambda frozen, adapter, batch, **options: forward(
            frozen, jax.tree.map(jnp.zeros_like, adapter), batch, **options
        ),
    )
    with pytest.raises(UserError, match="are those of another model"):
        align.main(before_round_two)
    assert still_unfinished(before_round_two, finished_run)


def test_an_alarm_where_the_loss_stays_at_ln_2(before_round_two, monkeypatch, capsys):
    """This happens if the reference follows the policy, as in some other implementations."""

    def learns_nothing(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Any]:
        metrics = {"loss": 1.0, "grad_norm": 1.0, "preference": LN_2}
        return state.replace(step=state.step + 1), {k: jnp.float32(v) for k, v in metrics.items()}

    monkeypatch.setattr(phase_module, "make_train_step", lambda *args, **options: learns_nothing)
    align.main(before_round_two)
    assert "WARNING: after round_02 the DPO loss is still ln 2" in capsys.readouterr().err


def test_no_alarm_where_it_moves(before_round_two, capsys):
    align.main(before_round_two)
    err = capsys.readouterr().err
    assert "round_02" in err and "WARNING" not in err
