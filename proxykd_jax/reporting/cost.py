"""Time and tokens of the stages and phases; Table 3 of the paper beside benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from proxykd_jax.reporting.blocks import Block, Section, Table, Text, Value
from proxykd_jax.reporting.curves import is_number, phase_name, phases, points
from proxykd_jax.reporting.machine import machine
from proxykd_jax.reporting.paper import SAMPLES_A_ROUND, TABLE_3
from proxykd_jax.reporting.run_folder import Line, RunFolder

_TIME = "time/step_s"


@dataclass(frozen=True)
class PhaseTime:
    """The steps of a phase of training.

    Attributes:
      stage, phase: identify the phase.
      steps: number of logged steps.
      seconds: their total time.
      typical: median time of a step, without the first, which compiles.
      first: time of the first step.
      samples: samples per step; None if rows are packed and their number is unknown.
      drawing: seconds to draw the proxy's answer to one prompt, with its reference log-probs; None
        if nothing was drawn or timed.
    """

    stage: str
    phase: str
    steps: int
    seconds: float
    typical: float
    first: float
    samples: float | None
    drawing: float | None

    @property
    def hours_for_a_round(self) -> float | None:
        """Hours for 40,000 samples at the typical step, including the drawing of answers."""
        if self.samples is None:
            return None
        return SAMPLES_A_ROUND * (self.typical / self.samples + (self.drawing or 0)) / 3600


def phase_times(run: RunFolder) -> list[PhaseTime]:
    """Times of all phases whose steps were timed."""
    found = []
    for stage in ("align", "distill"):
        lines = run.of_stage(stage)
        for phase in phases(lines):
            timed = [line for line in lines if line.get("phase") == phase and _TIME in line]
            seconds = points(timed, _TIME)[1]
            if not seconds:
                continue
            typical = statistics.median(seconds[1:] or seconds)
            samples = _samples_a_step(run, stage, lines, phase)
            of_phase = [line for line in lines if line.get("phase") == phase]
            found.append(
                PhaseTime(
                    stage, phase, len(seconds), sum(seconds), typical, seconds[0], samples,
                    _drawing(of_phase),
                )
            )  # fmt: skip
    return found


def _drawing(lines: Sequence[Line]) -> float | None:
    rows, seconds = (points(lines, f"time/{name}")[1] for name in ("sampled_rows", "sampling_s"))
    return seconds[-1] / rows[-1] if rows and seconds and rows[-1] else None


def _samples_a_step(run: RunFolder, stage: str, lines: Sequence[Line], phase: str) -> float | None:
    batch = run.setting(f"{stage}.batch_size")
    pairs = stage == "align" and phase.startswith("round_")
    if batch is None:
        return None
    if run.setting(f"{stage}.batching") != "pack" or pairs:
        return float(batch)
    # Packed rows: known if the log says how many rows the planned steps take.
    rows, planned = (points(lines, name)[1] for name in ("rows", "planned_steps"))
    epochs, most = run.setting("distill.epochs"), run.setting("distill.max_steps")
    if stage == "distill" and rows and planned and epochs and (most is None or planned[0] < most):
        return rows[0] * epochs / planned[0]
    return None


def cost(run: RunFolder) -> Section:
    """Machine, time and price of the stages; steps and tokens of the phases."""
    title, times = "Machine, time and tokens", phase_times(run)
    blocks: list[Block] = machine(run)
    if times:
        rows: list[tuple[Value, ...]] = [
            (t.stage, phase_name(t.phase), t.steps, t.seconds / 60, t.typical, t.first, t.samples,
             None if t.samples is None else t.samples / t.typical, t.drawing)
            for t in times
        ]  # fmt: skip
        header = (
            *("stage", "phase", "steps", "minutes", "median step, s", "first step, s"),
            *("samples per step", "samples per second", "drawing an answer, s"),
        )
        note = (
            "Training steps as logged; the first of a phase compiles its program. Drawing is one "
            "answer of the proxy with its reference log-probs, including compilation."
        )
        blocks.append(Table("Training", header, rows, note))
        if run.has_benchmarks:
            blocks.append(_as_table_3(run, times))
    else:
        blocks.append(Text("No step was timed.", missing=True))
    tokens = _tokens(run)
    if tokens is not None:
        blocks.append(tokens)
    return Section(title, blocks)


def _as_table_3(run: RunFolder, times: Sequence[PhaseTime]) -> Table:
    rows: list[tuple[Value, ...]] = []
    kinds: dict[str, list[PhaseTime]] = {"SFT": [], "Pref": [], "Distill": []}
    for found in times:
        pairs = run.setting("align.alignment") == "nll_preference" and "round" in found.phase
        kind = "Distill" if found.stage == "distill" else ("Pref" if pairs else "SFT")
        kinds[kind].append(found)
    for kind, group in kinds.items():
        hours = [h for h in (found.hours_for_a_round for found in group) if h is not None]
        if hours:
            role = "student" if kind == "Distill" else "proxy"
            name = f"this run's {role}, {kind}"
            rows.append((name, None, statistics.median(hours)))
    measured = len(rows)
    rows += list(TABLE_3)
    note = "From the median step of each phase, on the run's devices, for models of the run's size."
    if any(found.drawing is None for found in kinds["Pref"]):
        note += (
            " Sampling, which the paper's Pref includes, was not timed in all rounds of this run."
        )
    return Table(
        f"Hours for {SAMPLES_A_ROUND:,} samples (Table 3)",
        ("model and method", "GPUs", "hours"),
        rows,
        note,
        groups={0: "measured here", measured: "paper"} if measured else {0: "paper"},
    )


def _tokens(run: RunFolder) -> Table | None:
    """Tokens that were read, drawn and scored."""
    rows: list[tuple[Value, ...]] = []
    splits = run.manifests.get("corpus", {}).get("counts", {}).get("splits", {})
    for name, split in splits.items():
        rows.append((f"corpus, {name}", split.get("rows"), split.get("answer_tokens")))
    for line in run.of_stage("align"):
        if is_number(line.get("samples/tokens")):
            where = f"sampled, {phase_name(line['phase'])}"
            rows.append((where, line.get("samples/rows"), line["samples/tokens"]))
    for name, found in run.manifests.get("soft_labels", {}).get("figures", {}).items():
        rows.append((f"scored, {name}", found.get("rows"), found.get("tokens")))
    if not rows:
        return None
    return Table("Tokens of answers", ("where", "rows", "tokens"), rows)
