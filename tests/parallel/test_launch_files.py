"""The files in launch/ agree with published schemas and with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxykd_jax.cli import TRY_AGAIN, USER_ERROR
from proxykd_jax.parallel import launchers
from proxykd_jax.parallel.launchers import Launch, find_launch

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
JOB = LAUNCH / "k8s" / "indexed_job.yaml"
SKY = LAUNCH / "skypilot" / "align.yaml"


def documents() -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all(JOB.read_text())}


def test_kubernetes_takes_the_job():
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents().values():
        validate.validate(document, "1.33", strict=True)
    wrong = documents()["Job"]
    wrong["spec"]["paralelism"] = wrong["spec"].pop("parallelism")
    with pytest.raises(validate.ValidationError, match="paralelism"):
        validate.validate(wrong, "1.33", strict=True)


def test_the_pods_of_the_job_find_each_other():
    service, job = documents()["Service"], documents()["Job"]
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    count = spec["completions"]
    assert spec["parallelism"] == count
    for index in range(count):
        # The host name of a pod is JOB-INDEX, and its domain is the service's name.
        launch = find_launch({**variables, "JOB_COMPLETION_INDEX": str(index)})
        assert launch == Launch("hand", f"{name}-0.{name}:51234", count, index)
    fail_at_once, _ = spec["podFailurePolicy"]["rules"]
    assert fail_at_once["onExitCodes"]["values"] == [USER_ERROR]


def test_skypilot_takes_the_task():
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = sky.Task.from_yaml(str(SKY))
    assert task.num_nodes == 2


def test_the_task_names_the_processes_and_the_code_to_go_on():
    task = yaml.safe_load(SKY.read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [TRY_AGAIN]
    for name in (launchers.COORDINATOR, launchers.NUM_PROCESSES, launchers.PROCESS_INDEX):
        assert f"export {name}=" in task["run"]


@pytest.mark.parametrize("script", ["slurm/stage.sbatch", "mpi.sh"])
def test_scripts_start_again_at_the_code_that_asks_for_it(script):
    assert re.search(rf"(try_again=|code != ){TRY_AGAIN}\b", (LAUNCH / script).read_text())


def test_every_variable_that_the_files_set_is_one_that_is_read():
    known = {
        *(launchers.COORDINATOR, launchers.NUM_PROCESSES, launchers.PROCESS_INDEX),
        *("PROXYKD_CONNECT_SECONDS", "PROXYKD_PYTHON", "PROXYKD_RESTARTS", "PROXYKD_VENV"),
    }
    for path in LAUNCH.rglob("*"):
        if path.is_file():
            assert set(re.findall(r"PROXYKD_[A-Z_]+", path.read_text())) <= known, path
