"""``--dry-run``: checks a config against the files that are present, and trains nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.config import Config, ModelSection, SourceConfig, Work
from proxykd_jax.errors import UserError

if TYPE_CHECKING:
    from proxykd_jax.data.corpus import TokenCorpus
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.texts.tokenizer import Tokenizer
    from proxykd_jax.training.phase import Phase

_GIB = 1 << 30
_SERVER_WAIT_S = 5.0
_ROWS_TRIED = 100


@dataclass
class Report:
    """What the checks found.

    Attributes:
      problems: one sentence for each thing that would stop the run.
      unchecked: one sentence for each thing that could not be checked, because it is absent.
    """

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        """Prints one finding."""
        print(f"{title:<10} {text}", flush=True)


def dry_run(config: Config) -> list[str]:
    """Checks config, files, tokenizers, templates and shapes; prints steps, tokens and memory.

    Args:
      config: the config of the run.

    Returns:
      One sentence for each thing that could not be checked, because it is absent.

    Raises:
      UserError: at least one check failed; one message lists all problems.
    """
    report = Report()
    report.say("config", f"{config.name}, preset {config.preset}: every key is valid")
    sources = _check_sources(config, report)
    tokenizer = _check_tokenizers(config, report)
    if tokenizer is not None:
        _show_example(config, tokenizer, sources, report)
    _check_mesh(config, report)
    models = {role: _check_model(config, role, tokenizer, report) for role in ("proxy", "student")}
    counted = _count_phases(config, sources, models, report)
    for role, found in models.items():
        if found is not None and (role == "student" or config.needs != "nothing"):
            _check_shapes(config, role, found, counted, report)
    proxy, student = models["proxy"], models["student"]
    if proxy and student and proxy.vocab_size != student.vocab_size and tokenizer is None:
        report.problems.append(
            f"the proxy has {proxy.vocab_size} embeddings and the student {student.vocab_size}; "
            "soft labels need one vocabulary for both"
        )
    _check_server(config, report)
    _check_benchmarks(config, report)
    if counted is not None:
        _show_steps(counted, report)
    for missing in report.unchecked:
        report.say("unchecked", missing)
    if report.problems:
        raise UserError("\n".join(report.problems))
    print("dry run: nothing is wrong with what could be checked", flush=True)
    return report.unchecked


def _attempt(report: Report, what: str, check: Any) -> Any:
    """The result of a check; if it raises UserError, adds the message to the problems."""
    try:
        return check()
    except UserError as error:
        report.problems.append(f"{what}: {error}")
        return None


# --- data -----------------------------------------------------------------------------------------


def _check_sources(config: Config, report: Report) -> list[SourceConfig]:
    """Checks all files of the corpus section; returns the training sources that are present."""
    from proxykd_jax.texts.files import list_files, source_files
    from proxykd_jax.texts.funnel import describe_passed_over

    corpus = config.corpus
    present = []
    groups = {"sources": corpus.sources, "fresh_prompts": corpus.fresh_prompts, "test": corpus.test}
    for group, members in groups.items():
        for index, source in enumerate(members):
            key = f"corpus.{group}.{index}"
            place = source.path or source.dataset or source.tfds
            passed_over: dict[str, str] = {}
            try:
                if source.path is not None:
                    found = source_files(source.path, held_out=group == "test")
                    passed_over = found.passed_over
                if source.answers is not None:
                    list_files(source.answers)
            except UserError as error:
                report.unchecked.append(f"{key}: {error}")
                continue
            if source.path is None and not Path(str(place)).exists():
                report.unchecked.append(f"{key}: {place} is not on this machine")
                continue
            report.say("data", f"{key}: {place}")
            if passed_over:
                report.say("data", f"{key}: {describe_passed_over(passed_over)}")
            if group == "sources":
                present.append(source)
    for pattern in corpus.benchmarks:
        try:
            list_files(pattern)
        except UserError as error:
            report.unchecked.append(f"corpus.benchmarks: {error}")
    return present


def _check_tokenizers(config: Config, report: Report) -> Tokenizer | None:
    from proxykd_jax.texts.tokenizer import check_same_vocabulary, load_tokenizer, tokenizer_place
    from proxykd_jax.training.model import model_origin

    place = tokenizer_place(config)
    if not Path(place).is_dir():
        report.unchecked.append(f"tokenizer: {place} is not on this machine")
        return None
    tokenizer = _attempt(report, "tokenizer", lambda: load_tokenizer(config))
    if tokenizer is None:
        return None
    report.say("tokenizer", f"{place}: {tokenizer.vocab_size} ids")
    student = model_origin(config.student)
    if student != place and (Path(student) / "tokenizer.json").is_file():
        _attempt(
            report,
            "student",
            lambda: check_same_vocabulary(tokenizer, load_tokenizer(student)),
        )
    return tokenizer


def _show_example(
    config: Config, tokenizer: Tokenizer, sources: list[SourceConfig], report: Report
) -> None:
    """Prints the first row that can be rendered, as the model will see it."""
    from proxykd_jax.texts.readers import read_source
    from proxykd_jax.texts.records import Drops
    from proxykd_jax.texts.template import Renderer

    def show() -> None:
        renderer = Renderer.of(tokenizer, config.corpus)
        for source in sources:
            drops = Drops()
            rows = read_source(source, prompts_only=False, drops=Drops())
            for row in islice(rows, _ROWS_TRIED):
                (encoded,) = renderer.encode_batch([row], source)
                if encoded.drop is None:
                    report.say("example", renderer.describe(row, source))
                    return
                drops.add(encoded.drop, row.origin)
            if drops.total:
                raise UserError(f"none of the first {drops.total} rows can be rendered: {drops}.")

    _attempt(report, "corpus", show)


@dataclass(frozen=True)
class _Counted:
    """The phases that the stages would take.

    Attributes:
      aligned, taught: the phases of ``align`` and of ``distill``.
      exact: the corpus is prepared. Otherwise the number of its rows is an estimate, and each row
        has the greatest length.
      origin: what was counted.
      proxy_known: the proxy's architecture is known. Otherwise a small one stands for it.
    """

    aligned: list[Phase]
    taught: list[Phase]
    exact: bool
    origin: str
    proxy_known: bool


def _count_phases(
    config: Config,
    sources: list[SourceConfig],
    models: Mapping[str, ModelConfig | None],
    report: Report,
) -> _Counted | None:
    """The phases of both stages, made as the stages make them; None if the rows are unknown."""
    from proxykd_jax.data.corpus import SPLITS
    from proxykd_jax.planning.run_programs import run_phases
    from proxykd_jax.texts.funnel import describe_notes
    from proxykd_jax.training.sketch import SketchedCorpus

    corpus = _prepared(config)
    if corpus is not None:
        sizes: dict[str, int] = {name: len(corpus.split(name)) for name in SPLITS}
        learnt = ("warmup", "align", "distill")
        tokens = sum(int(corpus.split(name).lengths.sum()) for name in learnt)
        origin = f"from {sum(sizes[name] for name in learnt)} rows of {tokens} tokens"
        for label, source in corpus.counts["sources"].items():
            for line in describe_notes(source.get("notes", {})):
                report.say("note", f"{label}: {line}")
    else:
        count = _count_rows(config, sources, report)
        if count is None:
            report.unchecked.append("steps: the number of rows is not known without the corpus")
            return None
        kept = count * (1 - config.corpus.validation_fraction)
        sizes = {name: math.ceil(kept * share) for name, share in config.corpus.shares}
        most = count * config.corpus.max_length
        origin = f"from {count} rows, of at most {most} tokens, if no row is dropped"
    # Without a prepared corpus, assume the expected number of rows, each of the greatest length.
    rows = corpus or SketchedCorpus.of(config, sizes, 1)
    proxy, student = (models[role] or _any_model(config, role) for role in ("proxy", "student"))
    phases = _attempt(report, "steps", lambda: run_phases(config, proxy, student, rows))
    if phases is None:
        return None
    known = models["proxy"] is not None
    return _Counted(phases["align"], phases["distill"], corpus is not None, origin, known)


def _show_steps(counted: _Counted, report: Report) -> None:
    """The steps of each phase, and the tokens that they read from the corpus."""
    named: dict[str, Phase] = {}
    if counted.aligned:
        named["warm-up"] = counted.aligned[0]
    rounds = counted.aligned[1:]
    if rounds:
        named[f"{len(rounds)} rounds of"] = max(rounds, key=lambda phase: phase.steps)
    named |= {f"student's {phase.name}": phase for phase in counted.taught[:-1] if phase.steps}
    named["student"] = counted.taught[-1]
    # With a prepared corpus the count is exact, unless early stopping ends a phase sooner.
    steps = ", ".join(f"{name} {phase.steps}" for name, phase in named.items())
    about = "at most" if counted.exact else "about"
    report.say("steps", f"{about}: {steps} ({counted.origin})")
    tokens = ", ".join(f"{name} {phase.tokens}" for name, phase in named.items())
    report.say("tokens", f"at most: {tokens} (read from the corpus; drawn answers come on top)")


def _any_model(config: Config, role: str) -> ModelConfig:
    """A small model in place of one that is absent; the number of steps does not depend on it."""
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.training.model import lora_config

    section: ModelSection = getattr(config, role)
    small = ModelConfig("llama", 16, 1, 8, 8, 1, 1, 8)
    return small.replace(lora=lora_config(section)) if section.trainable == "lora" else small


def _prepared(config: Config) -> TokenCorpus | None:
    """The prepared corpus of the run; None if it is absent or incomplete."""
    from proxykd_jax.artifacts import MANIFEST, read_json
    from proxykd_jax.data.corpus import open_corpus

    folder = config.folder / "corpus"
    if not (folder / MANIFEST).exists() or read_json(folder / MANIFEST)["status"] != "complete":
        return None
    return open_corpus(folder)


def _count_rows(config: Config, sources: list[SourceConfig], report: Report) -> int | None:
    """The number of rows of the sources, at most ``corpus.max_rows``.

    If a file is absent or unreadable it is ``corpus.max_rows`` itself, which may be None.
    """
    from proxykd_jax.texts.funnel import describe_notes
    from proxykd_jax.texts.readers import read_source
    from proxykd_jax.texts.records import Drops, Notes

    most = config.corpus.max_rows
    total = 0
    for index, source in enumerate(config.corpus.sources):
        if source not in sources:
            continue
        drops, notes = Drops(), Notes()
        read = functools.partial(
            read_source, source, prompts_only=False, drops=drops, notes=notes, source_index=index
        )
        rows: int | None = _attempt(report, "corpus", lambda read=read: sum(1 for _ in read()))
        for reason, number in sorted(drops.counts.items()):
            first = drops.origins[reason][0]
            report.say("dropped", f"{number} rows: {reason} (first at {first})")
        for line in describe_notes(notes.as_json()):
            report.say("note", f"corpus.sources.{index}: {line}")
        if rows is None:
            return most
        total += rows
    if len(sources) < len(config.corpus.sources):
        return most
    return min(total, most or total)


# --- models ---------------------------------------------------------------------------------------


def _check_model(
    config: Config, role: str, tokenizer: Tokenizer | None, report: Report
) -> ModelConfig | None:
    """Checks a model's files, vocabulary and length; returns its architecture.

    The architecture is read from the model's folder, or else from the folder that its key
    ``config`` names. Returns None if it cannot be read.
    """
    from proxykd_jax.models.hf_config import read_config
    from proxykd_jax.models.hf_weights import cut_config
    from proxykd_jax.models.tensor_files import weight_files
    from proxykd_jax.texts.tokenizer import check_embedding_rows
    from proxykd_jax.training.model import lora_config, model_origin

    section: ModelSection = getattr(config, role)
    origin = model_origin(section)
    if Path(origin).is_dir():
        folder = origin
        _attempt(report, role, lambda: weight_files(Path(origin)))
    elif section.config is not None:
        folder = section.config
        report.unchecked.append(f"{role}: the weights of {origin} are not on this machine")
    else:
        report.unchecked.append(
            f"{role}: {origin} is not on this machine (name a folder with its config.json in "
            f"{role}.config to check shapes without it)"
        )
        return None
    found: ModelConfig | None = _attempt(report, role, lambda: read_config(folder))
    if found is None:
        return None
    if section.init:
        layers = section.init.first_layers
        found = _attempt(report, f"{role}.init", lambda: cut_config(found, layers))
    if found is None:
        return None
    if tokenizer is not None:
        size = found.vocab_size
        _attempt(report, role, lambda: check_embedding_rows(tokenizer, size, origin))
        if config.score.top_k > size:
            report.problems.append(
                f"score.top_k: {config.score.top_k} is more than the vocabulary's {size} ids"
            )
    if config.corpus.max_length > found.max_positions:
        report.problems.append(
            f"{role}: corpus.max_length is {config.corpus.max_length}, but the model has "
            f"{found.max_positions} positions"
        )
    if section.trainable == "lora":
        found = found.replace(lora=lora_config(section))
    return found


def _check_server(config: Config, report: Report) -> None:
    """Checks that the sampling server, if any, answers and serves the proxy's base model."""
    from proxykd_jax.generation.server import ServerClient, UnansweredError
    from proxykd_jax.training.model import model_origin

    server = config.align.sampling.server
    if server is None:
        return
    try:
        ServerClient(server, model_origin(config.proxy)).check(retries=0, timeout_s=_SERVER_WAIT_S)
    except UnansweredError as error:
        report.unchecked.append(f"not checked: {error}")
    except UserError as error:
        report.problems.append(str(error))
    else:
        report.say("server", f"{server.url} answers ({server.api}, serves {server.serves})")


def _check_benchmarks(config: Config, report: Report) -> None:
    """Checks that the files of the benchmarks are present."""
    from proxykd_jax.tasks.items import hub_place
    from proxykd_jax.texts.files import list_files

    settings = config.evaluate.benchmarks
    for task, path in settings.paths.items() if settings else ():
        try:
            place = hub_place(path)
            if place is None:
                report.say("benchmark", f"{task}: {len(list_files(path))} files")
            elif Path(place[0]).exists():
                report.say("benchmark", f"{task}: {path}")
            else:
                raise UserError(f"{place[0]} is not on this machine")
        except UserError as error:
            report.unchecked.append(f"evaluate.benchmarks.{task}: {error}")


def _check_mesh(config: Config, report: Report) -> None:
    sizes: dict[str, tuple[Work, int]] = {
        "align.batch_size": ("align", config.align.batch_size),
        "align.sampling.batch_size": ("sample", config.align.sampling.batch_size),
        "score.batch_size": ("score", config.score.batch_size),
        "distill.batch_size": ("distill", config.distill.batch_size),
        "evaluate.batch_size": ("evaluate", config.evaluate.batch_size),
    }
    for key, (work, size) in sizes.items():
        axes = config.mesh.of(work)
        ways = (1 if axes.data == "rest" else axes.data) * axes.fsdp
        if size % ways:
            report.problems.append(
                f"{key}: {size} rows cannot be split over data x fsdp = {ways} devices; choose a "
                f"multiple of {ways}"
            )


def _check_shapes(
    config: Config, role: str, model: ModelConfig, counted: _Counted | None, report: Report
) -> None:
    """Traces a training step on shapes alone; prints the memory that its arrays take per device."""
    import jax

    from proxykd_jax.parallel.sharding import bytes_per_device
    from proxykd_jax.training.abstract import abstract_rows, state_of
    from proxykd_jax.training.batch_objectives import NllObjective
    from proxykd_jax.training.optimizer import make_optimizer
    from proxykd_jax.training.sketch import abstract_model
    from proxykd_jax.training.state import init_state
    from proxykd_jax.training.steps import make_train_step

    section: ModelSection = getattr(config, role)
    stage = config.align if role == "proxy" else config.distill
    abstract, optimizer = abstract_model(model, section), make_optimizer(stage.optimizer, 1)
    frozen = abstract.frozen
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), abstract.trainable)
    held = (frozen, state.trainable)
    step = make_train_step(
        abstract.spec,
        NllObjective(stage.reduction),
        optimizer,
        microbatches=stage.microbatches,
        seed=0,
    )
    shapes = abstract_rows(stage.batch_size, config.corpus.max_length)
    _attempt(report, role, lambda: jax.eval_shape(step, state, frozen, shapes))
    kinds: tuple[Work, ...] = ("align", "sample", "score") if role == "proxy" else ("distill",)
    axes = config.mesh.of(kinds[0]).model_dump(include={"fsdp", "tensor"})
    for work in kinds[1:]:
        other = config.mesh.of(work).model_dump(include={"fsdp", "tensor"})
        _attempt(report, f"mesh.{work}", lambda other=other: bytes_per_device(held, other))
    beside: dict[str, Any] = {}
    if role == "student" and counted is not None:
        last = counted.taught[-1]
        beside = dict(last.spec.beside(last.frozen, state_of(last)))
        if not counted.proxy_known:
            beside.pop("scorer", None)
    parts = _attempt(
        report,
        role,
        lambda: {
            "frozen weights": bytes_per_device(frozen, axes),
            "trained weights and optimizer": bytes_per_device(state, axes),
            **{name: bytes_per_device(tree, axes) for name, tree in beside.items()},
        },
    )
    if parts is not None:
        listed = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in parts.items())
        learnt = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trainable))
        report.say(
            role,
            f"{model.num_params / 1e9:.2f}B parameters, {learnt / 1e6:.1f}M trained; a device "
            f"holds {listed}, plus activations",
        )
