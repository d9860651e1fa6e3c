"""Makes the demo's table, ``summary.json`` and plots.

python -m benchmarks.miniature.report --out runs/demo
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import exit_code
from benchmarks.miniature import world as w
from benchmarks.miniature.accuracy import greedy_correct
from benchmarks.miniature.make import MADE
from benchmarks.miniature.recipes import HEADLINE, STUDENTS
from benchmarks.miniature.times import add_time, read_times
from proxykd_jax import evaluate
from proxykd_jax.artifacts import read_json, write_json
from proxykd_jax.config import load_config
from proxykd_jax.evaluation.measures import mean, token_mean
from proxykd_jax.parallel.mesh import make_mesh

# The models by name: (label, run, name in that run's eval/summary.json).
MODELS: dict[str, tuple[str, str, str]] = {
    "proxy_unaligned": ("proxy, unaligned", HEADLINE, "proxy_raw"),
    "proxy_warmup": ("proxy, warmed up", HEADLINE, "proxy_warmup"),
    "proxy_aligned": ("proxy, aligned", HEADLINE, "proxy_aligned"),
    "student_pretrained": ("student, pre-trained", HEADLINE, "student_before"),
    "black_box_ds": ("black-box KD on D_s", "black_box_ds", "student"),
    "black_box_all": ("black-box KD on all of D", "black_box_all", "student"),
    "takd": ("TAKD (unaligned proxy)", "takd", "student"),
    "without_alignment": ("Proxy-KD without alignment", "without_alignment", "student"),
    "proxy_kd": ("Proxy-KD", HEADLINE, "student"),
    "proxy_kd_fresh": ("Proxy-KD + fresh prompts", "proxy_kd_fresh", "student"),
}
COLUMNS = ("accuracy", "kl", "agreement", "nll")
PAIRS = (
    ("proxy_aligned", "proxy_unaligned"),
    ("proxy_kd", "black_box_ds"),
    ("proxy_kd", "black_box_all"),
    ("proxy_kd", "takd"),
    ("proxy_kd", "without_alignment"),
    ("proxy_kd_fresh", "proxy_kd"),
    ("proxy_kd_fresh", "black_box_all"),
)


@dataclass(frozen=True)
class Figure:
    """A measured value with its standard error."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Measured:
    """One model on the test prompts.

    Attributes:
      label: the name of the model in the table.
      accuracy: share of greedy answers whose last value is correct.
      kl: exact KL(teacher || model), nats a token.
      agreement: share of the teacher's tokens that are the model's first choice.
      nll: the NLL of the teacher's tokens, nats a token.
      n: number of test prompts.
      correct: bool [n], whether each greedy answer is correct.
    """

    label: str
    accuracy: Figure
    kl: Figure
    agreement: Figure
    nll: Figure
    n: int
    correct: np.ndarray

    def to_json(self) -> dict[str, float | int]:
        """The four values and n."""
        return {**{name: getattr(self, name).value for name in COLUMNS}, "n": self.n}


def collect(out: Path) -> dict[str, Measured]:
    """Measures the teacher and every model of the finished runs under ``out``.

    Raises:
      UserError: the miniature or the evaluation of a run is missing.
    """
    settings = read_json(out / MADE)["settings"]
    worlds = w.make_worlds(settings["seed"], settings["regime"])
    prompts_NP, answers_NT = read_test_rows(out)
    measured = {"teacher": teacher_itself(worlds, prompts_NP, answers_NT)}
    candidates: dict[str, dict[str, evaluate.Candidate]] = {}
    for name, (label, run, key) in MODELS.items():
        config = load_config(out / "configs" / f"{run}.yaml")
        if run not in candidates:
            candidates[run] = evaluate.run_models(config)
        if key not in candidates[run]:
            continue
        model = candidates[run][key].load(make_mesh(config.mesh))
        correct = greedy_correct(model, prompts_NP, worlds.truth_FA)
        test = read_json(config.folder / "eval" / "summary.json")["models"][key]["test"]
        measured[name] = Measured(
            label,
            Figure(*mean(correct.astype(float))),
            _figure(test["kl"]),
            _figure(test["agreement"]),
            _figure(test["nll"]),
            n=test["n"],
            correct=correct,
        )
    return measured


def _figure(summary: dict[str, Any]) -> Figure:
    return Figure(summary["token_mean"], summary["token_se"])


def read_test_rows(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the prompts and the teacher's answers of ``test.jsonl`` as tokens."""
    ids = {symbol: index for index, symbol in enumerate(w.SYMBOLS)}
    lines = (out / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompts = [[ids[symbol] for symbol in row["prompt"].split()] for row in rows]
    answers = np.full((len(rows), w.MAX_ANSWER), w.END, np.int32)
    for answer, row in zip(answers, rows, strict=True):
        symbols = row["response"].split()
        answer[: len(symbols)] = [ids[symbol] for symbol in symbols]
    return np.array(prompts, np.int32), answers


def teacher_itself(worlds: w.Worlds, prompts_NP: np.ndarray, answers_NT: np.ndarray) -> Measured:
    """Measures the teacher as if it were a model: the ceiling."""
    probs_NTV = w.answer_probs(worlds.teacher, prompts_NP, answers_NT)
    tokens = w.answer_lengths(answers_NT)
    mask_NT = np.arange(w.MAX_ANSWER)[None, :] < tokens[:, None]
    said = np.take_along_axis(probs_NTV, answers_NT[..., None], axis=-1)[..., 0]
    nll = -(np.log(said) * mask_NT).sum(axis=1)
    agreed = ((probs_NTV.argmax(axis=-1) == answers_NT) & mask_NT).sum(axis=1)
    correct = w.greedy_correct(worlds, prompts_NP)
    return Measured(
        "teacher",
        Figure(*mean(correct.astype(float))),
        Figure(0.0, None),
        Figure(*token_mean(agreed, tokens)),
        Figure(*token_mean(nll, tokens)),
        n=len(tokens),
        correct=correct,
    )


def table(measured: dict[str, Measured]) -> str:
    """The table that the demo prints: value +- standard error."""
    head = f"{'':<28}" + "".join(
        f"{text:>17}" for text in ("accuracy", "KL(t||m)/token", "agreement", "teacher NLL")
    )
    lines = [head, "-" * len(head)]
    for name, row in measured.items():
        if name in ("proxy_unaligned", "student_pretrained", "black_box_ds"):
            lines.append("")
        cells = "".join(f"{_cell(getattr(row, column)):>17}" for column in COLUMNS)
        lines.append(f"{row.label:<28}{cells}")
    some = next(iter(measured.values()))
    lines += ["", f"{some.n} test prompts that occur nowhere else; value +- standard error."]
    lines += ["Accuracy on the same prompts, paired:"]
    for one, other in PAIRS:
        first, second = measured[one], measured[other]
        gain, error = mean(first.correct.astype(float) - second.correct)
        lines.append(f"  {first.label} minus {second.label}: {gain:+.3f} +-{error:.3f}")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    if figure.error is None:
        return f"{figure.value:.3f}      "
    return f"{figure.value:.3f} +-{figure.error:.3f}"


def report(out: Path) -> dict[str, Any]:
    """Prints the table; writes the plots and ``summary.json``."""
    from benchmarks.miniature.plots import draw_all

    started = time.monotonic()
    measured = collect(out)
    print(table(measured))
    logs = {
        name: load_config(out / "configs" / f"{name}.yaml").folder / "metrics.jsonl"
        for name in STUDENTS
    }
    for path in draw_all(out, measured, logs):
        print(path)
    add_time(out, "report", time.monotonic() - started)
    summary = {
        "models": {name: row.to_json() for name, row in measured.items()},
        "time": read_times(out),
    }
    write_json(out / "summary.json", summary)
    return summary


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.report",
        description="Print the table of a finished demo and draw its plots.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the miniature's folder")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: report(arguments.out))


if __name__ == "__main__":
    raise SystemExit(main())
