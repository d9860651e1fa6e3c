"""metrics.jsonl after kills, failing trackers, and the console."""

from __future__ import annotations

import io
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax import distill
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.config import LoggingConfig
from proxykd_jax.status import StatusLine
from proxykd_jax.training import console as console_module
from proxykd_jax.training.console import Console
from proxykd_jax.training.metrics import open_metrics
from tests.tiny_run import copy_run, log_lines, unfinish, without_student

WANDB = LoggingConfig(wandb_project="p")
TENSORBOARD = LoggingConfig(tensorboard=True)


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("time/")} for line in lines
    ]


# --- metrics.jsonl --------------------------------------------------------------------------------


def test_a_resumed_stage_has_the_lines_of_an_unbroken_one(finished_run, tmp_path):
    """Lines after the checkpoint and a half-written line are dropped and written again."""
    config = copy_run(finished_run, tmp_path)
    path = config.folder / "metrics.jsonl"
    unbroken = log_lines(config, "distill")
    steps = [line["step"] for line in unbroken]
    best = read_json(config.folder / "student" / MANIFEST)["best_step"]
    kept = sorted(int(p.name) for p in (config.folder / "student" / "checkpoints").iterdir())
    middle = [step for step in kept if 0 < step < steps[-1]]
    assert middle and best is not None
    unfinish(config, "student", middle[0])
    others = [line for line in path.read_text().splitlines() if '"stage": "distill"' not in line]
    # The lines at a kill two steps later, during a write.
    cut = next(i for i, line in enumerate(unbroken) if line["step"] == steps[-1])
    written = [json.dumps(line) for line in unbroken[:cut]]
    path.write_text("\n".join([*others, *written, '{"stage": "distill", "phase": "tra']))
    distill.main(config)
    assert timeless(log_lines(config, "distill")) == timeless(unbroken)
    for stage in ("align", "score"):
        assert log_lines(config, stage) == log_lines(finished_run, stage)
    assert len(path.read_text().splitlines()) == len(others) + len(unbroken)


def test_each_line_says_its_stage_phase_and_step(finished_run):
    for stage, phases in (
        ("align", {"raw", "warmup", "round_01", "round_02"}),
        ("distill", {"untrained", "train"}),
    ):
        lines = log_lines(finished_run, stage)
        assert {line["phase"] for line in lines} == phases
        steps = [line["step"] for line in lines]
        assert steps == sorted(steps)
        trained = [line["step"] for line in lines if "loss" in line]
        assert trained == list(range(1, steps[-1] + 1))
        assert all(line["time/step_s"] >= 0 for line in lines if "loss" in line)


# --- trackers -------------------------------------------------------------------------------------


def events(folder: Path) -> dict[tuple[str, int], float]:
    """Returns the scalars of TensorBoard's event files, by tag and step."""
    import tensorflow as tf
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_has_what_the_log_has(finished_run, tmp_path):
    config = without_student(finished_run, tmp_path, {"logging": {"tensorboard": True}})
    distill.main(config)
    found = events(config.folder / "tensorboard")
    expected = {
        (f"distill/{key}", line["step"]): value
        for line in log_lines(config, "distill")
        for key, value in line.items()
        if isinstance(value, int | float) and key != "step"
    }
    assert len(expected) > 80
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())


class FakeRun:
    def __init__(self, failing: str) -> None:
        self.failing, self.logged, self.finished = failing, [], False

    def log(self, values: dict[str, Any]) -> None:
        if self.failing == "log":
            raise ConnectionError("the network is down")
        self.logged.append(values)

    def finish(self) -> None:
        if self.failing == "finish":
            raise ConnectionError("the network is down")
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch):
    """Returns a fake wandb that fails where it is told to."""

    def install(failing: str) -> FakeRun:
        made = FakeRun(failing)

        def init(**options: Any) -> FakeRun:
            if failing == "init":
                raise RuntimeError("no API key")
            made.options = options
            return made

        module = types.ModuleType("wandb")
        module.init = init
        monkeypatch.setitem(sys.modules, "wandb", module)
        return made

    return install


def test_wandb_gets_every_line(tmp_path, wandb):
    made = wandb("never")
    log = open_metrics(tmp_path / "run-7", WANDB, {"seed": 3})
    log.write("align", 4, {"loss": 1.5, "bad": float("nan"), "text": "x"}, phase="warmup")
    log.close()
    assert made.options["project"] == "p" and made.options["name"] == "run-7"
    assert made.options["config"] == {"seed": 3}
    assert made.logged == [{"align/loss": 1.5, "align/step": 4}]
    assert made.finished


@pytest.mark.parametrize("failing", ["import", "init", "log", "finish"])
def test_wandb_that_fails_stops_nothing(tmp_path, monkeypatch, wandb, capsys, failing):
    made = wandb(failing)
    if failing == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    log = open_metrics(tmp_path, WANDB, {})
    for step in (1, 2):
        log.write("align", step, {"loss": 1.0})
    log.close()
    assert log.lines("align") == 2
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "Weights & Biases" in line]
    assert len(said) == 1  # it is said once, not at every step
    assert len(made.logged) == (2 if failing == "finish" else 0)


def test_tensorboard_that_is_not_installed_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = open_metrics(tmp_path, TENSORBOARD, {})
    log.write("align", 1, {"loss": 1.0})
    log.close()
    assert log.lines("align") == 1
    assert "TensorBoard could not start" in capsys.readouterr().err


def test_tensorboard_that_cannot_write_stops_nothing(tmp_path, capsys):
    """A file stands in the place of its folder."""
    (tmp_path / "tensorboard").write_text("")
    log = open_metrics(tmp_path, TENSORBOARD, {})
    log.write("align", 1, {"loss": 1.0})
    log.close()
    assert log.lines("align") == 1
    assert "TensorBoard" in capsys.readouterr().err


def test_a_student_is_trained_whatever_trackers_do(
    finished_run, tmp_path, monkeypatch, wandb, capsys
):
    wandb("log")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    trackers = {"tensorboard": True, "wandb_project": "p"}
    config = without_student(finished_run, tmp_path, {"logging": trackers})
    distill.main(config)
    ours, theirs = (read_json(c.folder / "student" / MANIFEST) for c in (config, finished_run))
    assert ours["content"] == theirs["content"]
    err = capsys.readouterr().err
    assert err.count("TensorBoard") == 1 and err.count("Weights & Biases") == 1


# --- the console ----------------------------------------------------------------------------------


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    clock = itertools.count()
    monkeypatch.setattr(console_module, "LINE", StatusLine(lambda: next(clock)))
    monkeypatch.setenv("COLUMNS", "200")
    console = Console("align")
    console.begin(48)
    for step in range(1, 41):
        console.step("warmup", step, 40, {"loss": 3.25, "grad_norm": 9.0}, seconds=0.5, tokens=100)
        if step == 20:
            console.say("validation nll 2.5")
    console.step("round_01", 1, 8, {"loss": 2.0})
    sampled = console.parts("round 1: sampled")
    sampled(1, 2, 50)
    console.close()
    monkeypatch.undo()
    return screen.getvalue()


def test_one_line_on_a_terminal(monkeypatch):
    text = shown(monkeypatch, terminal=True)
    assert "warmup 7/40 loss 3.25 | 200 tokens/s | " in text and "grad_norm" not in text
    assert " GB | " in text and " s left | " in text and "% useful" in text
    assert "\r\x1b[Kalign: validation nll 2.5\n" in text and text.count("\n") == 1
    assert "round 1: sampled 1/2 parts" in text and text.endswith("\r\x1b[K")


def test_plain_lines_elsewhere(monkeypatch):
    """A log file gets no bar, but the first and last step of a phase and one every ten seconds."""
    text = shown(monkeypatch, terminal=False)
    assert text.splitlines() == [
        "align: warmup 1/40 loss 3.25",
        "align: validation nll 2.5",
        "align: warmup 40/40 loss 3.25",
        "align: round_01 1/8 loss 2",
        "align: round 1: sampled 1/2 parts",
    ]


def test_plain_lines_of_a_slow_phase(monkeypatch):
    clock = itertools.count(step=4)
    monkeypatch.setattr("proxykd_jax.training.console.time.monotonic", lambda: next(clock))
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert 10 < len(lines) < 25
