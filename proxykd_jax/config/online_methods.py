"""The methods whose student answers during its training; see ``methods.py`` for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.method_section import SCORER, AnsweringSection, Needs, Scorer, scored_by
from proxykd_jax.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)

if TYPE_CHECKING:
    from proxykd_jax.config.schema import Config


WARMUP_TEXT = "whose answers the warm-up learns"


class OnlineSection(AnsweringSection):
    """Keys of the methods that train on the current student's own answers.

    They start with a warm-up by NLL. Its optimizer has the settings of ``distill.optimizer`` and a
    separate state. ``distill.max_steps`` counts the steps after the warm-up.
    """

    warmup_epochs: NonNegativeInt = Field(
        1, description="passes of NLL before the method's own steps; 0: none"
    )
    warmup_max_steps: NonNegativeInt | None = Field(
        None, description="most steps of this warm-up; 0: none"
    )
    warmup_learning_rate: PositiveFloat | None = Field(
        None, description="learning rate of this warm-up (default: distill.optimizer's)"
    )

    @property
    def warms_up(self) -> bool:
        """Whether there is a warm-up."""
        return self.warmup_epochs > 0 and self.warmup_max_steps != 0


class ScoredSection(OnlineSection):
    """Keys of the methods whose scorer reads the student's answers during training.

    In white-box KD all text is the scorer's (paper, 4.3), so ``warmup_text`` is by default.
    """

    needs: ClassVar[Needs] = "proxy"
    warmup_text: Literal["teacher", "scorer"] = Field("scorer", description=WARMUP_TEXT)

    @property
    def reads_scorer_text(self) -> bool:
        return self.warms_up and self.warmup_text == "scorer"


class Gkd(ScoredSection):
    """GKD: a generalised JSD to the scorer on the student's own answers and on fixed ones."""

    name: Literal["gkd"] = "gkd"
    scorer: Scorer = Field("unaligned", description=SCORER)
    student_share: Share = Field(
        1.0, description="lambda: share of batches that the student answers itself"
    )
    beta: Share = Field(
        1.0, description="the scorer's weight in the JSD's mixture: 0 forward KL, 1 reverse KL"
    )
    fixed: Literal["teacher", "scorer"] = Field(
        "scorer", description="whose answers the other batches hold"
    )
    temperature: PositiveFloat = Field(1.0, description="temperature of the student's sampling")
    scorer_temperature: PositiveFloat = Field(
        1.0, description="temperature of the scorer's softmax"
    )

    @property
    def student_answers(self) -> bool:
        return self.student_share > 0

    @property
    def reads_scorer_text(self) -> bool:
        return super().reads_scorer_text or (self.student_share < 1 and self.fixed == "scorer")

    def defines(self) -> dict[str, Any]:
        return {
            **scored_by(self.scorer),
            "distill": {"alpha": 0.0, "reduction": "example_mean"},
        }

    def warnings(self) -> list[str]:
        if 0 < self.beta < 0.05 or 0.95 < self.beta < 1:
            return [
                f"method.beta is {self.beta}: this close to 0 or 1 the JSD is the KL of that end "
                f"times {min(self.beta, 1 - self.beta):.2g}, which makes the steps smaller. 0 and "
                "1 select the KLs themselves."
            ]
        return []


class OnPolicy(ScoredSection):
    """On-policy distillation: the reverse KL to the proxy on the student's own answers."""

    name: Literal["on_policy"] = "on_policy"
    uses_fresh_prompts: ClassVar[bool] = True
    scorer: Scorer = Field("aligned", description=SCORER)
    warmup_text: Literal["teacher", "scorer"] = Field("teacher", description=WARMUP_TEXT)
    form: Literal["full", "sampled"] = Field(
        "full", description="KL over the vocabulary, or only at the drawn token (the authors' form)"
    )
    coef: PositiveFloat = Field(
        1.0, description="weight of the KL (in the authors' code, of the reward per token)"
    )
    samples_per_prompt: PositiveInt = Field(4, description="answers per prompt")
    fresh_prompts: bool = Field(
        True, description="also use corpus.fresh_prompts, besides the prompts of the teacher's rows"
    )

    def defines(self) -> dict[str, Any]:
        return {**scored_by(self.scorer), "distill": {"alpha": 0.0}}


class MiniLlm(ScoredSection):
    """MiniLLM: reverse KL of whole answers by policy gradient, with the scorer loaded."""

    name: Literal["minillm"] = "minillm"
    scorer: Scorer = Field("unaligned", description=SCORER)
    teacher_mixing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="a: tokens are drawn from a p + (1 - a) q (p: scorer, q: student)"
    )
    clip: PositiveFloat | None = Field(0.2, description="eps of the clipped ratio; null: no clip")
    rollouts: PositiveInt = Field(
        256, description="answers drawn per step; each update uses distill.batch_size of them"
    )
    inner_epochs: PositiveInt = Field(4, description="passes over a step's answers")
    include_current: bool = Field(
        False, description="include a token's own reward in its return (authors' code: yes)"
    )
    discount: Share = Field(1.0, description="discount of later rewards (authors' code: 0.95)")
    length_normalize: bool = Field(True, description="divide a return by its number of terms")
    weight_single_step: bool = Field(
        True, description="also weight the exact term by importance weights (authors' code: no)"
    )
    reward_scale: PositiveFloat = Field(1.0, description="factor on rewards (authors' code: 2)")
    reward_clip: PositiveFloat | None = Field(
        None, description="largest reward after scaling (authors' code: 100)"
    )
    whiten: Literal["none", "responses", "padding_too"] = Field(
        "none", description="normalise advantages to mean 0, std 1 (authors' code: padding_too)"
    )
    anchor: Literal["none", "nll_on_scorer_text"] = Field(
        "none", description="an additional NLL; it replaces the paper's NLL on plain text"
    )
    anchor_weight: PositiveFloat = Field(1.0, description="weight of the anchor's loss")
    anchor_kl_share: Share = Field(
        0.0,
        description="share of the anchor's loss that is the KL from the scorer instead of the NLL "
        "(authors' code: 0.5)",
    )

    @property
    def reads_scorer_text(self) -> bool:
        return super().reads_scorer_text or self.anchor != "none"

    def defines(self) -> dict[str, Any]:
        return {
            **scored_by(self.scorer),
            "distill": {"alpha": 0.0, "reduction": "token_mean"},
        }

    def rows_a_step(self, batch_size: int) -> int:
        return self.rollouts

    def check(self, config: Config) -> None:
        rows = config.distill.batch_size
        if self.rollouts % rows:
            raise ValueError(
                f"method.rollouts {self.rollouts} must be a multiple of distill.batch_size {rows}"
            )

    def updates_a_step(self, batch_size: int) -> int:
        """Returns the number of updates on a step's answers."""
        return self.inner_epochs * (self.rollouts // batch_size)


class Gad(OnlineSection):
    """GAD: the student's reward comes from a discriminator between teacher and student."""

    name: Literal["gad"] = "gad"
    needs: ClassVar[Needs] = "nothing"
    samples_per_prompt: PositiveInt = Field(8, description="answers per prompt")
    temperature: PositiveFloat = Field(
        0.8, description="temperature of the student, in answering and in training"
    )
    kl_weight: NonNegativeFloat = Field(
        0.001, description="weight of the KL to the warmed-up student"
    )
    advantage_ddof: Literal[0, 1] = Field(
        1, description="1: standard deviation over n - 1 answers; 0: over n"
    )
    discriminator_learning_rate: PositiveFloat | None = Field(
        None, description="learning rate of the discriminator (default: the student's)"
    )

    def defines(self) -> dict[str, Any]:
        return {"distill": {"alpha": 0.0, "reduction": "token_mean"}}
