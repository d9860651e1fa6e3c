"""Settings of the run, and the counts of its corpus."""

from __future__ import annotations

from typing import Any

from proxykd_jax.data.corpus import SPLITS
from proxykd_jax.reporting.blocks import (
    Block,
    Code,
    Fold,
    Section,
    Table,
    Text,
    Value,
    shown,
)
from proxykd_jax.reporting.run_folder import STAGES, RunFolder
from proxykd_jax.reporting.teacher import name_of

# The keys that readers look for first: (name on the page, key).
HIGHLIGHTS = (
    ("preset", "preset"),
    ("method", "method.name"),
    ("seed", "seed"),
    ("longest row, tokens", "corpus.max_length"),
    ("alignment", "align.alignment"),
    ("rounds", "align.num_rounds"),
    ("preference loss", "align.preference.loss"),
    ("beta", "align.preference.beta"),
    ("proxy's learning rate", "align.optimizer.learning_rate"),
    ("proxy's batch", "align.batch_size"),
    ("top-k of the soft labels", "score.top_k"),
    ("alpha", "distill.alpha"),
    ("tail", "distill.tail"),
    ("weights (eq. 9)", "distill.weights.enabled"),
    ("student's learning rate", "distill.optimizer.learning_rate"),
    ("student's batch", "distill.batch_size"),
    ("student's epochs", "distill.epochs"),
)


def what_was_run(run: RunFolder) -> Section:
    """Recipe, models, versions and stages, folded."""
    blocks: list[Block] = [Text(problem, missing=True) for problem in run.problems]
    recipe = Table("Recipe", ("key", "value"), _recipe(run))
    blocks.append(Fold("The recipe: models, teacher and the main settings", [recipe]))
    blocks.append(Fold("The stages: state and code version", [_stages(run)]))
    if run.config_text is not None:
        blocks.append(Fold("The whole resolved config", [Code(run.config_text)]))
    return Section("What was run", blocks)


def _recipe(run: RunFolder) -> list[tuple[Value, ...]]:
    rows: list[tuple[Value, ...]] = [(role, _model(run, role)) for role in ("proxy", "student")]
    for source in run.setting("corpus.sources") or []:
        place = source.get("path") or source.get("dataset") or source.get("tfds")
        teacher = name_of(run, source)
        rows.append(("teacher's answers", f"{place} (of {teacher})" if teacher else str(place)))
    for name, key in HIGHLIGHTS:
        value = run.setting(key)
        if value is not None:
            # As text, because these are settings and not figures of a column.
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return shown(value) if isinstance(value, int | str) else f"{value:g}"


def _model(run: RunFolder, role: str) -> str:
    section = run.setting(role)
    if not isinstance(section, dict):
        return "not known"
    begun = section.get("init") or {}
    origin = section.get("path") or begun.get("path")
    parts = [str(origin)]
    if begun.get("first_layers"):
        parts.append(f"its first {begun['first_layers']} layers")
    if section.get("trainable") == "lora":
        parts.append(f"LoRA of rank {(section.get('lora') or {}).get('rank')}")
    elif section.get("trainable"):
        parts.append("all weights trained")
    parts.append(str(section.get("dtype")))
    if section.get("quantize") not in (None, "none"):
        parts.append(f"frozen layers in {section['quantize']}")
    return ", ".join(parts)


def _stages(run: RunFolder) -> Table:
    rows: list[tuple[Value, ...]] = []
    for folder, command in STAGES.items():
        manifest = run.manifests.get(folder, {})
        state = "complete" if run.is_complete(folder) else run.absent(folder)
        rows.append((command, state, manifest.get("code_version")))
    rows.append(("evaluate", "complete" if run.summary else "Not there.", None))
    exported = [p for p in ("student", "student_adapter", "proxy", "proxy_adapter")
                if (run.folder / "export" / p).is_dir()]  # fmt: skip
    rows.append(("export", ", ".join(exported) or "Not there.", None))
    return Table("Stages", ("stage", "state", "code version"), rows)


def corpus(run: RunFolder) -> Section:
    """Rows read, dropped by reason, kept, and split."""
    blocks: list[Block] = []
    absent = run.absent("corpus")
    if absent is not None:
        return Section("Corpus", [Text(absent, missing=True)])
    counts = run.manifests["corpus"]["counts"]
    rows: list[tuple[Value, ...]] = []
    groups = {}
    for label, source in counts["sources"].items():
        groups[len(rows)] = label
        rows.append(("read", source["read"], None))
        reasons = sorted(source["drops"].items(), key=lambda item: (-item[1]["count"], item[0]))
        for reason, dropped in reasons:
            first = (dropped.get("first") or [None])[0]
            rows.append((f"left out: {reason}", dropped["count"], first))
        rows.append(("kept", source["kept"], None))
    notes: list[tuple[Value, ...]] = []
    noted = {}
    for label, source in counts["sources"].items():
        if source.get("notes"):
            noted[len(notes)] = label
        for note, found in source.get("notes", {}).items():
            notes.append((note, found["count"], f"{found['first']}: {found['example']}"))
    passed_over = [
        (f"{label}: {name}", why)
        for label, source in counts["sources"].items()
        for name, why in source.get("passed_over", {}).items()
    ]
    if not any(source["drops"] for source in counts["sources"].values()):
        blocks.append(Text("No row was left out."))
    header: tuple[str, ...] = ("what", "rows", "the first of them")
    blocks.append(Table("Rows by source", header, rows, groups=groups))
    if notes:
        header = ("note", "times", "the first of them")
        blocks.append(Table("Notes on the rows", header, notes, groups=noted))
    if passed_over:
        blocks.append(Table("Files passed over", ("file", "why"), passed_over))
    splits = dict.fromkeys(
        name for name in (*SPLITS, *counts["splits"]) if name in counts["splits"]
    )
    shared = sum(counts["splits"][name]["rows"] for name in splits if _share(counts, name))
    rows = [
        (
            name,
            counts["splits"][name]["rows"],
            counts["splits"][name]["tokens"],
            counts["splits"][name]["answer_tokens"],
            counts["splits"][name]["rows"] / shared if shared and _share(counts, name) else None,
            _share(counts, name),
        )
        for name in splits
    ]
    header = ("split", "rows", "tokens", "answer tokens", "share", "share asked for")
    note = "Shares are of warmup, align and distill together."
    blocks.append(Table("Splits", header, rows, note, digits=3))
    return Section("Corpus", blocks)


def _share(counts: dict[str, Any], split: str) -> float | None:
    share = counts["splits"][split].get("expected_share")
    return None if share is None else float(share)
