"""Prints a plan as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from proxykd_jax.parallel.ahead import has_compiler
from proxykd_jax.planning.look import BOUNDS, Request, StagePlan, mesh_name

_GIB = 1 << 30
_NO_COMPILER = (
    "The compiler of this device is not installed (pip install 'proxykd_jax[plan]'), so the "
    "programs were compiled for CPUs. Arguments are exact. Temporaries and peaks are no estimate, "
    "and it is not known whether the programs fit."
)
# The paper's Table 3: (kind, billions of parameters, number of GPUs, hours for 40,000 samples).
PAPER_HOURS = (
    ("SFT", 7, 4, 1.0),
    ("Distill", 7, 4, 2.0),
    ("SFT", 13, 8, 1.8),
    ("Pref", 13, 8, 9.0),
    ("SFT", 70, 8, 5.5),
    ("Pref", 70, 8, 28.0),
)
# For each kind of the paper: the stages that the plan must have, and the stages whose hours are
# added.
_KINDS: tuple[tuple[str, set[str], tuple[str, ...]], ...] = (
    ("SFT", {"warmup"}, ("warmup",)),
    ("Pref", {"sample", "round"}, ("sample", "reference", "round")),
    ("Distill", {"distill"}, ("distill",)),
)


def render(request: Request, stages: list[StagePlan]) -> str:
    """The table of a plan with its legend and the paper's hours, as text."""
    device = request.device
    lines = [
        f"{request.config.name} on {request.count} x {device.title}, rows of "
        f"{request.config.corpus.max_length} tokens; a program can use "
        f"{request.limit / _GIB:.1f} of {device.memory_bytes / _GIB:.1f} GiB per device",
    ]
    if not has_compiler(device):
        lines.append(_NO_COMPILER)
    header = (
        f"{'stage':<13}{'mesh':<11}{'rows':>5}{'peak':>8}{'args':>8}{'temps':>8}{'outs':>7}"
        f"{'beside':>8}  {'fits':<5}{'most':>6}{'PFLOP':>9}{'GB sent':>9}{'floor s':>9}  "
        f"{'bound by':<9}{'hours':>7}"
    )
    lines += ["", header]
    for stage in stages:
        big = stage.largest
        bound = BOUNDS[stage.floor_seconds.index(max(stage.floor_seconds))]
        fits = ("yes" if stage.fits else "NO") if stage.estimate else "?"
        most = "?" if stage.largest_batch is None else str(stage.largest_batch)
        sent = "?" if stage.collective_bytes is None else f"{stage.collective_bytes / 1e9:.1f}"
        lines.append(
            f"{stage.name:<13}{mesh_name(stage.axes):<11}{stage.batch:>5}"
            f"{stage.peak_bytes / _GIB:>8.1f}{big.argument_bytes / _GIB:>8.1f}"
            f"{big.temporary_bytes / _GIB:>8.1f}{big.output_bytes / _GIB:>7.1f}"
            f"{stage.resident_bytes / _GIB:>8.1f}  {fits:<5}{most:>6}{stage.flops / 1e15:>9.2f}"
            f"{sent:>9}{max(stage.floor_seconds):>9.2f}  {bound:<9}{stage.hours:>7.2f}"
        )
    lines += [
        "",
        "mesh: data x fsdp x tensor. peak, args, temps, outs, beside: GiB per device. An output "
        "that reuses the memory of an argument counts in both. beside: other arrays that stay in "
        "memory while the program runs. most: the largest number of rows that fits.",
        _legend(request),
        *_beside_the_paper(request, stages),
    ]
    return "\n".join(lines)


def render_rows(title: str, request: Request, rows: dict[str, list[StagePlan]]) -> str:
    """The plans of several runs as a Markdown table; equal programs of several runs share a line.

    Args:
      title: what the runs are the rows of.
      request: the request of any run; its device, count and assumptions are those of all.
      rows: plans by the run's name.
    """
    shared: dict[tuple[Any, ...], list[str]] = {}
    for name, stages in rows.items():
        for stage in stages:
            line = (
                stage.name,
                f"{stage.num_params / 1e9:.1f}B",
                mesh_name(stage.axes),
                stage.batch,
                f"{stage.peak_bytes / _GIB:.1f}",
                f"{stage.resident_bytes / _GIB:.1f}",
                ("yes" if stage.fits else "NO") if stage.estimate else "?",
                f"{stage.hours:.2f}",
            )
            shared.setdefault(line, []).append(name)
    head = ("stage", "model", "mesh", "rows at once", "peak", "beside", "fits", "hours", "runs")
    lines = [f"{title} on {request.count} x {request.device.title}", ""]
    lines += [_cells(head), _cells(["---"] * len(head))]
    lines += [_cells([*line, ", ".join(names)]) for line, names in shared.items()]
    misfits = [name for name, stages in rows.items() if not all(s.fits for s in stages)]
    told = "Every program of every run fits." if has_compiler(request.device) else _NO_COMPILER
    lines += ["", f"DOES NOT FIT: {', '.join(misfits)}." if misfits else told, _legend(request)]
    return "\n".join(lines)


def _cells(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _legend(request: Request) -> str:
    return (
        f"hours: for {request.samples} samples of {request.prompt} + {request.answer} tokens "
        f"(prompt + answer) at {request.utilisation:.0%} of the peak that bounds the stage. No "
        "program was run or timed."
    )


def _beside_the_paper(request: Request, stages: list[StagePlan]) -> list[str]:
    """The hours under the names of the paper's Table 3, each beside the paper's own."""
    found = {stage.name: stage for stage in stages}
    lines = []
    for kind, needed, names in _KINDS:
        if not needed <= found.keys():
            continue
        hours = sum(found[name].hours for name in names if name in found)
        billions = found[names[0]].num_params / 1e9
        paper = [row for row in PAPER_HOURS if row[0] == kind and abs(row[1] / billions - 1) < 0.1]
        beside = "".join(
            f"; the paper's {size}B on {gpus} GPUs: {taken}" for _, size, gpus, taken in paper
        )
        lines.append(f"{kind}, {billions:.1f}B on {request.count}: {hours:.2f} h{beside}")
    return lines
