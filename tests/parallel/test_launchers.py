"""Launchers are recognised by the variables that each of them sets."""

from __future__ import annotations

import pytest

from proxykd_jax import align
from proxykd_jax.cli import run_command
from proxykd_jax.errors import UserError
from proxykd_jax.parallel import launchers
from proxykd_jax.parallel.launchers import Launch, find_launch, first_host

HAND = {
    "PROXYKD_COORDINATOR": "10.0.0.1:1234",
    "PROXYKD_NUM_PROCESSES": "4",
    "PROXYKD_PROCESS_INDEX": "3",
}
# The variables that srun of SLURM 22.05 sets for a step of two tasks.
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
# The variables that mpirun of Open MPI 4.1 sets.
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def test_a_process_of_its_own():
    assert find_launch({"PATH": "/bin", "JAX_PLATFORMS": "cpu"}) is None
    assert find_launch({"PROXYKD_NUM_PROCESSES": "1"}) is None
    assert find_launch({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_launch({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_the_batch_script_of_a_job_is_none_of_its_tasks():
    batch = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP_")}
    assert find_launch({**batch, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


def test_by_hand_and_on_kubernetes():
    assert find_launch(HAND) == Launch("hand", "10.0.0.1:1234", 4, 3)
    pod = {k: v for k, v in HAND.items() if k != "PROXYKD_PROCESS_INDEX"}
    assert find_launch({**pod, "JOB_COMPLETION_INDEX": "2"}) == Launch(
        "hand", "10.0.0.1:1234", 4, 2
    )


def test_slurm():
    # A single task of a node gets all devices of the node.
    assert find_launch(SLURM) == Launch("SLURM", "node07:61443", 2, 1)
    crowded = {**SLURM, "SLURM_STEP_NUM_NODES": "1"}
    assert find_launch(crowded) == Launch("SLURM", "node07:61443", 2, 1, (1,))
    assert find_launch({**crowded, "CUDA_VISIBLE_DEVICES": "0,1"}).local_devices == (1,)
    # SLURM has assigned a device to each task.
    assert find_launch({**crowded, "CUDA_VISIBLE_DEVICES": "1"}).local_devices is None
    # Two jobs on a node use different ports.
    assert find_launch({**SLURM, "SLURM_JOB_ID": "4100"}).coordinator == "node07:61444"


def test_mpi():
    launch = find_launch(MPI)
    assert launch == Launch("Open MPI", f"10.96.0.1:{61440 + 373920 % 4096}", 2, 1, (1,))
    uri = "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d:c083:150e::3000:2]:43370"
    found = find_launch({**MPI, "OMPI_MCA_orte_hnp_uri": uri})
    assert found.coordinator.startswith("[fe80::b9b:ac5d:9cf0:b858]:")
    both = "1531576320.0;tcp://192.0.2.2:58177;tcp6://[fd00::2]:60995"
    found = find_launch({**MPI, "OMPI_MCA_orte_hnp_uri": both})
    assert found.coordinator == f"192.0.2.2:{61440 + 373920 % 4096}"
    without = {k: v for k, v in MPI.items() if "uri" not in k}
    with pytest.raises(UserError, match="mpirun -x PROXYKD_COORDINATOR=HOST:PORT"):
        find_launch(without)
    assert find_launch({**without, "PROXYKD_COORDINATOR": "a:1"}).coordinator == "a:1"


def test_ours_come_before_the_launchers():
    assert find_launch({**SLURM, **HAND}).by == "hand"
    assert find_launch({**SLURM, **MPI, "PROXYKD_NUM_PROCESSES": "1"}) is None


def test_a_tpu_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(launchers, "Path", lambda device: tmp_path)
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert find_launch({}) == Launch("Cloud TPU")
    assert find_launch({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("gpu[7,9-12]", "gpu7"),
        ("a-b-[3-4]", "a-b-3"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PROXYKD_PROCESS_INDEX": "4"}, "process 4 of 4, but they are numbered from 0 to 3"),
        ({"PROXYKD_PROCESS_INDEX": "one"}, "PROXYKD_PROCESS_INDEX is 'one'"),
        ({"PROXYKD_NUM_PROCESSES": "0"}, "PROXYKD_NUM_PROCESSES is '0'"),
        ({"PROXYKD_NUM_PROCESSES": "-2"}, "PROXYKD_NUM_PROCESSES is '-2'"),
        ({"PROXYKD_COORDINATOR": "10.0.0.1"}, "it must be HOST:PORT"),
        ({"PROXYKD_COORDINATOR": None}, "PROXYKD_COORDINATOR is not set"),
        ({"PROXYKD_PROCESS_INDEX": None}, "PROXYKD_PROCESS_INDEX is not set"),
        ({"PROXYKD_NUM_PROCESSES": None}, "PROXYKD_NUM_PROCESSES is not"),
    ],
)
def test_what_makes_no_sense_is_a_sentence_and_code_2(change, message, monkeypatch, capsys):
    for name, value in {**HAND, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert run_command("align", align.main, "", ["--config", "absent.yaml"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
