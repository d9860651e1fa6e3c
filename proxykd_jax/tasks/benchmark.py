"""Benchmarks of several models: answers, scored samples, and a summary with paired differences.

``<run>/eval/benchmarks/<model>/<task>/`` holds the answers, part by part. ``<task>.jsonl`` beside
it has one scored sample per line and is rebuilt from the answers. ``summary.json`` holds the
accuracies of the models of one call. Names with ``_loglikelihood`` hold log-likelihoods of choices;
names ending in ``_harness`` hold the results of EleutherAI's harness on the same questions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import digest_value, write_bytes, write_json
from proxykd_jax.config import Config
from proxykd_jax.config.schema import BenchmarksConfig
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.candidates import Candidate, Collected, Server, named_candidate
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import check_rows
from proxykd_jax.peers import on_first, say
from proxykd_jax.tasks.accuracies import BY_LENGTH, COMPARED, described, summarise
from proxykd_jax.tasks.answering import (
    COMPARING_VERSION,
    ChatModel,
    asking,
    comparing,
    generating,
    load_chat_model,
    looking_up,
    renderer_of,
)
from proxykd_jax.tasks.coverage import coverage, described_coverage
from proxykd_jax.tasks.extraction import EXTRACTION_VERSION, extract, is_right
from proxykd_jax.tasks.harness import check, described_checks, require_harness
from proxykd_jax.tasks.harness_model import Respondent
from proxykd_jax.tasks.items import Item, files_of, read_items
from proxykd_jax.tasks.outputs import (
    Answering,
    AnswerStore,
    Line,
    lines_to_bytes,
)
from proxykd_jax.tasks.prompts import (
    PROMPT_VERSION,
    prompt_hash,
    prompt_of,
    question_alone,
)

Who = Candidate | Server | Collected
GENERATE, COMPARE = "generate", COMPARED


@dataclass(frozen=True)
class Ask:
    """One task, asked in one mode.

    Attributes:
      task: one of the benchmarks.
      mode: ``GENERATE`` or ``COMPARE``.
      items: the questions.
    """

    task: str
    mode: str
    items: Sequence[Item]

    @property
    def name(self) -> str:
        """Name of the folder and in the summary."""
        return self.task if self.mode == GENERATE else f"{self.task}_{COMPARE}"


def run_benchmarks(
    config: Config, models: Sequence[str] = (), tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Lets models answer benchmarks; existing answers are not asked for again.

    Args:
      config: with ``evaluate.benchmarks``.
      models: entries as in ``evaluate.benchmarks.models``; they replace those.
      tasks: only these of the configured benchmarks (default: all).

    Returns:
      The content of ``<run>/eval/benchmarks/summary.json``.

    Raises:
      UserError: the config names no benchmark; files, models or a server cannot be used; or lm-eval
        is requested and not installed.
    """
    settings = config.evaluate.benchmarks
    if settings is None:
        raise UserError(
            "evaluate: the config names no benchmark; give their files under evaluate.benchmarks."
        )
    if settings.harness:
        require_harness()
    asks, files = _asks(settings, tasks)
    named = _named(config, models or settings.models)
    folder = config.folder / "eval" / "benchmarks"
    scored: dict[str, dict[str, list[Line]]] = {}
    checks: dict[str, dict[str, Any]] = {}
    for name, who in named.items():
        scored[name], checks[name] = _of_model(config, settings, folder / name, name, who, asks)
    summary = {
        "prompt_version": PROMPT_VERSION,
        "extraction_version": EXTRACTION_VERSION,
        "files": files,
        **summarise(scored),
    }
    if settings.harness:
        summary["harness"] = {name: found for name, found in checks.items() if found}
    write_json(folder / "summary.json", summary)
    for line in [*described(summary), *described_checks(checks)]:
        print(line, flush=True)
    return summary


def _asks(
    settings: BenchmarksConfig, tasks: Sequence[str]
) -> tuple[list[Ask], dict[str, dict[str, Any]]]:
    """What is asked, and by task what the files hold (``coverage``)."""
    asks, covered = [], {}
    for task, path in files_of(settings, tasks, "evaluate").items():
        questions = read_items(task, path, settings.limit)
        items = questions.items
        covered[task] = coverage(questions)
        for line in described_coverage(task, covered[task]):
            say(line)
        if settings.mode != COMPARE:
            asks.append(Ask(task, GENERATE, items))
        single = [item for item in items if item.choices and not item.several]
        if settings.mode != GENERATE and single:
            if len(single) < len(items):
                left = len(items) - len(single)
                say(f"evaluate: {task}: {left} items without one right choice are not compared")
            asks.append(Ask(task, COMPARE, single))
    if not asks:
        raise UserError(
            "evaluate.benchmarks: mode: loglikelihood compares choices, and the named benchmarks "
            "have none; give mode: generate."
        )
    return asks, covered


def _named(config: Config, models: Sequence[str]) -> dict[str, Who]:
    named: dict[str, Who] = {}
    for text in models:
        name, who = named_candidate(config, text)
        if name in named:
            raise UserError(
                f"evaluate: two models are called {name}; give one another name, as NAME={text}."
            )
        named[name] = who
    return named


def _of_model(
    config: Config,
    settings: BenchmarksConfig,
    folder: Path,
    name: str,
    who: Who,
    asks: Sequence[Ask],
) -> tuple[dict[str, list[Line]], dict[str, Any]]:
    """The scored samples of one model, and the harness's results on them, by ``Ask.name``."""

    # Loaded at the first missing part, then shared by all tasks.
    @functools.cache
    def load() -> ChatModel:
        assert isinstance(who, Candidate)
        mesh = make_mesh(config.mesh.of("evaluate"))
        check_rows(settings.batch_size, mesh, "evaluate.benchmarks.batch_size")
        return load_chat_model(config, who, mesh)

    scored, checks = {}, {}
    if settings.harness and not isinstance(who, Candidate):
        say(f"evaluate: {name} is not a model on this machine; the harness does not ask it")
    for ask in asks:
        if ask.mode == COMPARE and not isinstance(who, Candidate):
            say(f"evaluate: {name} gives no log-likelihoods; {ask.name} is left out")
            continue
        store = AnswerStore(
            folder / ask.name,
            settings=_decisive(config, settings, who, ask),
            inputs={"model": who.identity},
            items_per_part=settings.items_per_part,
            label=f"{name} {ask.name}",
        )
        answer = functools.partial(_answering, config, settings, who, ask, load)
        store.collect(len(ask.items), answer)
        score = functools.partial(_scored, store, ask)
        scored[ask.name] = on_first(score)
        if settings.harness and isinstance(who, Candidate):
            checks[ask.name] = check(
                store,
                ask.items,
                scored[ask.name],
                Respondent(
                    renderer_of(config, who.tokenizer),
                    load,
                    batch_size=settings.batch_size,
                    seed=config.seed,
                ),
                max_new_tokens=settings.max_new_tokens,
            )
    return scored, checks


def _decisive(config: Config, settings: BenchmarksConfig, who: Who, ask: Ask) -> dict[str, Any]:
    """The settings that determine answers, beside the model."""
    hashes = [(item.id, prompt_hash(_prompt(ask, item))) for item in ask.items]
    found: dict[str, Any] = {
        "mode": ask.mode,
        "prompt_version": PROMPT_VERSION,
        "items": len(hashes),
        "limit": settings.limit,
        "prompts": digest_value(hashes),
        "items_per_part": settings.items_per_part,
    }
    if ask.mode == COMPARE:
        found["comparing_version"] = COMPARING_VERSION
    if ask.mode == GENERATE and not isinstance(who, Collected):
        found["max_new_tokens"] = settings.max_new_tokens
    if isinstance(who, Candidate):
        renderer = renderer_of(config, who.tokenizer)
        found["tokenizer"] = renderer.tokenizer.digest
        found["template"] = renderer.template_digest
        found["end_tokens"] = list(renderer.end_token_ids)
    return found


def _prompt(ask: Ask, item: Item) -> str:
    return prompt_of(item) if ask.mode == GENERATE else question_alone(item)


def _answering(
    config: Config,
    settings: BenchmarksConfig,
    who: Who,
    ask: Ask,
    load: Callable[[], ChatModel],
) -> Answering:
    budget = settings.max_new_tokens
    if isinstance(who, Server):
        return asking(who, settings.endpoint, ask.items, max_new_tokens=budget)
    if isinstance(who, Collected):
        return looking_up(who, ask.items)
    if ask.mode == COMPARE:
        return comparing(load(), ask.items, batch_size=settings.batch_size)
    return generating(
        load(),
        ask.items,
        seed=config.seed,
        max_new_tokens=budget,
        batch_size=settings.batch_size,
    )


def _scored(store: AnswerStore, ask: Ask) -> list[Line]:
    """The samples of a task with their scores; also written beside the answers."""
    lines = store.read()
    score: Callable[[Item, Line], Line] = _score if ask.mode == GENERATE else _score_compared
    samples = [score(item, line) for item, line in zip(ask.items, lines, strict=True)]
    write_bytes(store.folder.with_name(f"{ask.name}.jsonl"), lines_to_bytes(samples))
    return samples


def _score(item: Item, line: Line) -> Line:
    extracted = extract(item, line["output"])
    return {
        "task": item.task,
        "subtask": item.subtask,
        "id": item.id,
        "prompt_hash": line["prompt_hash"],
        "output": line["output"],
        "extracted": extracted,
        "gold": item.gold,
        "score": int(is_right(item, extracted)),
        "finished": line["finished"],
    }


def _score_compared(item: Item, line: Line) -> Line:
    """Scores by the highest log-likelihood, and by the highest per byte of the choice's text."""
    labels = [label for label, _ in item.choices]
    logliks, sizes = line["logliks"], line["bytes"]
    raw = by_length = None
    if logliks is not None:
        raw = labels[logliks.index(max(logliks))]
        shares = [value / max(1, size) for value, size in zip(logliks, sizes, strict=True)]
        by_length = labels[shares.index(max(shares))]
    return {
        "task": item.task,
        "subtask": item.subtask,
        "id": item.id,
        "prompt_hash": line["prompt_hash"],
        "logliks": logliks,
        "extracted": raw,
        "extracted_by_length": by_length,
        "gold": item.gold,
        "score": int(raw == item.gold),
        BY_LENGTH: int(by_length == item.gold),
        "finished": logliks is not None,
    }
