"""The programs of a student that answers while it trains, and what is held beside it.

``answer`` draws its answers on the student's mesh, ``distill`` learns from them, ``nll`` is the
warm-up before, ``logps`` MiniLLM's look at a rollout, ``own`` the steps of ``proxy_kd`` on the
student's answers. The size of the tokenizer is not known: vocabularies are taken whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proxykd_jax.baselines.gad import GadObjective, GadSpec, GadWarmupObjective, GameBatch
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.minillm import MiniLlmObjective, RolloutBatch
from proxykd_jax.baselines.on_policy import OnPolicyObjective
from proxykd_jax.baselines.rollouts import AnswerBatch
from proxykd_jax.baselines.scored import ScoredSpec, sampling_time_logps
from proxykd_jax.config import Config
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.config.methods import ProxyKd
from proxykd_jax.config.online_methods import Gad, Gkd, MiniLlm, OnlineSection, OnPolicy
from proxykd_jax.data.order import default_buckets
from proxykd_jax.generation.decode import DrawSettings, Mixing
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.cost import forward_flops, head_flops
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.training.abstract import (
    AbstractModel,
    Cost,
    Lengths,
    Program,
    abstract_model,
    abstract_rows,
    answering_program,
    place,
    place_rows,
    step_program,
    weights_read,
)
from proxykd_jax.training.discriminator import adversarial_optimizer, discriminator_of
from proxykd_jax.training.objectives import Objective
from proxykd_jax.training.programs import programs, step_cost
from proxykd_jax.training.state import init_state


def run_programs(config: Config, proxy: ModelConfig, student: ModelConfig) -> list[Program]:
    """The programs of a run in the order of its stages, those of the student's answers too.

    Args:
      config: of the run.
      proxy, student: architectures, with ``lora`` set where an adapter is trained.
    """
    found = programs(config, proxy, student)
    method = config.method
    *before, stored = found
    if isinstance(method, Gad):
        return [*before, *_Game(config, method, student).programs()]
    if not _is_scored(config):
        return found
    scored = _Scored(config, proxy, student)
    if isinstance(method, OnlineSection) and method.warms_up:
        before.append(dataclasses.replace(stored, name="nll"))
    if isinstance(method, ProxyKd) and method.student_share < 1:
        # The scorer is no argument that these steps look at.
        share = 1 - method.student_share
        before.append(dataclasses.replace(stored, resident=scored.held, times=share))
    return [*before, *scored.programs()]


def beside_the_student(
    config: Config, proxy: ModelConfig | None, student: ModelConfig, axes: dict[str, int]
) -> dict[str, int]:
    """What a device holds beside the student while it trains, in bytes, by name.

    Args:
      config: of the run.
      proxy, student: as in ``run_programs``; a scorer whose architecture is not known is left out.
      axes: of the student's mesh.
    """
    if isinstance(config.method, Gad):
        return _Game(config, config.method, student).beside(axes)
    if _is_scored(config) and proxy is not None:
        scorer = abstract_model(proxy, config.proxy, config.align)
        return {"scorer": scorer.weight_bytes(axes)}
    return {}


def _is_scored(config: Config) -> bool:
    """Whether the proxy is held beside the student."""
    method = config.method
    return config.needs == "proxy" or (isinstance(method, ProxyKd) and method.student_share > 0)


def _answers(rows: int, length: int) -> AnswerBatch:
    """Shapes of a batch of answers."""
    flags = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    return AnswerBatch(abstract_rows(rows, length), flags, flags)


def _trains(model: AbstractModel) -> Callable[[dict[str, int]], int]:
    """Bytes of a student in training that are not among the arguments of a forward pass."""

    def held(axes: dict[str, int]) -> int:
        found = bytes_per_device(model.state.opt_state, axes)
        if model.spec.trainable == "full" and model.spec.dtype != "float32":
            found += bytes_per_device(model.state.trainable, axes)  # what answers is a cast copy
        return found

    return held


def _answering(
    config: Config,
    method: AnsweringSection,
    model: AbstractModel,
    vocab_size: int,
    resident: Callable[[dict[str, int]], int],
    *,
    temperature: float,
    times: float,
    other: AbstractModel | None = None,
    mixing: Mixing | None = None,
) -> Program:
    """The student's answers, as ``baselines.rollouts.Answering`` draws them."""
    return answering_program(
        "answer",
        "distill",
        model,
        method.sample_batch_size,
        max_length=config.corpus.max_length,
        max_new_tokens=method.max_new_tokens,
        settings=DrawSettings(temperature, 1.0, vocab_size, (0,)),
        resident=lambda mesh: resident(dict(mesh.shape)),
        other=other,
        mixing=mixing,
        times=times,
    )


# --- beside a scorer ------------------------------------------------------------------------------


class _Scored:
    """A student beside the proxy: GKD, on-policy distillation, MiniLLM, Proxy-KD's own answers."""

    def __init__(self, config: Config, proxy: ModelConfig, student: ModelConfig) -> None:
        self.config = config
        self.pupil = abstract_model(student, config.student, config.distill)
        self.scorer = abstract_model(proxy, config.proxy, config.align)
        self.vocab_size = min(proxy.vocab_size, student.vocab_size)
        self.spec = ScoredSpec(self.pupil.spec, self.scorer.spec, self.vocab_size)
        self.frozen = {"student": self.pupil.frozen, "scorer": self.scorer.weights}
        self.length = default_buckets(config.corpus.max_length)[-1]

    def held(self, mesh: Mesh) -> int:
        """Bytes of the scorer on a device."""
        return self.scorer.weight_bytes(dict(mesh.shape))

    def programs(self) -> list[Program]:
        """Those of the method's own steps."""
        method, distill = self.config.method, self.config.distill
        if isinstance(method, ProxyKd):
            own = GkdObjective(0.0, 1.0, distill.reduction, distill.alpha)
            share = method.student_share
            return [self._answers(method, 1.0, share), self._step("own", own, times=share)]
        if isinstance(method, Gkd):
            gkd = GkdObjective(method.beta, method.scorer_temperature, distill.reduction)
            found = [self._step("distill", gkd)]
            if method.student_share > 0:
                found.insert(0, self._answers(method, method.temperature, method.student_share))
            return found
        if isinstance(method, OnPolicy):
            on_policy = OnPolicyObjective(method.form, method.coef, distill.reduction)
            many = method.samples_per_prompt
            return [
                self._answers(method, 1.0, many),
                self._step("distill", on_policy, answers=many),
            ]
        assert isinstance(method, MiniLlm)
        return self._minillm(method)

    def _minillm(self, method: MiniLlm) -> list[Program]:
        mixing = None
        if method.teacher_mixing > 0:
            mixing = Mixing(self.scorer.spec.config, method.teacher_mixing)
        anchored = method.anchor != "none"

        def batch(rows: int) -> RolloutBatch:
            values = jax.ShapeDtypeStruct((rows, self.length), jnp.float32)
            anchor = abstract_rows(rows, self.length) if anchored else None
            return RolloutBatch(_answers(rows, self.length), values, values, values, anchor)

        return [
            self._answers(method, 1.0, 1.0, mixing),
            self._logps(),
            self._step(
                "distill",
                MiniLlmObjective.of(method),
                batch,
                answers=2 if anchored else 1,
                times=method.inner_epochs,
            ),
        ]

    def _answers(
        self, method: AnsweringSection, temperature: float, times: float, mixing: Any = None
    ) -> Program:
        trains, scorer = _trains(self.pupil), self.scorer

        def resident(axes: dict[str, int]) -> int:
            # A scorer that is mixed in is an argument.
            return trains(axes) + (scorer.weight_bytes(axes) if mixing is None else 0)

        return _answering(
            self.config,
            method,
            self.pupil,
            self.vocab_size,
            resident,
            temperature=temperature,
            times=times,
            other=None if mixing is None else scorer,
            mixing=mixing,
        )

    def _step(
        self,
        name: str,
        objective: Objective,
        batch_of: Callable[[int], Any] | None = None,
        *,
        answers: int = 1,
        times: float = 1.0,
    ) -> Program:
        """A step on answers, ``answers`` to each of its rows."""
        state = self.pupil.state

        def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
            own = step_cost(self.pupil, axes, answers * rows, lengths.row, state=state)
            seen = self._seen(axes, answers * rows, lengths)
            return Cost(own.flops + seen.flops, own.bytes_moved + seen.bytes_moved)

        return step_program(
            self.config,
            name,
            "distill",
            self.spec,
            objective,
            self.pupil.optimizer,
            state,
            self.frozen,
            batch_of or (lambda rows: _answers(answers * rows, self.length)),
            cost,
            times,
        )

    def _seen(self, axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        """The scorer's pass over rows."""
        flops = forward_flops(self.scorer.spec.config, rows, lengths.row)
        return Cost(flops, weights_read(self.scorer, axes))

    def _logps(self) -> Program:
        """Both models' log-probs of the answers of an update, as they were drawn."""
        state, batch_size = self.pupil.state, self.config.distill.batch_size

        def lower(mesh: Mesh, rows: int) -> list[Any]:
            batch = place_rows(abstract_rows(rows, self.length), mesh)
            trainable, frozen = place(state.trainable, mesh), place(self.frozen, mesh)
            return [sampling_time_logps.lower(trainable, frozen, batch, spec=self.spec)]

        def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
            seen = self._seen(axes, rows, lengths)
            flops = forward_flops(self.pupil.spec.config, rows, lengths.row)
            moved = seen.bytes_moved + weights_read(self.pupil, axes)
            return Cost(seen.flops + flops, moved)

        return Program(
            "logps",
            "distill",
            self.pupil.spec.config.num_params,
            batch_size,
            lower,
            lambda axes: bytes_per_device((self.frozen, state.trainable), axes),
            lambda mesh: bytes_per_device(state.opt_state, dict(mesh.shape)),
            cost,
            whole=True,
        )


# --- beside a discriminator -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Game:
    """GAD: student and discriminator in one state, the warmed-up student beside."""

    config: Config
    method: Gad
    student: ModelConfig

    @functools.cached_property
    def pupil(self) -> AbstractModel:
        return abstract_model(self.student, self.config.student, self.config.distill)

    def _both(self) -> tuple[Any, Any]:
        """The state of student and discriminator, and its optimizer."""
        trainable, method = self.pupil.state.trainable, self.method
        optimizer = adversarial_optimizer(
            self.config.distill.optimizer,
            1,
            discriminator_learning_rate=method.discriminator_learning_rate,
        )

        def make(trainable: Any) -> Any:
            other = discriminator_of(trainable, self.student.model_dim)
            return init_state({"student": trainable, "discriminator": other}, optimizer)

        return jax.eval_shape(make, trainable), optimizer

    def beside(self, axes: dict[str, int]) -> dict[str, int]:
        """See ``beside_the_student``."""
        pupil = self.pupil
        both = bytes_per_device(self._both()[0], axes)
        return {
            "discriminator and its optimizer": both - bytes_per_device(pupil.state, axes),
            "warmed-up student": bytes_per_device(pupil.state.trainable, axes),
        }

    def programs(self) -> list[Program]:
        """Answers, the warm-up of both, the game."""
        config, method, pupil = self.config, self.method, self.pupil
        reduction, many = config.distill.reduction, method.samples_per_prompt
        trains = _trains(pupil)

        def resident(axes: dict[str, int]) -> int:
            return trains(axes) + sum(self.beside(axes).values())

        answering = _answering(
            config,
            method,
            pupil,
            self.student.vocab_size,
            resident,
            temperature=method.temperature,
            times=many,
        )
        objective = GadObjective(
            method.kl_weight, method.advantage_ddof, method.temperature, reduction
        )
        game = self._step("distill", objective, pupil.state.trainable, own_rows=many)
        if not method.warms_up:
            return [answering, game]
        return [answering, self._step("nll", GadWarmupObjective(reduction), None, 1), game]

    def _step(self, name: str, objective: Objective, reference: Any, own_rows: int) -> Program:
        """A step whose student learns from ``own_rows`` rows a prompt."""
        pupil, many = self.pupil, self.method.samples_per_prompt
        state, optimizer = self._both()

        def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
            model = pupil.spec.config
            own = step_cost(pupil, axes, own_rows * rows, lengths.row, state=state)
            seen = step_cost(pupil, axes, (1 + many) * rows, lengths.row, state={})
            passes = 3 if pupil.spec.trainable == "full" else 2
            no_head = passes * head_flops(model, (1 + many) * rows * lengths.row)
            flops = own.flops + seen.flops - no_head
            moved = own.bytes_moved + seen.bytes_moved
            if reference is not None:
                flops += forward_flops(model, own_rows * rows, lengths.row)
                moved += weights_read(pupil, axes)
            return Cost(flops, moved)

        return step_program(
            self.config,
            name,
            "distill",
            GadSpec(pupil.spec, self.student.vocab_size),
            objective,
            optimizer,
            state,
            {"base": pupil.frozen, "reference": reference},
            self._batch,
            cost,
        )

    def _batch(self, rows: int) -> GameBatch:
        many = self.method.samples_per_prompt
        # The last token of an answer is among the inputs.
        length = default_buckets(self.config.corpus.max_length + 1)[-1]

        def grouped(x: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, many, *x.shape[1:]), x.dtype)

        samples = jax.tree.map(grouped, _answers(rows * many, length))
        last_P = jax.ShapeDtypeStruct((rows,), jnp.int32)
        last_PG = jax.ShapeDtypeStruct((rows, many), jnp.int32)
        return GameBatch(_answers(rows, length), last_P, samples, last_PG)
