"""The first screen of a page: the verdict, the curves that bear it, and answers to read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.evaluation.answers import FILE, MOST_TOKENS, PROXIES, STUDENTS, read_answers
from proxykd_jax.evaluation.measures import token_mean
from proxykd_jax.evaluation.sums import read_sums
from proxykd_jax.reporting.blocks import (
    Answers,
    Block,
    Columns,
    Findings,
    Fold,
    LinePlot,
    Plots,
    Section,
    Steps,
    Text,
)
from proxykd_jax.reporting.curves import held_out_kind, is_number, phase_name, plot, points
from proxykd_jax.reporting.run_folder import UNREADABLE, Line, RunFolder
from proxykd_jax.reporting.teacher import teacher_names
from proxykd_jax.reporting.verdict import FEWEST_ROWS, Facts, Finding, Outcome, advice, compared

# Answers that are shown at once, and letters of each text.
_OPEN, _LETTERS = 2, 1500
_CALLED = {
    "proxy_aligned": "proxy",
    "proxy_raw": "proxy",
    "student_before": "student before",
    "student": "student after",
}
_NOTE = "The figures are differences; ± is half of a 95 % interval over rows."
# Differences of evaluate's summary that the verdict needs: (pair, who, other).
_BEFORE = ("student - student_before", "The student", "its state before training")
_PROXY = ("student - proxy_aligned", "The student", "the aligned proxy")
_ALIGNED = ("proxy_aligned - proxy_raw", "The aligned proxy", "its state before alignment")


def first_screen(run: RunFolder, plain: RunFolder | None = None) -> Section:
    """The verdict on one run, its curves, and its answers to held-out prompts.

    Args:
      run: the run.
      plain: a run of plain fine-tuning on the same page, if there is one.
    """
    found = {pair[0]: of_pair(run, *pair) for pair in (_BEFORE, _PROXY, _ALIGNED)}
    findings = [finding for finding in found.values() if finding is not None]
    words: list[Block] = [Findings(findings), Text(_NOTE)]
    if not findings:
        text = "There is no verdict yet: the student was not measured before and after training."
        words = [Text(text, missing=True)]
    plots = [course for course in (_course(run, "distill"), _course(run, "align")) if course]
    beside: list[Block] = [Columns([words, [Plots(plots)]])] if plots else words
    steps = advice(facts_of(run, found, plain=plain))
    last = [Steps("What to try next", steps)] if steps else []
    return Section("Verdict", [*beside, *answers(run), *last])


def _course(run: RunFolder, stage: str) -> LinePlot | None:
    """Validation NLL of a stage by step."""
    lines = run.of_stage(stage)
    name = f"{held_out_kind(lines)}/nll"
    who, part = ("Student", "student") if stage == "distill" else ("Proxy", "proxy")
    best = run.manifests.get(part, {}).get("best_step")
    return plot(
        lines, f"{who}: NLL of held-out answers, nats", [("held-out rows", name, True)],
        best=(name, best, "best"),
    )  # fmt: skip


def of_pair(run: RunFolder, pair: str, who: str, other: str) -> Finding | None:
    """The finding of a pair of models that evaluate compared."""
    summary = run.summary
    by_split = summary.get("differences", {}).get(pair, {})
    of = summary.get("models", {}).get(pair.partition(" - ")[0], {})
    split = _split({name: of[name]["n"] for name in by_split})
    if split is None:
        return None
    rows = of[split]["n"]
    return compared(who, other, by_split[split], rows=rows, split=split)


def _split(rows: Mapping[str, int]) -> str | None:
    """The test rows, unless they are too few and there are more validation rows."""
    enough = [name for name in ("test", "validation") if rows.get(name, 0) >= FEWEST_ROWS]
    return next(iter(enough), max(rows, key=lambda name: rows[name], default=None))


def between(
    run: RunFolder, other: RunFolder, who: str, called: str, *, model: str = "student"
) -> Finding | None:
    """A model of a run against the student of another run.

    It is paired by rows if both runs measured the same rows, and otherwise compares means.
    """
    mine = run.summary.get("models", {}).get(model, {})
    theirs = other.summary.get("models", {}).get("student", {})
    both = {name: min(mine[name]["n"], theirs[name]["n"]) for name in mine if name in theirs}
    split = _split(both)
    if split is None:
        return None
    rows = both[split]
    paired = _paired(run, other, model, split)
    if paired is not None:
        return compared(who, called, paired, rows=rows, split=split)
    apart = {
        name: _apart(mine[split][name], theirs[split][name])
        for name in ("nll", "agreement", "kl")
        if name in mine[split] and name in theirs[split]
    }
    return compared(who, called, apart, rows=rows, split=split, paired=False)


def _apart(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    one, other = mine.get("token_se"), theirs.get("token_se")
    known = None if one is None or other is None else math.hypot(one, other)
    return {"token_mean": mine["token_mean"] - theirs["token_mean"], "token_se": known}


def _paired(
    run: RunFolder, other: RunFolder, model: str, split: str
) -> dict[str, dict[str, Any]] | None:
    """Differences by row; None unless both runs measured the same rows."""
    files = (run.folder / f"eval/{model}.safetensors", other.folder / "eval/student.safetensors")
    try:
        (_, mine), (_, theirs) = (read_sums(path) for path in files)
        # The same held-out rows may be part of different corpora.
        ids = [open_corpus(each.folder / "corpus").split(split).row_ids[:] for each in (run, other)]
    except UNREADABLE:
        return None
    tokens: Any = mine.get(f"{split}/tokens")
    if ids[0] != ids[1] or not np.array_equal(tokens, theirs.get(f"{split}/tokens", ())):
        return None
    found = {}
    for name in ("nll", "agreement", "kl"):
        key = f"{split}/{name}"
        if key in mine and key in theirs:
            value, error = token_mean(mine[key] - theirs[key], tokens)
            found[name] = {"token_mean": value, "token_se": error}
    return found


def plain_of(runs: Sequence[RunFolder]) -> RunFolder | None:
    """The first run whose student was fine-tuned on the teacher's answers alone."""
    kinds = (("black_box_kd", None), ("proxy_kd", 0))
    return next((run for run in runs if _kind(run) in kinds), None)


def _kind(run: RunFolder) -> tuple[Any, Any]:
    method = run.setting("method.name")
    return method, run.setting("distill.alpha") if method == "proxy_kd" else None


def facts_of(
    run: RunFolder,
    found: Mapping[str, Finding | None],
    *,
    plain: RunFolder | None = None,
) -> Facts:
    """What the advice on a run depends on.

    Args:
      run: the run.
      found: findings by pair.
      plain: a run of plain fine-tuning that it is compared with.
    """

    def outcome(pair: str) -> Outcome | None:
        finding = found.get(pair)
        return None if finding is None or not finding.judged else finding.outcome

    against = None
    if plain is not None:
        against = between(run, plain, "The proxy", "plain fine-tuning", model="proxy_aligned")
    lines, aligning = run.of_stage("distill"), run.of_stage("align")
    held_out = read_answers(_path(run))
    spoken = [
        line["answers"]["student"]["text"] for line in held_out if "student" in line["answers"]
    ]
    return Facts(
        # The path of the config, because a copy of a run has the same page.
        run=shlex.quote(str(run.folder if run.config is None else run.config.folder)),
        method=str(run.setting("method.name")),
        measured="student" in run.summary.get("models", {}),
        exported=(run.folder / "export" / "student").is_dir(),
        uses_proxy=run.config is not None and run.config.needs != "nothing",
        plain_known=plain is not None,
        before=outcome(_BEFORE[0]),
        proxy=outcome(_PROXY[0]),
        aligned=outcome(_ALIGNED[0]),
        proxy_against_plain=against.outcome if against and against.judged else None,
        alpha=run.setting("distill.alpha"),
        epochs=run.setting("distill.epochs"),
        max_steps=run.setting("distill.max_steps"),
        steps=run.manifests.get("student", {}).get("last_step"),
        student_nll=points(lines, f"{held_out_kind(lines)}/nll")[1],
        proxy_nll=points(aligning, f"{held_out_kind(aligning)}/nll")[1],
        ended=[*_ended_in_rounds(aligning), *_ended_held_out(held_out)],
        empty=sum(not text.strip() for text in spoken),
        answers=len(spoken),
    )


def _ended_in_rounds(lines: Sequence[Line]) -> Iterator[tuple[str, int, int]]:
    for line in lines:
        rate: Any = line.get("samples/finish_rate")
        rows: Any = line.get("samples/rows")
        if is_number(rate) and is_number(rows) and line.get("phase"):
            yield f"the proxy in {phase_name(line['phase'])}", round(rate * rows), int(rows)


def _ended_held_out(lines: Sequence[Line]) -> Iterator[tuple[str, int, int]]:
    """An answer that did not end counts only if it is at least as long as the teacher's."""
    for name, who in (("proxy_aligned", "the aligned proxy"), ("student", "the student")):
        pairs = [
            (line["answers"][name], line["teacher"]["tokens"])
            for line in lines
            if name in line["answers"]
        ]
        ended = sum(answer["finished"] for answer, _ in pairs)
        yield who, ended, sum(a["finished"] or a["tokens"] >= most for a, most in pairs)


def _path(run: RunFolder) -> Any:
    return run.folder / "eval" / FILE


def answers(run: RunFolder) -> list[Block]:
    """The held-out prompts, each with the answers of teacher, proxy and student side by side."""
    lines = read_answers(_path(run))
    if not lines:
        text = "No held-out answers are there: proxykd evaluate draws them (evaluate.answers)."
        return [Text(text, missing=True)]
    teacher = ", ".join(teacher_names(run))
    blocks = [_side_by_side(line, teacher) for line in lines]
    intro = Text(
        f"{len(lines)} {lines[0]['split']} prompts. Proxy and student answer greedily, with at "
        f"most {MOST_TOKENS} tokens, and never saw these rows."
    )
    rest = blocks[_OPEN:]
    folded = [Fold(f"{len(rest)} more prompts", rest)] if rest else []
    return [intro, *blocks[:_OPEN], *folded]


def _side_by_side(line: Line, teacher: str) -> Answers:
    length = _tokens(line["teacher"])
    said = [
        ("prompt", _cut(line["prompt"]), ""),
        ("teacher", _cut(line["teacher"]["text"]), f"{teacher}, {length}" if teacher else length),
    ]
    for name in (*PROXIES, *STUDENTS):
        answer = line["answers"].get(name)
        if answer is not None:
            remark = _tokens(answer) + ("" if answer["finished"] else ", not finished")
            said.append((_CALLED[name], _cut(answer["text"]) or "(empty)", remark))
    return Answers(f"Row {line['row_id'][:12]}", said)


def _tokens(answer: Mapping[str, Any]) -> str:
    return f"{answer['tokens']} token{'' if answer['tokens'] == 1 else 's'}"


def _cut(text: str) -> str:
    if len(text) <= _LETTERS:
        return text
    return f"{text[:_LETTERS]} … ({len(text) - _LETTERS:,} more letters)"


def compared_runs(runs: Sequence[RunFolder]) -> Section:
    """The verdict on several runs: each student, and each against plain fine-tuning if one is."""
    plain = plain_of(runs)
    base = plain or runs[0]
    called = f"plain fine-tuning ({base.label})" if plain else f"that of {base.label}"
    blocks: list[Block] = []
    for run in runs:
        own = {pair[0]: of_pair(run, *pair) for pair in (_BEFORE, _PROXY)}
        findings = [finding for finding in own.values() if finding is not None]
        if run is not base:
            against = between(run, base, "The student", called)
            findings = [*([] if against is None else [against]), *findings]
        words: list[Block] = [Findings(findings)] if findings else []
        steps = advice(facts_of(run, own, plain=plain))
        if steps:
            words.append(Steps(f"What to try next with {run.label}", steps))
        if not findings:
            words.insert(0, Text("The student was not measured.", missing=True))
        blocks.append(Fold(run.label, words, is_open=True))
    return Section("Verdict", [Text(_NOTE), *blocks])
