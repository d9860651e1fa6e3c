"""The proxy: its training, and how close it came to the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from proxykd_jax.reporting.blocks import (
    BarPlot,
    Block,
    LinePlot,
    Plot,
    Plots,
    Section,
    Series,
    Table,
    Text,
    Value,
)
from proxykd_jax.reporting.curves import (
    held_out_kind,
    last_of_phase,
    phase_ends,
    phase_name,
    phases,
    plot,
)
from proxykd_jax.reporting.paper import TABLE_4_STEPS
from proxykd_jax.reporting.run_folder import Line, RunFolder

# Figures of the log that the plots below show.
SHOWN = {
    *("nll", "loss", "preference", "reward_margin", "reward_chosen", "reward_rejected"),
    *("reward_accuracy", "after/reward_margin", "after/reward_accuracy", "grad_norm"),
    *(f"{kind}/{name}" for kind in ("validation", "held_out") for name in ("nll", "agreement")),
}
MODELS = {
    "proxy_raw": "proxy, raw",
    "proxy_warmup": "proxy, warmed up",
    "proxy_aligned": "proxy, aligned",
    "student_before": "student, before",
    "student": "student",
}
# Values of K in the table by round; the paper keeps 10.
_MASSES = (1, 10, 50)
PROXIES = ("proxy_raw", "proxy_warmup", "proxy_aligned")


def training(run: RunFolder) -> Section:
    """Losses, rewards and validation by step, and a summary of each round."""
    title, lines = "Alignment of the proxy", run.of_stage("align")
    best, blocks = opening(run, "proxy", lines)
    if not lines:
        return Section(title, blocks)
    kind = held_out_kind(lines)
    loss = run.setting("align.preference.loss") or "preference"
    ends = phase_ends(lines)
    ring = (f"{kind}/nll", best, "best")
    rows_of = "validation rows" if kind == "validation" else "D_s, which the proxy never sees"
    plots = [
        plot(
            lines, "NLL of the teacher's answers, nats",
            [("training batch", "nll", False), (rows_of, f"{kind}/nll", True)],
            best=ring, ends=ends,
            note=f"Training: {run.setting('align.reduction') or 'reduced as configured'}; "
            "held-out rows: mean over tokens.",
        ),
        plot(lines, f"Preference loss ({loss})", [("training batch", "preference", False)],
             ends=ends, note="Each round starts at ln 2 = 0.693 where the loss is dpo."),
        plot(
            lines, "Reward margin of the teacher's answer over the proxy's",
            [("training batch", "reward_margin", False),
             ("after the round", "after/reward_margin", True)], ends=ends,
        ),
        plot(
            lines, "Rewards",
            [("teacher's answer", "reward_chosen", False),
             ("proxy's answer", "reward_rejected", False)], ends=ends,
        ),
        plot(
            lines, "Share of pairs in the right order",
            [("training batch", "reward_accuracy", False),
             ("after the round", "after/reward_accuracy", True)], ends=ends,
        ),
        plot(lines, f"Top-1 agreement with the teacher, {rows_of}",
             [(rows_of, f"{kind}/agreement", True)], ends=ends),
        plot(lines, "Norm of the gradient", [("before clipping", "grad_norm", False)], ends=ends),
    ]  # fmt: skip
    blocks.append(Plots([found for found in plots if found is not None]))
    rounds = _rounds(lines)
    if rounds is not None:
        blocks.append(rounds)
    return Section(title, blocks)


def opening(run: RunFolder, part: str, lines: Sequence[Line]) -> tuple[int | None, list[Block]]:
    """The step of the lowest validation NLL, and the first blocks of a training section.

    Args:
      run: the section's run.
      part: ``proxy`` or ``student``.
      lines: lines of its stage.
    """
    absent = run.absent(part)
    blocks: list[Block] = [] if absent is None else [Text(absent, missing=True)]
    manifest = run.manifests.get(part, {})
    best, last = manifest.get("best_step"), manifest.get("last_step")
    if lines and best is not None:
        state = run.setting("export.state")
        text = f"The lowest validation NLL was found at step {best} of {last}."
        if state is not None:
            text += f" Later stages take the {state} state (export.state)."
        blocks.append(Text(text))
    return best, blocks


def _rounds(lines: Sequence[Line]) -> Table | None:
    """The samples of each round, and the rewards after it."""
    columns = (
        ("prompts", "samples/rows"),
        ("kept", "samples/kept"),
        ("empty", "samples/dropped_empty"),
        ("equal to the teacher's", "samples/dropped_equals_chosen"),
        ("finished, share", "samples/finish_rate"),
        ("tokens", "samples/tokens"),
        ("margin after", "after/reward_margin"),
        ("pairs in order after", "after/reward_accuracy"),
    )
    rows: list[tuple[Value, ...]] = []
    for line in lines:
        if "samples/rows" in line:
            rows.append((phase_name(line["phase"]), *(line.get(name) for _, name in columns)))
    if not rows:
        return None
    header = ("round", *(name for name, _ in columns))
    return Table("The proxy's own answers, round by round", header, rows, digits=3)


def nearness(run: RunFolder) -> Section:
    """Agreement (Fig. 5), NLL and its differences (Table 4), mass (Fig. 4), calibration."""
    blocks: list[Block] = []
    found = _by_phase(run.of_stage("align"))
    if found is not None:
        blocks.append(found)
    summary = run.summary
    models = {name: summary["models"][name] for name in MODELS if name in summary.get("models", {})}
    if not models:
        blocks.append(Text("Not there: proxykd evaluate measures the models.", missing=True))
        return Section("How near to the teacher", blocks)
    plots: list[Plot] = [*_agreement(models), *_mass(models), *_reliability(models)]
    blocks += [Plots(plots), _measures(models), *_by_round(summary["models"])]
    differences = _differences(summary.get("differences", {}), beside_paper=run.has_benchmarks)
    if differences is not None:
        blocks.append(differences)
    return Section("How near to the teacher", blocks)


def _by_phase(lines: Sequence[Line]) -> Table | None:
    kind = held_out_kind(lines)
    rows: list[tuple[Value, ...]] = []
    first: tuple[float | None, float | None] | None = None
    for phase in phases(lines):
        nll, agreement = (
            last_of_phase(lines, phase, f"{kind}/{name}") for name in ("nll", "agreement")
        )
        if nll is None and agreement is None:
            continue
        first = first or (nll, agreement)
        rows.append((phase_name(phase), agreement, _minus(agreement, first[1]), nll,
                     _minus(nll, first[0])))  # fmt: skip
    if not rows:
        return None
    return Table(
        "After each phase of the alignment",
        ("phase", "top-1 agreement", "change since raw", "teacher-token NLL", "change since raw"),
        rows,
        f"On {'validation rows' if kind == 'validation' else 'D_s'}, at the end of the phase.",
        digits=4,
    )


def _minus(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


def splits_of(models: dict[str, Any]) -> list[str]:
    """Splits on which any of the models was measured."""
    return list(dict.fromkeys(split for found in models.values() for split in found))


def _agreement(models: dict[str, Any]) -> list[BarPlot]:
    def bars(split: str, name: str) -> list[tuple[float, float | None] | None]:
        return [
            (found[split][name]["token_mean"], found[split][name].get("token_se"))
            if name in found.get(split, {})
            else None
            for found in models.values()
        ]

    splits, names = splits_of(models), [MODELS[name] for name in models]
    titles = {
        "agreement": "Top-1 agreement with the teacher's tokens",
        "nll": "Teacher-token NLL, nats",
        "kl": "KL(teacher || model), nats per token",
    }
    note = "Lines show standard errors over rows."
    return [
        BarPlot(title, names, [(split, bars(split, name)) for split in splits], note)
        for name, title in titles.items()
        if any(name in found.get(split, {}) for found in models.values() for split in splits)
    ]


def _mass(models: dict[str, Any]) -> list[LinePlot]:
    """Share of positions whose K most probable tokens hold more than 0.95."""
    plots = []
    for split in splits_of(models):
        series = []
        for name, found in models.items():
            mass = sorted((int(k), v) for k, v in found.get(split, {}).get("top_mass", {}).items())
            if mass:
                xs, ys = zip(*mass, strict=True)
                series.append(Series(MODELS[name], [float(x) for x in xs], list(ys), points=True))
        if series:
            title = f"Positions whose top K hold more than 0.95, {split} rows"
            plots.append(LinePlot(title, "K", series))
    return plots


def _reliability(models: dict[str, Any]) -> list[LinePlot]:
    """How often the most probable token is the teacher's, by the probability the model gives it."""
    plots = []
    for split in splits_of(models):
        series = []
        for name, found in models.items():
            bins = found.get(split, {}).get("calibration", {}).get("bins", [])
            if bins:
                xs, ys = ([each[key] for each in bins] for key in ("confidence", "agreement"))
                series.append(Series(MODELS[name], xs, ys, points=True))
        if series:
            series.append(Series("as sure as right", [0.0, 1.0], [0.0, 1.0]))
            title = f"Agreement by confidence, {split} rows"
            note = "Below the diagonal the model is overconfident."
            plots.append(
                LinePlot(title, "probability of the most probable token", series, note=note)
            )
    return plots


def _by_round(models: dict[str, Any]) -> Iterator[Block]:
    """Figs. 4 and 5 and calibration of the proxy after each round, if there are any."""
    rounds = {name: _round_number(name) for name in models}
    states = [name for name, number in rounds.items() if number is not None]
    states.sort(key=lambda name: rounds[name] or 0)
    if not states:
        return
    states = [*(name for name in ("proxy_raw", "proxy_warmup") if name in models), *states]
    states += ["proxy_aligned"] if "proxy_aligned" in models else []
    rows: list[tuple[Value, ...]] = []
    for split in splits_of({name: models[name] for name in states}):
        for name in states:
            found = models[name].get(split, {})
            called = MODELS.get(name, f"proxy, round {rounds.get(name)}")
            mass = found.get("top_mass", {})
            rows.append((
                called, split,
                *(found.get(key, {}).get("token_mean") for key in ("agreement", "nll")),
                *(found.get("calibration", {}).get(key) for key in ("confidence", "ece")),
                *(mass.get(str(top_k)) for top_k in _MASSES),
            ))  # fmt: skip
    header = (
        *("proxy", "rows of", "agreement", "NLL, nats", "confidence", "calibration error"),
        *(f"top {top_k} > 0.95" for top_k in _MASSES),
    )
    note = (
        "The last columns are the shares of positions whose K most probable tokens hold more than "
        "0.95. A round whose state is the aligned proxy has no separate line."
    )
    yield Table("The proxy round by round", header, rows, note, digits=4)


def _round_number(name: str) -> int | None:
    head, _, number = name.rpartition("_")
    return int(number) if head == "proxy_round" and number.isdigit() else None


def _measures(models: dict[str, Any]) -> Table:
    splits = [(name, split, found) for name, of in models.items() for split, found in of.items()]
    known = [m for m in ("agreement", "nll", "kl") if any(m in found for _, _, found in splits)]
    rows: list[tuple[Value, ...]] = []
    for name, split, figures in splits:
        cells: list[Value] = [MODELS[name], split, figures.get("n"), figures.get("tokens")]
        for measure in known:
            value = figures.get(measure, {})
            cells += [value.get("token_mean"), value.get("token_se")]
        found = figures.get("calibration", {})
        cells += [found.get(key) for key in ("confidence", "ece", "ece_se")]
        rows.append(tuple(cells))
    called = {"agreement": "agreement", "nll": "NLL, nats", "kl": "KL, nats"}
    header = ["model", "rows of", "rows", "tokens"]
    for measure in known:
        header += [called[measure], "±"]
    header += ["confidence", "calibration error", "±"]
    note = (
        "Means over tokens with standard errors over rows. Confidence is the probability of the "
        "most probable token. The calibration error is its mean distance from agreement over 15 "
        "bins."
    )
    return Table("Held-out measures", header, rows, note, digits=4)


def _differences(differences: dict[str, Any], *, beside_paper: bool) -> Table | None:
    rows: list[tuple[Value, ...]] = []
    for pair, found in differences.items():
        first, _, second = pair.partition(" - ")
        if first not in PROXIES or second not in PROXIES:
            continue
        for split, figures in found.items():
            nll, agreement = figures.get("nll", {}), figures.get("agreement", {})
            rows.append((
                f"{MODELS[first]} minus {MODELS[second]}", split,
                nll.get("token_mean"), nll.get("token_se"),
                *([TABLE_4_STEPS.get((first, second))] if beside_paper else []),
                agreement.get("token_mean"), agreement.get("token_se"),
            ))  # fmt: skip
    if not rows:
        return None
    note = (
        "The teacher's text alone gives only differences of KL(teacher || proxy): the teacher's "
        "entropy cancels in the difference of two proxies' NLL."
    )
    if beside_paper:
        note += (
            " The paper's differences are those of its Table 4 (1.53, 0.87 and 0.56), whose middle "
            "row is aligned by NLL alone, not only warmed up."
        )
    header = (
        *("models", "rows of", "NLL", "±", *(["paper: KL"] if beside_paper else [])),
        *("agreement", "±"),
    )
    return Table("Differences between proxies on the same rows", header, rows, note, digits=4)
