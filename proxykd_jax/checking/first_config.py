"""Writes the first config of a run: short, fitting the data, the models and this machine.

Each line has its reason as a comment. Keys whose default fits are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import yaml

from proxykd_jax.checking.machine import guessed_bytes, memory_limit
from proxykd_jax.checking.rows import Sample, rounded_length, tokenize
from proxykd_jax.config import Config, SourceConfig, make_config
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.folder import local_folder
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.hf_weights import cut_config
from proxykd_jax.planning.run_programs import run_programs
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import check_same_vocabulary, load_tokenizer
from proxykd_jax.training.model import lora_config, model_origin

_SAMPLE = 2000
_LEAST_LENGTH = 64
# A student that is cut out of a larger model must learn with all weights. Others of this size can.
_TRAINED_WHOLE = 2e9
_SHARE_OF_MEMORY = 0.6
_REMATS = ("none", "dots", "outputs", "full")


@dataclass(frozen=True)
class Given:
    """What the user names.

    Attributes:
      answers: files of the teacher's answers.
      columns: the files' own names of columns, by what they hold; empty if the layout is known.
      proxy, student: model folders or hub names.
      first_layers: cut the student out of ``student`` with so many first layers.
      test: files of a test set.
      prompts: files of prompts that the teacher has not answered.
      name: name of the run.
    """

    answers: tuple[str, ...]
    columns: dict[str, str]
    proxy: str
    student: str
    first_layers: int | None = None
    test: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    name: str = "my_run"


def first_config(given: Given) -> str:
    """The YAML text of a config for these files on this machine.

    Raises:
      UserError: a file is missing or holds no row that can be used, a model cannot be read, or the
        models do not share a vocabulary.
    """
    return _Writer(given).text()


class _Writer:
    def __init__(self, given: Given) -> None:
        self.given = given
        self.tokenizer = load_tokenizer(given.proxy)
        if given.student != given.proxy:
            check_same_vocabulary(self.tokenizer, load_tokenizer(given.student))
        self.reasons: dict[tuple[str, ...], str] = {}
        self._read: dict[str, ModelConfig] = {}
        self.data: dict[str, Any] = {"preset": "recommended", "name": given.name}

    def text(self) -> str:
        columns = {"columns": self.given.columns} if self.given.columns else {}
        sources = [{"path": path, **columns} for path in self.given.answers]
        self.put(sources, "", "corpus", "sources")
        self._models()
        self._corpus(make_config(self.data).corpus.sources)
        config = make_config(self.data)
        self._fit(config)
        make_config(self.data)  # what is written is a valid config
        device = jax.devices()[0]
        head = [
            f"# For {jax.device_count()} x {device.device_kind} with "
            f"{memory_limit(device) / (1 << 30):.0f} GiB. Every other key has its default;",
            "# docs/configuration.md lists them. Check this file with --dry-run before you run it.",
        ]
        return "\n".join([*head, *_lines(self.data, self.reasons)]) + "\n"

    def put(self, value: Any, reason: str, *keys: str) -> None:
        """Sets a key, with the reason for its value."""
        node = self.data
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
        if reason:
            self.reasons[keys] = reason

    # --- data -------------------------------------------------------------------------------------

    def _corpus(self, sources: tuple[SourceConfig, ...]) -> None:
        given = self.given
        template, renderer, sample = self._template(sources)
        if not sample.lengths:
            raise UserError(
                f"{', '.join(given.answers)}: none of the first {sample.drops.total} rows can be "
                f"used: {sample.drops}."
            )
        rows = f"{len(sample.lengths):,} rows looked at"
        if sample.drops.total:
            rows += f", {sample.drops.total} of them are left out"
        self.put(self.data["corpus"]["sources"], rows, "corpus", "sources")
        if given.test:
            self.put([{"path": path} for path in given.test], "", "corpus", "test")
        if given.prompts:
            reason = "the aligned proxy answers these; no answer of the teacher is needed"
            self.put([{"path": path} for path in given.prompts], reason, "corpus", "fresh_prompts")
        if template != "auto":
            reason = "the tokenizer has no chat template of its own"
            self.put(template, reason, "corpus", "template")
        ends = [self.tokenizer.backend.id_to_token(i) for i in renderer.end_token_ids]
        longest = np.array(sample.lengths)
        wanted = int(np.quantile(longest, 0.99, method="higher"))
        positions = min(self._model(place).max_positions for place in (given.proxy, given.student))
        length = min(max(rounded_length(wanted), _LEAST_LENGTH), positions)
        fit = float(np.mean(longest <= length))
        limit = ", the models' positions" if length == positions else ""
        self.put(
            length,
            f"tokens{limit}; {fit:.1%} of the rows fit (median {int(np.median(longest))}, longest "
            f"{longest.max()}); answers end with {' or '.join(ends)}",
            "corpus",
            "max_length",
        )

    def _template(self, sources: tuple[SourceConfig, ...]) -> tuple[str, Renderer, Sample]:
        """The template, and a sample that was rendered with it."""
        rows = list(itertools.islice(_rows(sources), _SAMPLE))
        conversations = any(row.text is None for _, row in rows)
        template = "auto"
        if conversations and self.tokenizer.chat_template is None:
            template = "alpaca"
        renderer = Renderer(self.tokenizer, template=template)
        return template, renderer, tokenize(iter(rows), renderer)

    # --- models -----------------------------------------------------------------------------------

    def _model(self, place: str) -> ModelConfig:
        if place not in self._read:
            self._read[place] = read_config(local_folder(place, ("*.json",)))
        return self._read[place]

    def _models(self) -> None:
        given = self.given
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.put(given.proxy, "", "proxy", "path")
        if given.first_layers is None:
            self.put(given.student, "", "student", "path")
            if self._model(given.student).num_params <= _TRAINED_WHOLE:
                self.put("full", "small enough to train all weights", "student", "trainable")
        else:
            cut_config(self._model(given.student), given.first_layers)
            init = {"path": given.student, "first_layers": given.first_layers}
            self.put(init, "", "student", "init")
            reason = "a cut model must learn with all weights"
            self.put("full", reason, "student", "trainable")
        if dtype == "float32":
            for role in ("proxy", "student"):
                self.put(dtype, "faster than bfloat16 on a CPU", role, "dtype")

    # --- memory -----------------------------------------------------------------------------------

    def _fit(self, config: Config) -> None:
        """Chooses remat and micro-batches so that a generous guess fits this machine."""
        limit = memory_limit(jax.devices()[0])
        stages: tuple[tuple[str, Literal["align", "distill"]], ...]
        stages = (("proxy", "align"), ("student", "distill"))
        for role, section in stages:
            size = getattr(config, section).batch_size
            for remat, rows in itertools.product(_REMATS, _halves(size)):
                tried = self._with(role, section, remat, rows, size)
                if self._guess(tried, section) <= limit * _SHARE_OF_MEMORY:
                    break
            else:
                raise UserError(
                    f"{role}: even with remat: full and one row at a time a training step does not "
                    f"fit the {limit / (1 << 30):.0f} GiB of this machine's device. Take a smaller "
                    "model, or ask proxykd plan --fit for other devices."
                )
            if remat != "none":
                self.put(remat, "saves memory, costs time", role, "remat")
            if rows != size:
                reason = f"rows at a time; a step still learns from {size}"
                self.put(rows, reason, section, "microbatch_size")

    def _with(self, role: str, section: str, remat: str, rows: int, size: int) -> Config:
        data = {**self.data, role: {**self.data[role], "remat": remat}}
        data[section] = {**self.data.get(section, {}), "microbatch_size": rows}
        return make_config(data)

    def _guess(self, config: Config, work: Literal["align", "distill"]) -> int:
        """The guessed bytes of the largest program of a stage."""
        models = {}
        for role in ("proxy", "student"):
            section = getattr(config, role)
            model = self._model(model_origin(section))
            if section.init:
                model = cut_config(model, section.init.first_layers)
            if section.trainable == "lora":
                model = model.replace(lora=lora_config(section))
            models[role] = model
        learns = models["student" if work == "distill" else "proxy"]
        return max(
            guessed_bytes(config, program, learns)
            for program in run_programs(config, models["proxy"], models["student"])
            if program.work == work
        )


def _rows(sources: tuple[SourceConfig, ...]) -> Iterator[tuple[SourceConfig, TextRow]]:
    for source in sources:
        for row in read_source(source, prompts_only=False, drops=Drops()):
            yield source, row


def _halves(size: int) -> Iterator[int]:
    while size >= 1:
        yield size
        if size % 2:
            return
        size //= 2


# --- YAML -----------------------------------------------------------------------------------------


def _lines(
    node: dict[str, Any], reasons: dict[tuple[str, ...], str], keys: tuple[str, ...] = ()
) -> Iterator[str]:
    """YAML lines of a mapping; the reason of a key stands behind its value."""
    indent = "  " * len(keys)
    for key, value in node.items():
        path = (*keys, key)
        reason = f"  # {reasons[path]}" if path in reasons else ""
        if isinstance(value, dict):
            yield f"{indent}{key}:{reason}"
            yield from _lines(value, reasons, path)
        elif isinstance(value, list):
            yield f"{indent}{key}:{reason}"
            yield from (f"{indent}  - {_scalar(item)}" for item in value)
        else:
            yield f"{indent}{key}: {_scalar(value)}{reason}"


def _scalar(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
    )
