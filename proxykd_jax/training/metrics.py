"""metrics.jsonl, the console and trackers.

Each line is one event: ``{"stage", "phase", "step", name: value, ...}``. Fields named ``time/...``
measure the process that wrote them. All other fields of a resumed run equal those of an
uninterrupted run, because a resumed stage first drops the lines after its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.config import LoggingConfig
from proxykd_jax.errors import UserError
from proxykd_jax.peers import is_first, on_first


class Tracker(Protocol):
    """A service that also receives the figures."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends to ``metrics.jsonl`` and passes figures to trackers, whose failures stop nothing.

    Of several processes only the first writes; ``lines`` tells the others what it wrote.
    """

    def __init__(self, path: Path, trackers: Mapping[str, Tracker] | None = None) -> None:
        self.path = path
        self._trackers = dict(trackers or {})

    def resume(self, stage: str, lines: int) -> None:
        """Keeps the first ``lines`` lines of ``stage``, and all lines of other stages."""
        if not (is_first() and self.path.exists()):
            return
        kept, seen = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                owner = json.loads(line)["stage"]
            except (ValueError, KeyError):
                continue  # a killed process left this line half written
            if owner == stage:
                seen += 1
                if seen > lines:
                    continue
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        write_bytes(self.path, b"".join(kept))

    def write(
        self, stage: str, step: int, values: Mapping[str, Any], *, phase: str | None = None
    ) -> None:
        """Adds a line. Numbers that JSON cannot hold, NaN and infinity, become null."""
        if not is_first():
            return
        line: dict[str, Any] = {"stage": stage}
        if phase is not None:
            line["phase"] = phase
        line["step"] = step
        line.update({name: _number(value) for name, value in values.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for name in list(self._trackers):
            try:
                self._trackers[name].write(stage, step, numbers)
            except Exception as error:
                print(f"{name} failed ({error}); continuing without it", file=sys.stderr)
                del self._trackers[name]

    def lines(self, stage: str) -> int:
        """Syncs the log to disk for a checkpoint; returns the number of lines of ``stage``."""
        return on_first(lambda: self._lines(stage))

    def _lines(self, stage: str) -> int:
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            return sum(json.loads(line)["stage"] == stage for line in file)

    def close(self) -> None:
        """Closes the trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                print(f"{name} failed to close ({error})", file=sys.stderr)


def open_metrics(run: Path, config: LoggingConfig, settings: Mapping[str, Any]) -> MetricsLog:
    """Opens the log of a run with the trackers that the config asks for."""
    trackers: dict[str, Tracker] = {}
    makers: dict[str, tuple[Any, Callable[[], Tracker]]] = {
        "TensorBoard": (config.tensorboard, lambda: _TensorBoard(run / "tensorboard")),
        "Weights & Biases": (
            config.wandb_project,
            lambda: _WandB(str(config.wandb_project), run.name, settings),
        ),
    }
    for name, (wanted, make) in makers.items():
        if not (wanted and is_first()):
            continue
        try:
            trackers[name] = make()
        except Exception as error:
            print(f"{name} could not start ({error}); continuing without it", file=sys.stderr)
    return MetricsLog(run / "metrics.jsonl", trackers)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the events of a log, and the number of lines that killed processes left half written.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    events, damaged = [], 0
    for line in text.split("\n"):
        if not line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and "stage" in event:
            events.append(event)
        else:
            damaged += 1
    return events, damaged


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, config=dict(settings), resume="allow")

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # wandb needs one growing count, but stages count their own steps: log the step as a value.
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{stage}/step": step})

    def close(self) -> None:
        self._run.finish()


def _number(value: Any) -> Any:
    """Returns a JSON value: numpy and jax scalars as Python numbers, NaN and infinity as null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
