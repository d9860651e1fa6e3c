"""Measures the models of a run against the teacher on held-out rows.

    python -m proxykd_jax.evaluate --config run.yaml

For each of the proxy (raw, warmed up, aligned) and the student (before and after) that the run
has: teacher-token NLL, top-1 agreement and top-K mass on the validation and test rows, and exact
KL(teacher || model) on the test rows where the teacher is a known process. ``<run>/eval`` holds a
file of sums by row for each model, so that a model is not measured twice, and ``summary.json``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.errors import UserError

if TYPE_CHECKING:
    from proxykd_jax.evaluation.measures import RowMeasures

SPLITS = ("validation", "test")
# (name, minus this one, what it tells)
PAIRS = (
    ("proxy_aligned", "proxy_raw"),
    ("proxy_aligned", "proxy_warmup"),
    ("proxy_warmup", "proxy_raw"),
    ("student", "student_before"),
    ("student", "proxy_aligned"),
)


@dataclass(frozen=True)
class EvaluateResult:
    """What was measured.

    Attributes:
      folder: ``<run>/eval``.
      summary: what ``summary.json`` holds: ``models[name][split]`` and ``differences``.
    """

    folder: Path
    summary: dict[str, Any]


def main(config: Config, models: Mapping[str, ModelSection] | None = None) -> EvaluateResult:
    """Measures models; those already measured as they are now are not measured again.

    Args:
      config: the run.
      models: name -> where it is; by default the models of the run, which is trained first where
        it is not.

    Raises:
      UserError: no held-out rows, or a model or the teacher's folder that does not fit.
    """
    from proxykd_jax import prepare
    from proxykd_jax.artifacts import digest_file, write_json
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.evaluation.measures import TOP_KS, paired_differences
    from proxykd_jax.evaluation.teacher import TEACHER_FILE, TeacherLogps
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.training.model import model_identity

    folder = Path(config.runs_dir) / config.name / "eval"
    if models is None:
        models = run_models(config)
    corpus = open_corpus(prepare.main(config).folder)
    splits = {name: split for name in SPLITS if len(split := corpus.split(name))}
    if not splits:
        raise UserError(
            "evaluate: the corpus has neither validation nor test rows. Set "
            "corpus.validation_fraction or name corpus.test, under another name of the run."
        )
    teacher = None
    identity: dict[str, Any] = {
        "corpus": corpus.identity,
        "max_rows": config.evaluate.max_rows,
        "top_ks": list(TOP_KS),
    }
    if config.evaluate.teacher_logps is not None:
        teacher_folder = Path(config.evaluate.teacher_logps)
        teacher = TeacherLogps(teacher_folder)
        identity["teacher"] = digest_file(teacher_folder / TEACHER_FILE)
    mesh = make_mesh(config.mesh)
    check_rows(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    measured: dict[str, dict[str, RowMeasures]] = {}
    for name, section in models.items():
        mine = {**identity, "model": model_identity(section), "dtype": section.dtype}
        if section.init:
            mine["first_layers"] = section.init.first_layers
        path = folder / f"{name}.safetensors"
        found = _read(path, mine)
        if found is None:
            found = _measure(config, name, section, splits, teacher, mesh)
            _write(path, mine, found)
        measured[name] = found
        for split, rows in found.items():
            print(f"evaluate: {name:<15} {split:<10} {_line(rows.summary())}", flush=True)
    summary = {
        "models": {
            name: {
                "origin": section.adapter or section.path or (section.init and section.init.path),
                **{split: rows.summary() for split, rows in measured[name].items()},
            }
            for name, section in models.items()
        },
        "differences": {
            f"{first} - {second}": {
                split: paired_differences(measured[first][split], measured[second][split])
                for split in splits
            }
            for first, second in PAIRS
            if first in measured and second in measured
        },
    }
    write_json(folder / "summary.json", summary)
    return EvaluateResult(folder, summary)


def run_models(config: Config) -> dict[str, ModelSection]:
    """The models of a run by name; trains them first where the run is not finished.

    A proxy is among them only where the run uses one (``distill.alpha`` above 0).
    """
    from proxykd_jax import distill

    distill.main(config)
    run = Path(config.runs_dir) / config.name
    models: dict[str, ModelSection] = {}
    if config.distill.alpha > 0:
        models["proxy_raw"] = config.proxy
        for name, folder in (
            ("proxy_warmup", run / "export" / "proxy_warmup"),
            ("proxy_aligned", run / "export" / "proxy"),
        ):
            if folder.is_dir():
                models[name] = exported(config.proxy, folder)
    models["student_before"] = config.student
    models["student"] = exported(config.student, run / "export" / "student")
    return models


def exported(section: ModelSection, folder: Path) -> ModelSection:
    """The section of an exported model, which is an adapter of the section's own or a whole one."""
    if (folder / "adapter_config.json").is_file():
        return section.model_copy(update={"adapter": str(folder)})
    return section.model_copy(update={"path": str(folder), "init": None, "adapter": None})


def _measure(
    config: Config,
    name: str,
    section: ModelSection,
    splits: Mapping[str, Any],
    teacher: Any,
    mesh: Any,
) -> dict[str, RowMeasures]:
    from proxykd_jax.evaluation.measures import measure
    from proxykd_jax.training.model import load_for_training

    model = load_for_training(section, role=name, seed=config.seed, mesh=mesh)
    adapter = model.adapter if section.adapter else None
    found = {}
    for split, rows in splits.items():
        started = time.monotonic()

        def report(done: int, total: int, started: float = started, split: str = split) -> None:
            if time.monotonic() - started > 30 and done < total:
                print(f"evaluate: {name} {split}: {done} of {total} rows", file=sys.stderr)

        found[split] = measure(
            model.config,
            model.params,
            adapter,
            rows,
            batch_size=config.evaluate.batch_size,
            max_rows=config.evaluate.max_rows,
            teacher=teacher if split == "test" else None,
            mesh=mesh,
            progress=report,
        )
    return found


def _write(path: Path, identity: Mapping[str, Any], found: Mapping[str, RowMeasures]) -> None:
    import json

    import jax
    from safetensors.numpy import save

    from proxykd_jax.artifacts import write_bytes

    if jax.process_index() != 0:
        return
    arrays = {
        f"{split}/{name}": array
        for split, rows in found.items()
        for name, array in rows.to_arrays().items()
    }
    metadata = {"identity": json.dumps(identity, sort_keys=True)}
    write_bytes(path, save(arrays, metadata=metadata))


def _read(path: Path, identity: Mapping[str, Any]) -> dict[str, RowMeasures] | None:
    """What ``_write`` wrote, if it is of this very model, corpus and teacher."""
    import json

    from safetensors import SafetensorError, safe_open

    from proxykd_jax.evaluation.measures import RowMeasures

    try:
        with safe_open(str(path), framework="numpy") as file:
            if file.metadata().get("identity") != json.dumps(identity, sort_keys=True):
                return None
            arrays: dict[str, dict[str, Any]] = {}
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                split, _, name = key.partition("/")
                arrays.setdefault(split, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError):
        return None
    return {split: RowMeasures.from_arrays(arrays[split]) for split in SPLITS if split in arrays}


def _line(summary: Mapping[str, Any]) -> str:
    parts = [f"n {summary['n']}"]
    for name in ("nll", "agreement", "kl"):
        if name in summary:
            value, error = summary[name]["token_mean"], summary[name]["token_se"]
            parts.append(f"{name} {value:.4f}" + ("" if error is None else f" +- {error:.4f}"))
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(
        run_command("evaluate", main, "Measure proxy and student against the teacher's answers.")
    )
