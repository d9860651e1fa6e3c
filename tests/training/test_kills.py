"""A run that is killed repeatedly ends with the same results as an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest

from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.config import dump_config
from proxykd_jax.training.checkpoint import Checkpoints
from proxykd_jax.training.stage import TrainedStage
from tests.tiny_run import make_files, recipe
from tests.training.killing import Runner

STAGES = ("align", "score", "distill")
# Seed of the random moments; the test must pass with any seed.
SEED = int(os.environ.get("PROXYKD_KILL_SEED", "0"))

# A random kill comes up to this many seconds after its event, on a simulated slow disk. So it hits
# writes more often, and comes before a stage with few writes is over.
DELAY_S = {"align": 0.2, "score": 0.03, "distill": 0.2}
RENAME_TAKES_S = "0.03"
# The partial files that a kill during a write leaves.
PART_LEFT, SOFT_PART_LEFT = "samples/*/.part_*.tmp", "soft_labels/*/.part_*.tmp"

CHANGES: dict[str, Any] = {
    "proxy": {"lora": {"rank": 4, "dropout": 0.2}},
    "align": {
        "warmup_epochs": 2,
        "epochs_per_round": 2,
        "diagnose_every": 3,
        "sampling": {"batch_size": 8, "rows_per_part": 8},
        # With this rate each validation is a new best, so only the last state is kept.
        "optimizer": {"learning_rate": 2e-3},
    },
    "score": {"batch_size": 16, "rows_per_part": 16},
    "distill": {
        "epochs": 6,
        "max_steps": 40,
        "checkpoint_every": 3,
        "optimizer": {"learning_rate": 5e-2},
        # No decrease is this large: training stops after the first validation and eleven more, at
        # step 24.
        "stop": {"patience": 11, "min_delta": 20.0},
    },
}


# --- comparing two runs ---------------------------------------------------------------------------


def checkpoints_of(stage: Path) -> dict[str, tuple[str, list[tuple[str, Any, bytes]]]]:
    """Returns progress and arrays of each checkpoint.

    Orbax's files cannot be compared: they hold times, and the same arrays under random names.
    """
    import orbax.checkpoint as ocp

    found = {}
    checkpoints = Checkpoints(stage)
    for step in checkpoints.steps():
        checkpoints.verify(step)
        folder = stage / "checkpoints" / str(step)
        tree = ocp.StandardCheckpointer().restore(folder.resolve() / "state")
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found[str(step)] = (
            (folder / "progress" / "metadata").read_text(),
            [(jax.tree_util.keystr(p), (x.dtype, x.shape), x.tobytes()) for p, x in leaves],
        )
    checkpoints.close()
    assert sorted(found) == sorted(path.name for path in (stage / "checkpoints").iterdir())
    return found


def metrics_of(run: Path) -> list[list[tuple[str, Any]]]:
    """Returns the lines of metrics.jsonl, with fields in order and without time measurements."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        [item for item in json.loads(line).items() if not item[0].startswith("time/")]
        for line in lines
    ]


def contents(run: Path) -> dict[str, bytes | None]:
    """Returns all files of a run except checkpoints; None for files whose bytes may differ."""
    found: dict[str, bytes | None] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if "/checkpoints/" in name:
            continue
        compared = path.is_file() and not (
            name in ("metrics.jsonl", "times.jsonl", "config.yaml", "report.html")
            or "/digests/" in name
        )
        found[name] = path.read_bytes() if compared else None
    return found


def assert_same(whole: Path, killed: Path) -> None:
    ours, theirs = contents(whole), contents(killed)
    assert list(theirs) == list(ours)
    assert [name for name in ours if "tmp" in name] == []
    assert [name for name, data in ours.items() if theirs[name] != data] == []
    assert metrics_of(killed) == metrics_of(whole)
    for stage in ("proxy", "student"):
        expected, found = checkpoints_of(whole / stage), checkpoints_of(killed / stage)
        assert list(found) == list(expected)
        for step, checkpoint in expected.items():
            assert found[step] == checkpoint, f"{stage}, step {step}"


# --- the progress of a run ------------------------------------------------------------------------


def events(run: Path) -> int:
    """Counts lines of metrics.jsonl and parts of samples and soft labels: it grows with the run."""
    log = run / "metrics.jsonl"
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    parts = (path for name in ("samples", "soft_labels") for path in (run / name).rglob("part_*"))
    return lines + sum(1 for _ in parts)


def stage_of(run: Path) -> str:
    """Returns the current stage of a run; the export belongs to its stage."""
    last = {"proxy": "export/proxy.json", "soft_labels": "", "student": "export/student.json"}
    for folder, export in last.items():
        manifest = run / folder / MANIFEST
        complete = manifest.exists() and read_json(manifest)["status"] == "complete"
        if not complete or not (run / export).exists():
            return {"proxy": "align", "soft_labels": "score", "student": "distill"}[folder]
    return "evaluate"


# --- kills ----------------------------------------------------------------------------------------


class Killing:
    """A run that is killed repeatedly.

    Attributes:
      kills: (stage, what was interrupted) of each kill.

    Args:
      runner: runner of the run's command.
      run: folder of the run.
      spans: number of events at which each stage begins and ends.
      ends: call near the end of each stage; random kills come before it.
    """

    def __init__(
        self,
        runner: Runner,
        run: Path,
        spans: dict[str, tuple[int, int]],
        ends: dict[str, str],
    ) -> None:
        self._runner, self._run, self._spans, self._ends = runner, run, spans, ends
        self._moments = random.Random(SEED)
        self.kills: list[tuple[str, str]] = []

    def at(self, stage: str, what: str, calls: str, left: str = "") -> None:
        """Kills the run at a call (see ``killing.py``); a file matching ``left`` must remain."""
        self._runner.dies_at(calls)
        assert not left or any(self._run.glob(left)), f"{calls} left no {left}"
        assert stage_of(self._run) == stage
        self._note(what)

    def in_checkpoint(self, stage: str, folder: str) -> None:
        """Kills the run while Orbax writes; repeats until a kill hits."""
        written = f"{folder}/checkpoints/*.orbax-checkpoint-tmp"
        for _ in range(5):
            self._runner.killed_when(lambda: any(self._run.glob(written)))
            if any(self._run.glob(written)):
                assert stage_of(self._run) == stage
                self._note("checkpoint")
                return
            self._note("random")  # the rename came before the kill
        raise AssertionError(f"five kills missed {written}")

    def random(self, stage: str, low: float, high: float, **environment: str) -> None:
        """Kills the run at a random moment after a random share of the stage's events."""
        begin, end = self._spans[stage]
        target = begin + self._moments.uniform(low, high) * (end - begin)
        before = self._written()
        in_time = self._runner.killed_when(
            lambda: self._written() != before and events(self._run) >= target,
            self._moments.uniform(0, DELAY_S[stage]),
            KILL_AT=self._ends[stage],
            RENAME_TAKES_S=RENAME_TAKES_S,
            **environment,
        )
        assert stage_of(self._run) == stage
        self._note("random" if in_time else "near its end")

    def _written(self) -> tuple[int, int]:
        log = self._run / "metrics.jsonl"
        return (log.stat().st_mtime_ns if log.exists() else 0), events(self._run)

    def _note(self, what: str) -> None:
        self.kills.append((stage_of(self._run), what))
        print(*self.kills[-1], f"({events(self._run)} events)", flush=True)


def spans_of(run: Path) -> dict[str, tuple[int, int]]:
    """Returns the numbers of events at which each stage of a finished run began and ended."""
    stages = Counter(dict(line)["stage"] for line in metrics_of(run))
    parts = Counter(path.parent.name for path in run.rglob("part_*"))
    rounds = sum(count for name, count in parts.items() if name.startswith("round_"))
    align = stages["align"] + rounds
    score = align + stages["score"] + parts.total() - rounds
    return {"align": (0, align), "score": (align, score), "distill": (score, events(run))}


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    print(f"seed of the moments: {SEED}")
    files = make_files(tmp_path / "files", num_corpus=200, num_fresh=24)
    environment = {
        # The uninterrupted run compiles these programs, and the killed run loads them. Their equal
        # results are part of the test.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def made(name: str) -> tuple[Runner, Path]:
        config = recipe(files, tmp_path / name, CHANGES)
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(config))
        arguments = ("--config", str(path))
        runner = Runner("proxykd_jax.run", arguments, tmp_path / "python", environment)
        return runner, config.folder

    runner, whole = made("whole")
    runner.finish()
    align, distill = (TrainedStage.read(whole / name) for name in ("proxy", "student"))
    assert align.best_step == align.last_step
    assert distill.last_step == 24 < CHANGES["distill"]["max_steps"]  # it stopped

    runner, run = made("killed")
    last_part = sorted((whole / "soft_labels" / "fresh").glob("part_*"))[-1]
    ends = {
        "align": rf"rename|proxy/digests/{align.last_step}\.json$",
        "score": f"rename|soft_labels/fresh/{last_part.name}",
        "distill": rf"rename|student/digests/{distill.last_step}\.json$",
    }
    killing = Killing(runner, run, spans_of(whole), ends)
    anew = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    removal = r"unlink|^_sharding$"  # one of a checkpoint's files

    killing.random("align", 0.0, 0.1)
    killing.in_checkpoint("align", "proxy")
    killing.at("align", "part of samples", r"rename|samples/round_\d+/part_", PART_LEFT)
    killing.random("align", 0.2, 0.35)
    killing.random("align", 0.35, 0.5, **anew)
    killing.at("align", "checkpoint, no digests yet", r"renamed|proxy/checkpoints/\d+$")
    killing.at("align", "removal of a checkpoint", removal)
    killing.random("align", 0.5, 0.6)
    killing.at("align", "digests", r"rename|proxy/digests/\d+", "proxy/digests/.*.tmp")
    killing.at("align", "metrics, on a resume", r"rename|/metrics\.jsonl$", ".metrics.jsonl.tmp")
    killing.random("align", 0.6, 0.75)
    killing.random("align", 0.75, 0.9)
    killing.at("align", "last checkpoint", rf"renamed|proxy/digests/{align.last_step}\.json$")
    killing.at("align", "removal of a checkpoint, on a resume", removal)
    killing.at("align", "manifest", r"rename|proxy/manifest\.json$", "proxy/.manifest.json.tmp")
    killing.at("align", "export", r"rename|export/proxy_adapter$", "export/.proxy_adapter.tmp")
    killing.at("score", "nothing", r"renamed|export/proxy\.json$")

    killing.at("score", "part of samples", r"rename|samples/fresh/part_", PART_LEFT)
    killing.random("score", 0.05, 0.2)
    killing.random("score", 0.2, 0.35)
    killing.at("score", "part of soft labels", r"rename|soft_labels/\w+/part_", SOFT_PART_LEFT)
    killing.random("score", 0.35, 0.5)
    killing.random("score", 0.5, 0.7)
    killing.at(
        "score", "manifest", r"rename|soft_labels/manifest\.json$", "soft_labels/.manifest.json.tmp"
    )
    killing.at("distill", "nothing", r"renamed|soft_labels/manifest\.json$")

    killing.random("distill", 0.0, 0.2)
    killing.in_checkpoint("distill", "student")
    killing.random("distill", 0.2, 0.4, **anew)
    killing.at("distill", "removal of a checkpoint", removal)
    killing.random("distill", 0.4, 0.55)
    killing.at("distill", "digests", r"rename|student/digests/\d+", "student/digests/.*.tmp")
    killing.random("distill", 0.55, 0.7)
    # The state at the stop is saved twice: by the loop, and at the end of the phase.
    killing.at(
        "distill",
        "removal of the last checkpoint",
        rf"renamed|student/digests/{distill.last_step}\.json;{removal}",
    )
    killing.at("distill", "manifest", r"rename|student/manifest\.json$")
    killing.at("distill", "export", r"renamed|export/student$")
    killing.at("distill", "export again", r"renamed|export/\.student\.old\.tmp$")

    runner.close()
    runner.finish()
    found = Counter(killing.kills)
    print(*(f"{count} {stage}: {what}" for (stage, what), count in found.items()), sep="\n")
    for write in (
        ("align", "checkpoint"),
        ("distill", "checkpoint"),
        ("align", "part of samples"),
        ("score", "part of samples"),
        ("score", "part of soft labels"),
    ):
        assert found[write] >= 1
    randoms = [found[stage, "random"] for stage in STAGES]
    assert min(randoms) >= 1 and sum(randoms) >= 12
    assert_same(whole, run)
