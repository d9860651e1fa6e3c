"""SLURM and Open MPI, if installed: a requeued job gives the same result as an undisturbed one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxykd_jax.artifacts import read_json
from proxykd_jax.config import Config, dump_config
from tests.parallel.test_several_processes import CHANGES, LOST, REPOSITORY, assert_same
from tests.tiny_run import recipe

pytestmark = pytest.mark.slow

# Submits a job, asks it to stop once it trains (as before the time limit), waits for its end.
REQUEUE = """
job=$(sbatch --parsable --ntasks-per-node=2 --output="$LOG" --chdir="$PWD" \
  launch/slurm/stage.sbatch distill "$CONFIG")
for ((i = 0; i < 1200; i++)); do grep -qs 'round_01 1/' "$LOG" && break; sleep 0.1; done
scancel --batch --signal=USR1 "$job"
for ((i = 0; i < 300; i++)); do
  state=$(scontrol show job "$job" | grep -o 'JobState=[A-Z]*')
  case $state in *COMPLETED | *FAILED | *CANCELLED) break ;; esac
  sleep 1
done
scontrol show job "$job" | grep -o 'JobState=[A-Z]*\\|Restarts=[0-9]*'
"""
# A stage that ends at once with the code of a stopped run.
STAGE = """#!/bin/bash
trap 'exit 75' TERM
echo ready
while :; do sleep 0.1; done
"""
CANCEL = """
job=$(sbatch --parsable --ntasks-per-node=2 --output="$LOG" --chdir="$PWD" \
  launch/slurm/stage.sbatch align "$CONFIG")
for ((i = 0; i < 300; i++)); do grep -qs ready "$LOG" && break; sleep 0.1; done
scancel "$job"
for ((i = 0; i < 90; i++)); do [[ -z $(squeue --noheader) ]] && break; sleep 1; done
scontrol show job "$job" | grep -o 'JobState=[A-Z]*\\|Restarts=[0-9]*'
"""


def environment(config: Config, folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PROXYKD_PYTHON": sys.executable,
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "CONFIG": str(folder / "run.yaml"),
        "LOG": str(folder / "log.txt"),
    }


@pytest.fixture(scope="module")
def by_mpi(tiny_files, tmp_path_factory) -> Config:
    if shutil.which("mpirun") is None:
        pytest.skip("Open MPI is not installed (package openmpi-bin)")
    folder = tmp_path_factory.mktemp("mpi")
    config = recipe(tiny_files, folder / "runs", CHANGES)
    options = ["-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    done = subprocess.run(
        ["bash", "launch/mpi.sh", "distill", str(folder / "run.yaml"), *options],
        cwd=REPOSITORY,
        env=environment(config, folder),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("align: warmup 1/") == 1  # one run of two processes, not two runs
    return config


def slurm(script: str, variables: dict[str, str]) -> list[str]:
    """What a script prints when it runs in a SLURM on this machine alone."""
    if os.getuid() != 0 or shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip("needs root and a SLURM of its own (packages slurm-wlm, munge)")
    done = subprocess.run(
        ["bash", "launch/slurm/check.sh", "bash", "-c", script],
        cwd=REPOSITORY,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_mpi_connects_the_processes(by_mpi):
    assert read_json(by_mpi.folder / "student" / "manifest.json")["status"] == "complete"


def test_slurm_puts_a_stopped_job_back(by_mpi, tiny_files, tmp_path):
    config = recipe(tiny_files, tmp_path / "runs", CHANGES)
    variables = environment(config, tmp_path)
    ended = slurm(REQUEUE, variables)
    log = Path(variables["LOG"]).read_text()
    assert sorted(ended) == ["JobState=COMPLETED", "Restarts=1"], log[-4000:]
    assert "stopped as asked (SIGTERM)" in log and LOST not in log
    assert "stage distill ended with code 75; requeued" in log and "align: going on from" in log
    assert_same(by_mpi.folder, config.folder, ("proxy", "student"))


def test_a_job_that_was_cancelled_stays_so(tiny_files, tmp_path):
    variables = environment(recipe(tiny_files, tmp_path / "runs"), tmp_path)
    stage = tmp_path / "stage"
    stage.write_text(STAGE)
    stage.chmod(0o755)
    ended = slurm(CANCEL, {**variables, "PROXYKD_PYTHON": str(stage)})
    log = Path(variables["LOG"]).read_text()
    assert sorted(ended) == ["JobState=CANCELLED", "Restarts=0"], log
