"""Counts the phases of a run, and traces its training steps on shapes alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.rows import CountedRows
from proxykd_jax.config import Config, ModelSection, Work
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.planning.run_programs import run_phases
from proxykd_jax.training.abstract import abstract_rows, state_of
from proxykd_jax.training.batch_objectives import NllObjective
from proxykd_jax.training.model import lora_config
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.sketch import abstract_model
from proxykd_jax.training.state import init_state
from proxykd_jax.training.steps import make_train_step

_GIB = 1 << 30
_BATCHES_LOOKED_AT = 64
_MOST_PADDING = 0.5


@dataclass(frozen=True)
class CountedPhases:
    """The phases that the stages would take.

    Attributes:
      aligned, taught: the phases of ``align`` and of ``distill``.
      rows: the rows that they were counted from.
      proxy_known: the proxy's architecture is known. Otherwise a small one stands for it.
    """

    aligned: list[Phase]
    taught: list[Phase]
    rows: CountedRows
    proxy_known: bool

    def named(self) -> dict[str, Phase]:
        """The phases by the names that a reader sees; the longest round stands for all."""
        found: dict[str, Phase] = {}
        if self.aligned:
            found["warm-up"] = self.aligned[0]
        rounds = self.aligned[1:]
        if rounds:
            found[f"{len(rounds)} rounds of"] = max(rounds, key=lambda phase: phase.steps)
        found |= {f"student's {phase.name}": phase for phase in self.taught[:-1] if phase.steps}
        found["student"] = self.taught[-1]
        return found


def count_phases(
    config: Config,
    rows: CountedRows | None,
    models: Mapping[str, ModelConfig | None],
    findings: Findings,
) -> CountedPhases | None:
    """The phases of both stages, made as the stages make them; None if the rows are unknown."""
    if rows is None:
        return None
    proxy, student = (models[role] or _any_model(config, role) for role in ("proxy", "student"))
    phases = findings.attempt("steps", lambda: run_phases(config, proxy, student, rows.corpus))
    if phases is None:
        return None
    return CountedPhases(phases["align"], phases["distill"], rows, models["proxy"] is not None)


def _any_model(config: Config, role: str) -> ModelConfig:
    """A small model in place of one that is absent; the number of steps does not depend on it."""
    section: ModelSection = getattr(config, role)
    small = ModelConfig("llama", 16, 1, 8, 8, 1, 1, 8)
    return small.replace(lora=lora_config(section)) if section.trainable == "lora" else small


def show_steps(counted: CountedPhases, findings: Findings) -> None:
    """The steps of each phase, the tokens that they read, and the share of padding."""
    named = counted.named()
    # With a prepared corpus the count is exact, unless early stopping ends a phase sooner.
    steps = ", ".join(f"{name} {phase.steps}" for name, phase in named.items())
    about = "at most" if counted.rows.exact else "about"
    findings.say("steps", f"{about}: {steps} ({counted.rows.origin})")
    tokens = ", ".join(f"{name} {phase.tokens}" for name, phase in named.items())
    findings.say("tokens", f"at most: {tokens} (read from the corpus; drawn answers come on top)")
    student = named["student"]
    share = _padding_share(student)
    if share is None:
        return
    said = f"{share:.0%} of the student's positions are padding"
    if share > _MOST_PADDING:
        findings.warn(
            "padding", f"{said}; distill.batching: pack puts several rows beside each other"
        )
    else:
        findings.say("padding", said)


def _padding_share(phase: Phase) -> float | None:
    """The share of positions without a token in the first batches; None if there is no batch."""
    lengths, tokens, positions = phase.rows.lengths, 0, 0
    for batch in islice(iter(phase.plan(0)), _BATCHES_LOOKED_AT):
        positions += len(batch.rows) * batch.length
        tokens += sum(int(lengths[i]) - 1 for row in batch.rows for i in row)
    return 1 - tokens / positions if positions else None


def check_mesh(config: Config, findings: Findings) -> None:
    """Checks that batches can be split over the mesh."""
    sizes: dict[str, tuple[Work, int]] = {
        "align.batch_size": ("align", config.align.batch_size),
        "align.sampling.batch_size": ("sample", config.align.sampling.batch_size),
        "score.batch_size": ("score", config.score.batch_size),
        "distill.batch_size": ("distill", config.distill.batch_size),
        "evaluate.batch_size": ("evaluate", config.evaluate.batch_size),
    }
    method, drawing = config.method, config.mesh.drawing("distill")
    if isinstance(method, AnsweringSection) and method.student_answers:
        sizes["method.sample_batch_size"] = (drawing, method.sample_batch_size)
    for key, (work, size) in sizes.items():
        axes = config.mesh.of(work)
        ways = (1 if axes.data == "rest" else axes.data) * axes.fsdp
        if size % ways:
            findings.problems.append(
                f"{key}: {size} rows cannot be split over data x fsdp = {ways} devices; choose a "
                f"multiple of {ways}"
            )


def check_shapes(
    config: Config,
    role: str,
    model: ModelConfig,
    counted: CountedPhases | None,
    findings: Findings,
) -> None:
    """Traces a training step on shapes alone; prints the memory that its arrays take per device."""
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
    findings.attempt(role, lambda: jax.eval_shape(step, state, frozen, shapes))
    kinds: tuple[Work, ...] = ("align", "sample", "score") if role == "proxy" else ("distill",)
    if role == "student" and config.method.student_answers:
        kinds = (*kinds, config.mesh.drawing("distill"))
    axes = config.mesh.of(kinds[0]).model_dump(include={"fsdp", "tensor"})
    for work in kinds[1:]:
        other = config.mesh.of(work).model_dump(include={"fsdp", "tensor"})
        findings.attempt(f"mesh.{work}", functools.partial(bytes_per_device, held, other))
    beside: dict[str, Any] = {}
    if role == "student" and counted is not None:
        last = counted.taught[-1]
        beside = dict(last.spec.beside(last.frozen, state_of(last)))
        if not counted.proxy_known:
            beside.pop("scorer", None)
    parts = findings.attempt(
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
        findings.say(
            role,
            f"{model.num_params / 1e9:.2f}B parameters, {learnt / 1e6:.1f}M trained; a device "
            f"holds {listed}, plus activations",
        )
