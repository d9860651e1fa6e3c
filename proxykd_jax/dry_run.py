"""--dry-run: checks a config as far as the files at hand allow, and trains nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.config import Config, ModelSection, SourceConfig, Work
from proxykd_jax.errors import UserError

if TYPE_CHECKING:
    from proxykd_jax.data.corpus import TokenCorpus
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.texts.tokenizer import Tokenizer

_GIB = 1 << 30
_SERVER_WAIT_S = 5.0
_ROWS_TRIED = 100


@dataclass
class Report:
    """What was found: problems stop a run, unchecked things may."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def say(self, title: str, text: str) -> None:
        """Prints one finding."""
        print(f"{title:<10} {text}", flush=True)


def dry_run(config: Config) -> list[str]:
    """Checks config, files, tokenizers, templates and shapes; prints steps, tokens and memory.

    Returns:
      What could not be checked, because it is absent.

    Raises:
      UserError: what is there does not fit; all of it in one message.
    """
    report = Report()
    report.say("config", f"{config.name}, preset {config.preset}: every key is valid")
    sources = _check_sources(config, report)
    tokenizer = _check_tokenizers(config, report)
    if tokenizer is not None:
        _show_example(config, tokenizer, sources, report)
    _check_mesh(config, report)
    models = {role: _check_model(config, role, tokenizer, report) for role in ("proxy", "student")}
    for role, found in models.items():
        if found is not None and (role == "student" or config.needs != "nothing"):
            _check_shapes(config, role, found, report, models["proxy"])
    proxy, student = models["proxy"], models["student"]
    if proxy and student and proxy.vocab_size != student.vocab_size and tokenizer is None:
        report.problems.append(
            f"proxy and student have {proxy.vocab_size} and {student.vocab_size} embeddings; "
            "soft labels need one vocabulary"
        )
    _check_server(config, report)
    _check_benchmarks(config, report)
    _show_steps(config, sources, models, report)
    for missing in report.unchecked:
        report.say("unchecked", missing)
    if report.problems:
        raise UserError("\n".join(report.problems))
    print("dry run: nothing is wrong with what could be checked", flush=True)
    return report.unchecked


def _attempt(report: Report, what: str, check: Any) -> Any:
    """The result of a check, or None with its sentence among the problems."""
    try:
        return check()
    except UserError as error:
        report.problems.append(f"{what}: {error}")
        return None


# --- data -----------------------------------------------------------------------------------------


def _check_sources(config: Config, report: Report) -> list[SourceConfig]:
    """Sources whose files are here."""
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
    """The first row that can be rendered of the first source that is here, as the model sees it."""
    from itertools import islice

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


def _show_steps(
    config: Config,
    sources: list[SourceConfig],
    models: Mapping[str, ModelConfig | None],
    report: Report,
) -> None:
    """The steps of each phase, by the phases that the stages would take."""
    from proxykd_jax.data.corpus import SPLITS
    from proxykd_jax.planning.run_programs import run_phases
    from proxykd_jax.texts.funnel import describe_notes
    from proxykd_jax.training.sketch import SketchedCorpus

    corpus = _prepared(config)
    if corpus is not None:
        rows: dict[str, float] = {name: len(corpus.split(name)) for name in SPLITS}
        learnt = ("warmup", "align", "distill")
        tokens = sum(int(corpus.split(name).lengths.sum()) for name in learnt)
        origin = f"from {sum(rows[name] for name in learnt)} rows of {tokens} tokens"
        for label, source in corpus.counts["sources"].items():
            for line in describe_notes(source.get("notes", {})):
                report.say("note", f"{label}: {line}")
    else:
        count = _count_rows(config, sources, report)
        if count is None:
            report.unchecked.append("steps: the number of rows is not known without the corpus")
            return
        kept = count * (1 - config.corpus.validation_fraction)
        rows = {name: kept * share for name, share in config.corpus.shares}
        most = count * config.corpus.max_length
        origin = f"from {count} rows, of at most {most} tokens, where none is dropped"
    # A corpus that is prepared is counted; else rows of the greatest length stand for it.
    sketch = corpus or SketchedCorpus.of(
        config, {name: math.ceil(n) for name, n in rows.items()}, 1
    )
    proxy, student = (models[role] or _any_model(config, role) for role in ("proxy", "student"))
    phases = _attempt(report, "steps", lambda: run_phases(config, proxy, student, sketch))
    if phases is None:
        return
    aligned, taught = phases["align"], phases["distill"]
    steps: dict[str, int] = {}
    if aligned:
        steps["warm-up"] = aligned[0].steps
    if len(aligned) > 1:
        steps[f"{len(aligned) - 1} rounds of"] = max(phase.steps for phase in aligned[1:])
    steps |= {f"student's {phase.name}": phase.steps for phase in taught[:-1] if phase.steps}
    steps["student"] = taught[-1].steps
    listed = ", ".join(f"{name} {count}" for name, count in steps.items())
    # A prepared corpus is exact, and stopping only takes steps away.
    report.say("steps", f"{'about' if corpus is None else 'at most'}: {listed} ({origin})")


def _any_model(config: Config, role: str) -> ModelConfig:
    """A model in the place of one that is not here: steps do not depend on it."""
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.training.model import lora_config

    section: ModelSection = getattr(config, role)
    small = ModelConfig("llama", 16, 1, 8, 8, 1, 1, 8)
    return small.replace(lora=lora_config(section)) if section.trainable == "lora" else small


def _prepared(config: Config) -> TokenCorpus | None:
    """The corpus of the run, if it is there already."""
    from proxykd_jax.artifacts import MANIFEST, read_json
    from proxykd_jax.data.corpus import open_corpus

    folder = config.folder / "corpus"
    if not (folder / MANIFEST).exists() or read_json(folder / MANIFEST)["status"] != "complete":
        return None
    return open_corpus(folder)


def _count_rows(config: Config, sources: list[SourceConfig], report: Report) -> int | None:
    """Rows of the sources: counted where all files are here, else the most that are wanted."""
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
    """The model's architecture, from its folder or from ``config``."""
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
            report.problems.append(f"score.top_k: {config.score.top_k} of a vocabulary of {size}")
    if config.corpus.max_length > found.max_positions:
        report.problems.append(
            f"{role}: corpus.max_length is {config.corpus.max_length}, but the model was made for "
            f"{found.max_positions} positions"
        )
    if section.trainable == "lora":
        found = found.replace(lora=lora_config(section))
    return found


def _check_server(config: Config, report: Report) -> None:
    """Whether the server that shall draw answers is there, with the proxy's base model."""
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
    """Whether the files of the benchmarks are there."""
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
    config: Config, role: str, model: ModelConfig, report: Report, proxy: ModelConfig | None
) -> None:
    """Traces a training step on shapes alone and prints what a device holds."""
    import jax

    from proxykd_jax.parallel.sharding import bytes_per_device
    from proxykd_jax.planning.run_programs import run_phases
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
    beside: Mapping[str, Any] = {}
    if role == "student":
        scorer = proxy or _any_model(config, "proxy")
        last = run_phases(config, scorer, model)["distill"][-1]
        beside = last.spec.beside(last.frozen, state_of(last))
        if proxy is None:
            beside = {name: tree for name, tree in beside.items() if name != "scorer"}
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
            f"holds {listed}, and activations beside",
        )
