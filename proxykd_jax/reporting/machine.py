"""On which machines the stages ran, how long, and what that cost."""

from __future__ import annotations

from collections.abc import Iterable

from proxykd_jax.reporting.blocks import Block, Table, Text, Value, shown
from proxykd_jax.reporting.run_folder import RunFolder
from proxykd_jax.training.times import read_times

_STAGES = ("prepare", "align", "score", "distill", "evaluate")


def machine(run: RunFolder) -> list[Block]:
    """A sentence on the whole run, and a table by stage."""
    lines = read_times(run.folder)
    if not lines:
        return [Text("times.jsonl is missing: the stages' times were not stored.", missing=True)]
    rows: list[tuple[Value, ...]] = []
    known = dict.fromkeys((*_STAGES, *(str(line.get("stage")) for line in lines)))
    for stage in known:
        of = [line for line in lines if line.get("stage") == stage]
        if of:
            seconds = sum(line["seconds"] for line in of)
            devices = _joined(_devices(line) for line in of)
            rows.append(
                (stage, seconds / 60, devices or None, _joined(line.get("host") for line in of))
            )
    hours = sum(line["seconds"] for line in lines) / 3600
    devices = _joined(_devices(line) for line in lines)
    told = f"In all {duration(hours)}" + (f" on {devices}." if devices else ".")
    if run.price_per_hour is not None:
        price = run.price_per_hour
        told += f" At {price:g} an hour this is {shown(hours * price, 2)}."
    note = (
        "Several attempts at a stage are added up. Exports, benchmarks and attempts that were "
        "killed are not counted."
    )
    return [
        Text(told),
        Table("Stages by time", ("stage", "minutes", "devices", "host"), rows, note),
    ]


def duration(hours: float) -> str:
    """A time in the unit that suits it."""
    if hours >= 1:
        return f"{shown(hours, 1)} hours"
    return f"{shown(hours * 60, 1)} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} seconds"


def _devices(line: dict[str, object]) -> str | None:
    return f"{line['devices']} x {line['device']}" if "device" in line else None


def _joined(found: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(each) for each in found if each))
