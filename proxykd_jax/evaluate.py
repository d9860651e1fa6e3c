"""Measures the models of a run against the teacher on held-out rows.

    proxykd evaluate --config run.yaml

It measures the proxy (raw, after the warm-up, after each round, aligned) and the student (before
and after training), as far as the run has them. On the validation and test rows it computes the NLL
of the teacher's tokens, top-1 agreement, top-K mass and calibration. On the test rows it also
computes the exact KL(teacher || model), if the teacher is a known process. ``<run>/eval`` holds
``summary.json`` and, for each model, a file with the sums of every row, so that no model is
measured twice. ``answers.jsonl`` holds greedy answers of proxy and student to a few of these
prompts, for people to read (``evaluation/answers.py``).

With ``evaluate.benchmarks`` the models named there also answer benchmarks. With ``--model`` or
``--benchmarks`` they only answer benchmarks. See ``tasks/benchmark.py``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, ConfigLike, ModelSection, as_config
from proxykd_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from proxykd_jax.evaluation.candidates import Candidate
    from proxykd_jax.evaluation.exact_teacher import TeacherLogps
    from proxykd_jax.evaluation.measures import RowMeasures
    from proxykd_jax.training.console import Console, Report
    from proxykd_jax.training.model import Model

SUMMARY = "Measure proxy and student on the teacher's held-out answers and on benchmarks."
SPLITS = ("validation", "test")
# (name, name to subtract)
PAIRS = (
    ("proxy_aligned", "proxy_raw"),
    ("proxy_aligned", "proxy_warmup"),
    ("proxy_warmup", "proxy_raw"),
    ("student", "student_before"),
    ("student", "proxy_aligned"),
)

_LISTS = {
    "model": "models that answer the benchmarks, as in evaluate.benchmarks.models; measure nothing "
    "else",
    "benchmarks": "benchmarks to answer, out of evaluate.benchmarks; measure nothing else",
}


@dataclass(frozen=True)
class EvaluateResult:
    """The measurements.

    Attributes:
      folder: ``<run>/eval``.
      summary: the content of ``summary.json``: ``models[name][split]`` and ``differences``, and the
        identities of the stages (``stages``) and the state that were measured.
    """

    folder: Path
    summary: dict[str, Any]


def main(config: ConfigLike, models: Mapping[str, ModelSection] | None = None) -> EvaluateResult:
    """Measures models; unchanged models are not measured again.

    Args:
      config: the run, see ``as_config``.
      models: name -> model section. By default the models of the run, which is trained first if
        necessary.

    Raises:
      UserError: there are no held-out rows, or a model or the teacher's folder does not fit.
    """
    config = as_config(config)
    from proxykd_jax import prepare
    from proxykd_jax.artifacts import digest_file, write_json
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.evaluation.answers import HeldOutAnswers
    from proxykd_jax.evaluation.calibration import NUM_BINS
    from proxykd_jax.evaluation.candidates import from_section
    from proxykd_jax.evaluation.exact_teacher import TEACHER_FILE, TeacherLogps
    from proxykd_jax.evaluation.measures import TOP_KS, paired_differences
    from proxykd_jax.evaluation.sums import write_sums
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.peers import on_first
    from proxykd_jax.training.console import Console
    from proxykd_jax.training.model_card import write_cards
    from proxykd_jax.training.times import timed

    if models is None:
        candidates = run_models(config)
    else:
        candidates = {name: from_section(config, name, at) for name, at in models.items()}
    corpus = open_corpus(prepare.main(config).folder)
    splits = {part: rows for part in SPLITS if len(rows := corpus.split(part))}
    if not splits:
        raise UserError(
            "evaluate: the corpus has neither validation nor test rows. Give the run another name "
            "and set corpus.validation_fraction or corpus.test."
        )
    teacher = None
    common: dict[str, Any] = {
        "corpus": corpus.identity,
        "max_rows": config.evaluate.max_rows,
        "top_ks": list(TOP_KS),
        "calibration_bins": NUM_BINS,
    }
    if config.evaluate.teacher_logps is not None:
        teacher_folder = Path(config.evaluate.teacher_logps)
        teacher = TeacherLogps(teacher_folder)
        common["teacher"] = digest_file(teacher_folder / TEACHER_FILE)
    mesh = make_mesh(config.mesh.of("evaluate"))
    check_rows(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    folder = config.folder / "eval"
    measured: dict[str, dict[str, RowMeasures]] = {}
    console = Console("evaluate")
    most = config.evaluate.max_rows
    console.begin(
        len(candidates) * sum(min(len(rows), most or len(rows)) for rows in splits.values())
    )
    answers = HeldOutAnswers(config, corpus) if models is None and config.evaluate.answers else None
    to_ask: list[str] = []
    if answers is not None:
        to_ask = answers.missing({name: each.identity for name, each in candidates.items()})

    def work_on(name: str, found: dict[str, RowMeasures] | None) -> dict[str, RowMeasures]:
        """Measures a model if that is wanted, and lets it answer; then it is freed."""
        candidate = candidates[name]
        model = candidate.load(mesh)
        if found is None:
            found = _measure(config, name, model, splits, teacher, mesh, console)
            identity = {**common, **candidate.identity}
            write_sums(folder / f"{name}.safetensors", identity, _arrays(found))
        if answers is not None and name in to_ask:
            answers.ask(name, candidate.identity, model, mesh)
        return found

    for name, candidate in candidates.items():
        path, identity = folder / f"{name}.safetensors", {**common, **candidate.identity}
        # All processes must agree on whether the model was measured, so process 0 decides.
        known = on_first(functools.partial(_is_measured, path, identity))
        found = _read(path, identity) if known else None
        if found is None or name in to_ask:
            with timed(config.folder, "evaluate"):
                found = work_on(name, found)
        measured[name] = found
        for part, sums in found.items():
            print(f"evaluate: {name:<14} {part:<10} {_line(sums.summary())}", flush=True)
    summary = {
        "state": config.export.state,
        "stages": {
            name: candidate.identity["stage"]
            for name, candidate in candidates.items()
            if "stage" in candidate.identity
        },
        "models": {
            name: {part: sums.summary() for part, sums in found.items()}
            for name, found in measured.items()
        },
        "differences": {
            f"{first} - {second}": {
                part: paired_differences(measured[first][part], measured[second][part])
                for part in splits
            }
            for first, second in PAIRS
            if first in measured and second in measured
        },
    }
    write_json(folder / "summary.json", summary)
    if models is None:
        on_first(lambda: write_cards(config))
    if config.evaluate.benchmarks is not None and models is None:
        from proxykd_jax.tasks.benchmark import run_benchmarks

        run_benchmarks(config)
    return EvaluateResult(folder, summary)


def run_models(config: Config) -> dict[str, Candidate]:
    """The models of a run by name; trains them first if the run is not finished.

    ``export.state`` chooses their state, best or last. The proxy is included only if the run uses
    one (``config.needs``), and in several states only if it was aligned.
    """
    from proxykd_jax import align, distill
    from proxykd_jax.artifacts import stage_identity
    from proxykd_jax.evaluation.candidates import Candidate, from_section
    from proxykd_jax.training.restore import finished_step, load_aligned_proxy, load_student

    distill.main(config)
    which = config.export.state
    candidates: dict[str, Candidate] = {}
    if config.needs != "nothing":
        candidates["proxy_raw"] = from_section(config, "proxy", config.proxy)
    if config.needs != "nothing" and config.align.alignment != "none":
        aligned = align.main(config)
        stage = stage_identity(aligned.folder)

        def state_at(step: int | None) -> Candidate:
            load = functools.partial(load_aligned_proxy, config, which=step)
            return Candidate({"stage": stage, "step": step}, load)

        chosen = finished_step(aligned.folder, which)
        for result in aligned.results:
            phase, step = result["phase"], result["step"]
            is_round = phase.startswith("round_") and config.evaluate.rounds and step != chosen
            if phase == "warmup" or is_round:
                candidates[f"proxy_{phase}"] = state_at(step)
        candidates["proxy_aligned"] = state_at(chosen)
    candidates["student_before"] = from_section(config, "student", config.student)
    student_folder = config.folder / "student"
    candidates["student"] = Candidate(
        {"stage": stage_identity(student_folder), "step": finished_step(student_folder, which)},
        lambda mesh: load_student(config, mesh),
    )
    return candidates


def _measure(
    config: Config,
    name: str,
    model: Model,
    splits: Mapping[str, Any],
    teacher: TeacherLogps | None,
    mesh: Mesh,
    console: Console,
) -> dict[str, RowMeasures]:
    from proxykd_jax.evaluation.measures import measure
    from proxykd_jax.peers import stop_if_wanted

    found = {}
    for split, rows in splits.items():
        show = console.parts(f"{name} {split}:", unit="rows", counts=True, every_s=30)
        tokens = int(rows.lengths.mean() * config.evaluate.batch_size)

        def report(done: int, total: int, show: Report = show, tokens: int = tokens) -> None:
            show(done, total, tokens if done else 0)
            stop_if_wanted()

        found[split] = measure(
            model,
            rows,
            batch_size=config.evaluate.batch_size,
            max_rows=config.evaluate.max_rows,
            teacher=teacher if split == "test" else None,
            mesh=mesh,
            progress=report,
        )
    console.close()
    return found


def _arrays(found: Mapping[str, RowMeasures]) -> dict[str, Any]:
    return {
        f"{split}/{name}": array
        for split, rows in found.items()
        for name, array in rows.to_arrays().items()
    }


def _is_measured(path: Path, identity: Mapping[str, Any]) -> bool:
    return _read(path, identity) is not None


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, RowMeasures] | None:
    """The measurements of a file if it is whole and belongs to this model, corpus and teacher."""
    import json

    from proxykd_jax.evaluation.measures import RowMeasures
    from proxykd_jax.evaluation.sums import read_sums
    from proxykd_jax.peers import say

    if not path.exists():
        return None
    try:
        found, arrays = read_sums(path)
    except UserError as error:
        say(f"WARNING: {error} The model is measured again.")
        return None
    if found != json.loads(json.dumps(identity)):
        return None
    by_split: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        split, _, name = key.partition("/")
        by_split.setdefault(split, {})[name] = array
    return {
        split: RowMeasures.from_arrays(by_split[split]) for split in SPLITS if split in by_split
    }


def _line(summary: Mapping[str, Any]) -> str:
    parts = [f"n {summary['n']}"]
    for name in ("nll", "agreement", "kl"):
        if name in summary:
            value, error = summary[name]["token_mean"], summary[name]["token_se"]
            parts.append(f"{name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    return ", ".join(parts)


def _measure_or_answer(
    config: Config, model: Sequence[str] = (), benchmarks: Sequence[str] = ()
) -> None:
    """Measures the models of a run and runs the benchmarks that the config names.

    Args:
      config: the config of the run.
      model: names of models. If given, these answer the benchmarks and nothing else is measured.
      benchmarks: names of benchmarks. If given, these are answered and nothing else is measured.

    Raises:
      UserError: as in ``main``, or a model or a benchmark cannot be used.
    """
    if not model and not benchmarks:
        main(config)
        return
    from proxykd_jax.tasks.benchmark import run_benchmarks

    run_benchmarks(config, model, benchmarks)


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("evaluate", _measure_or_answer, SUMMARY, argv, lists=_LISTS)


if __name__ == "__main__":
    sys.exit(command())
