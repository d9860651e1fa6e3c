"""Table, times and plots of the demo from invented figures; the teacher is measured as a model."""

import json
from pathlib import Path

import numpy as np

from benchmarks.miniature import plots, report
from benchmarks.miniature import world as w
from benchmarks.miniature.recipes import STUDENTS
from benchmarks.miniature.times import add_time, read_times


def made_up() -> dict[str, report.Measured]:
    rng = np.random.default_rng(0)

    def row(label: str) -> report.Measured:
        figures = [report.Figure(float(value), 0.01) for value in rng.uniform(0.1, 0.9, size=4)]
        return report.Measured(label, *figures, n=768, correct=rng.random(768) < 0.5)

    return {
        "teacher": row("teacher"),
        **{name: row(label) for name, (label, _, _) in report.MODELS.items()},
    }


def test_times_add_up_over_starts(tmp_path: Path) -> None:
    assert read_times(tmp_path) == {}
    for stage, seconds in (("align", 10), ("distill", 3), ("align", 5)):
        add_time(tmp_path, stage, seconds)
    assert read_times(tmp_path) == {"align": 15, "distill": 3}


def test_table_holds_every_model_and_value() -> None:
    measured = made_up()
    text = report.table(measured)
    for row in measured.values():
        line = next(line for line in text.splitlines() if line.startswith(row.label.ljust(28)))
        for name in ("accuracy", "kl", "agreement", "nll"):
            assert f"{getattr(row, name).value:.3f} +-0.010" in line
    assert "768 test prompts" in text
    one, other = measured["proxy_kd"].correct, measured["takd"].correct
    gain = one.mean() - other.mean()
    assert f"Proxy-KD minus TAKD (unaligned proxy): {gain:+.3f} +-" in text


def test_json_of_a_model_has_the_four_figures_and_n() -> None:
    row = made_up()["proxy_kd"].to_json()
    assert list(row) == ["accuracy", "kl", "agreement", "nll", "n"]
    assert row["n"] == 768


def test_the_teacher_as_a_model() -> None:
    worlds = w.make_worlds(0, "fmt")
    prompts = w.PromptPool(0).take(3000)
    answers = w.sample_answers(worlds.teacher, prompts, np.random.default_rng(0))
    row = report.teacher_itself(worlds, prompts, answers)
    assert row.kl.value == 0
    probs_NTV = w.answer_probs(worlds.teacher, prompts, answers)
    mask = np.arange(w.MAX_ANSWER) < w.answer_lengths(answers)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(probs_NTV > 0, probs_NTV * np.log(probs_NTV), 0).sum(axis=-1)
    # Two estimates of the entropy rate, and of the probability of the most likely token.
    assert abs(row.nll.value - entropy[mask].mean()) < 5 * row.nll.error
    assert abs(row.agreement.value - probs_NTV.max(axis=-1)[mask].mean()) < 5 * row.agreement.error


def test_plots_are_drawn_as_vectors_and_pixels(tmp_path: Path) -> None:
    logs = {}
    for name in STUDENTS:
        lines = []
        for phase, first in (("raw", 0), ("warmup", 0), ("round_01", 20), ("round_02", 60)):
            for step in range(first, first + 40, 20):
                figures = {"validation/nll": 1.5 - step / 200, "validation/agreement": step / 200}
                lines.append({"stage": "align", "phase": phase, "step": step, **figures})
        for step in range(1, 40):
            lines.append({"stage": "distill", "phase": "train", "step": step, "nll": 2 - step / 50})
        lines.append({"stage": "distill", "phase": "train", "step": 40, "validation/nll": 1.4})
        logs[name] = tmp_path / f"{name}.jsonl"
        logs[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = plots.draw_all(tmp_path, made_up(), logs)
    names = [
        f"{name}.{suffix}"
        for name in ("alignment", "students", "losses")
        for suffix in ("svg", "png")
    ]
    assert [file.name for file in files] == names
    for file in files:
        start = file.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<?xml" in start
    assert "Proxy-KD + fresh prompts" in (tmp_path / "students.svg").read_text()


def test_a_running_mean_looks_back_only() -> None:
    np.testing.assert_allclose(plots._smooth([1.0, 3.0, 5.0, 7.0], width=2), [1, 2, 4, 6])


def test_series_take_one_stage_and_skip_what_is_absent() -> None:
    lines = [
        {"stage": "align", "phase": "raw", "step": 0, "nll": 1.0},
        {"stage": "align", "phase": "warmup", "step": 1, "nll": None},
        {"stage": "align", "phase": "warmup", "step": 2},
        {"stage": "distill", "phase": "train", "step": 3, "nll": 2.0},
    ]
    assert plots.series(lines, "align", "nll") == ([0], [1.0], ["raw"])
    assert plots.series(lines, "score", "nll") == ([], [], [])
