"""Measures the seconds from the command line to the metrics of the first training step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed import report
from benchmarks.speed.cases import OURS, Case, Comparison
from benchmarks.speed.coordinator import REPOSITORY
from benchmarks.speed.rows import assets_folder
from benchmarks.speed.run_case import Bench

CONFIG = "configs/stories260k.yaml"
_LONGEST = 300.0


def run_startup(bench: Bench, case: Case) -> list[report.Record]:
    """Times ``align`` of the small recipe on a prepared corpus, whose files are in the page cache,
    without and with the compiled programs of an earlier run."""
    assets = assets_folder()
    if not (assets / "models" / "stories260K").is_dir():
        reason = (
            f"{assets / 'models' / 'stories260K'} is not there; set PROXYKD_ASSETS to a folder "
            "of models and corpora."
        )
        return [report.skipped(one, reason) for one in case.comparisons]
    folder = bench.work / "startup"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, **bench.environments.get(OURS, {}), "PROXYKD_ASSETS": str(assets)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    compiled = {**environment, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    log = bench.work / "logs" / "startup.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        _command("prepare", folder / "runs", environment, log)
        _to_first_step(folder, environment, log)  # This brings the files into the page cache.
        took = {"cold": _to_first_step(folder, environment, log)}
        _to_first_step(folder, compiled, log)  # This fills the cache of programs.
        took["compiled"] = _to_first_step(folder, compiled, log)
    except RuntimeError as error:
        return [report.skipped(one, str(error)) for one in case.comparisons]
    return [_record(one, took[one.ours]) for one in case.comparisons]


def _record(comparison: Comparison, seconds: float) -> report.Record:
    record = report.skipped(comparison, "")
    record |= {"ours": seconds, "ratio": seconds, "unit": "seconds, not a ratio"}
    record["ok"] = report.judge(record)
    return record


def _arguments(stage: str, runs: Path) -> list[str]:
    command = [sys.executable, "-m", f"proxykd_jax.{stage}", "--config", CONFIG]
    return [*command, "--set", f"runs_dir={runs}"]


def _command(stage: str, runs: Path, environment: dict[str, str], log: Path) -> None:
    with open(log, "a") as file:
        done = subprocess.run(
            _arguments(stage, runs),
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{stage} ended with code {done.returncode}; see {log}")


def _to_first_step(folder: Path, environment: dict[str, str], log: Path) -> float:
    """The seconds until metrics.jsonl has the line of a training step; the run is then stopped.

    Lines of validation have no ``time/step_s``; one of them comes before the first step.
    """
    runs = folder / "timed"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(folder / "runs", runs)
    metrics = next(runs.iterdir()) / "metrics.jsonl"
    started = time.perf_counter()
    with open(log, "a") as file:
        process = subprocess.Popen(
            _arguments("align", runs),
            cwd=REPOSITORY,
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        while not (metrics.exists() and "time/step_s" in metrics.read_text()):
            if process.poll() is not None:
                raise RuntimeError(f"align ended with code {process.returncode}; see {log}")
            if time.perf_counter() - started > _LONGEST:
                raise RuntimeError(f"no training step within {_LONGEST:.0f} s")
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
