"""The methods that a student can be trained by: Proxy-KD, and those that the paper compares.

A method's section holds its own knobs. What it means for the ordinary keys of a run, its
``defines()`` says: a file that contradicts these values is refused. ``suggests()`` are values in
place of the preset's. Definitions, sources of the defaults and readings of the papers:
docs/methods.md.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)

# What a method takes beside the teacher's texts: nothing, the proxy's soft labels on disk, or the
# proxy itself while the student trains.
Needs = Literal["nothing", "labels", "proxy"]
Scorer = Literal["unaligned", "aligned"]
_SCORER = "the white-box model whose distribution is learnt: the proxy as it is, or aligned"


class MethodSection(Section):
    """A method's knobs. A class of each method adds its name and its keys."""

    needs: ClassVar[Needs] = "labels"
    # Whether the student's texts are answers of the proxy, drawn before it trains.
    proxy_answers: ClassVar[bool] = False
    # Whether a discriminator learns beside the student.
    discriminates: ClassVar[bool] = False
    # Whether the student learns from ``corpus.fresh_prompts``, where there are any.
    uses_fresh_prompts: ClassVar[bool] = False

    def defines(self) -> dict[str, Any]:
        """Values of the run's other keys that make it this method, nested as in the file."""
        return {}

    def suggests(self) -> dict[str, Any]:
        """Values in place of the preset's, which a file may change."""
        return {}

    def warnings(self) -> list[str]:
        """Of values that are allowed and yet seldom meant."""
        return []


class AnsweringSection(MethodSection):
    """What the methods have in common whose student can answer while it trains."""

    max_new_tokens: PositiveInt | None = Field(
        None, description="length budget of a student's answer (default: what max_length leaves)"
    )
    sample_batch_size: PositiveInt = Field(32, description="answers decoded together")

    def rows_a_step(self, batch_size: int) -> int:
        """Prompts that a step takes."""
        return batch_size


class ProxyKd(AnsweringSection):
    """Proxy-KD (the paper): the teacher's texts, and the aligned proxy's distribution."""

    name: Literal["proxy_kd"] = "proxy_kd"
    uses_fresh_prompts: ClassVar[bool] = True
    student_share: Share = Field(
        0.0,
        description="share of steps that learn the proxy's distribution on answers of the student "
        "itself (beyond the paper; above 0 the proxy is loaded beside it)",
    )


class BlackBoxKd(MethodSection):
    """Black-box KD: the NLL of the teacher's texts alone; no proxy is loaded."""

    name: Literal["black_box_kd"] = "black_box_kd"
    needs: ClassVar[Needs] = "nothing"

    def defines(self) -> dict[str, Any]:
        return {"distill": {"alpha": 0.0}}


class ForwardKl(MethodSection):
    """White-box KD: a model's own answers to the prompts of D_s, and its distribution on them."""

    name: Literal["forward_kl"] = "forward_kl"
    proxy_answers: ClassVar[bool] = True
    scorer: Scorer = Field("unaligned", description=_SCORER)
    kl_weight: NonNegativeFloat = Field(
        0.5, description="weight of the forward KL (LMOps minillm/finetune.py)"
    )
    nll_weight: NonNegativeFloat = Field(
        0.5, description="weight of the NLL of the scorer's answers (LMOps minillm/finetune.py)"
    )

    def defines(self) -> dict[str, Any]:
        return {
            **_scored_by(self.scorer),
            "distill": {
                "alpha": self.kl_weight,
                "nll_weight": self.nll_weight,
                "weights": {"enabled": False},
                "data": "distill",
            },
        }


class Takd(MethodSection):
    """TAKD: an assistant, trained on the teacher's texts without preferences, in the middle."""

    name: Literal["takd"] = "takd"
    assistant: Literal["finetuned", "raw"] = Field(
        "finetuned",
        description="the proxy after the NLL of the teacher's texts of D_w and D_p, or as it is",
    )
    lam: Share = Field(0.5, description="weight of the KL; the NLL has 1 - lam (authors: searched)")
    temperature: PositiveFloat = Field(
        1.0, description="T of both softmaxes; the KL is scaled by T^2 (authors: searched)"
    )

    def defines(self) -> dict[str, Any]:
        return {
            "align": {"alignment": "nll" if self.assistant == "finetuned" else "none"},
            "score": {"temperature": self.temperature},
            "distill": _mixed(self.lam),
        }

    def suggests(self) -> dict[str, Any]:
        return {"align": {"num_rounds": 1}}


class MentorKd(MethodSection):
    """Mentor-KD: a mentor, fine-tuned on the teacher's rationales, writes and scores more."""

    name: Literal["mentor_kd"] = "mentor_kd"
    proxy_answers: ClassVar[bool] = True
    lam: Share = Field(0.3, description="weight of the KL; the NLL has 1 - lam")
    temperature: PositiveFloat = Field(2.0, description="T of both softmaxes")
    rescale: bool = Field(
        False, description="scale the KL by T^2, which the authors' code leaves out"
    )
    num_rationales: PositiveInt = Field(3, description="the mentor's answers to a prompt")
    sample_temperature: PositiveFloat = Field(
        0.7, description="temperature at which the mentor answers"
    )
    filter: Literal["answer_match", "none"] = Field(
        "answer_match",
        description="keep only answers, teacher's and mentor's, whose final answer is the gold one",
    )

    def defines(self) -> dict[str, Any]:
        return {
            "align": {"alignment": "nll"},
            "score": {"temperature": self.temperature},
            "distill": _mixed(self.lam),
        }

    def suggests(self) -> dict[str, Any]:
        return {"align": {"num_rounds": 1}}


class Soda(MethodSection):
    """SODA: DPO of the teacher's texts over answers that the student gave before any training."""

    name: Literal["soda"] = "soda"
    needs: ClassVar[Needs] = "nothing"
    beta: PositiveFloat = Field(description="strength of the preference; its authors' is not known")
    temperature: PositiveFloat = Field(
        1.0, description="temperature at which the untrained student answers (authors': not known)"
    )
    warmup_epochs: PositiveInt = Field(
        1, description="passes of NLL on the teacher's texts, before DPO (authors': not known)"
    )
    warmup_max_steps: PositiveInt | None = Field(
        None, description="at most so many steps of that NLL"
    )
    nll_weight: NonNegativeFloat = Field(
        0.0, description="weight of an NLL of the teacher's texts beside DPO (authors': not known)"
    )

    def defines(self) -> dict[str, Any]:
        # The student answers here: a server would serve the proxy.
        return {"distill": {"alpha": 0.0}, "align": {"sampling": {"server": None}}}


class RandomLabels(MethodSection):
    """RS-KD: Proxy-KD with soft labels drawn at random, in place of the most probable ones."""

    name: Literal["random_labels"] = "random_labels"
    draws: PositiveInt = Field(50, description="ids drawn a position, with replacement")
    proposal_power: PositiveFloat = Field(
        1.0,
        description="tau: ids are drawn from p^tau, and weighted by p over it unless it is 1",
    )

    def defines(self) -> dict[str, Any]:
        return {"score": {"temperature": 1.0}}

    def suggests(self) -> dict[str, Any]:
        # The ordinary store is left with the answers' likelihoods, for eq. 9.
        return {"score": {"top_k": 1}}


class OnlineSection(AnsweringSection):
    """What the methods have in common that train on the student's own answers as it gives them.

    They begin with a warm-up by NLL, whose optimizer is ``distill.optimizer`` with a state of its
    own. ``distill.max_steps`` counts the steps after it.
    """

    warmup_epochs: NonNegativeInt = Field(
        1, description="passes of NLL before the method's own steps; 0: none"
    )
    warmup_max_steps: NonNegativeInt | None = Field(
        None, description="at most so many steps of that NLL; 0: none"
    )
    warmup_learning_rate: PositiveFloat | None = Field(
        None, description="of that NLL (default: distill.optimizer's)"
    )

    @property
    def warms_up(self) -> bool:
        """Whether there is a warm-up."""
        return self.warmup_epochs > 0 and self.warmup_max_steps != 0


class ScoredSection(OnlineSection):
    """Those whose scorer sees the student's answers while it trains."""

    needs: ClassVar[Needs] = "proxy"
    warmup_text: Literal["teacher", "scorer"] = Field(
        "teacher", description="whose answers the warm-up learns"
    )


class Gkd(ScoredSection):
    """GKD: a generalised JSD to the scorer on the student's own answers and on fixed ones."""

    name: Literal["gkd"] = "gkd"
    scorer: Scorer = Field("unaligned", description=_SCORER)
    student_share: Share = Field(
        1.0, description="lambda: share of batches that the student answers itself"
    )
    beta: Share = Field(
        1.0, description="of the JSD, on the scorer: 0 is the forward KL, 1 the reverse KL"
    )
    fixed: Literal["teacher", "scorer"] = Field(
        "teacher", description="whose answers the other batches hold"
    )
    temperature: PositiveFloat = Field(1.0, description="temperature of the student's sampling")
    scorer_temperature: PositiveFloat = Field(
        1.0, description="temperature of the scorer's softmax"
    )

    def defines(self) -> dict[str, Any]:
        return {
            **_scored_by(self.scorer),
            "distill": {"alpha": 0.0, "reduction": "example_mean"},
        }

    def warnings(self) -> list[str]:
        if 0 < self.beta < 0.05 or 0.95 < self.beta < 1:
            return [
                f"method.beta is {self.beta}: so near an end the JSD is that end's KL times "
                f"{min(self.beta, 1 - self.beta):.2g}, and steps shrink with it. 0 and 1 mean the "
                "KLs themselves."
            ]
        return []


class OnPolicy(ScoredSection):
    """On-policy distillation: the reverse KL to the proxy on the student's own answers."""

    name: Literal["on_policy"] = "on_policy"
    uses_fresh_prompts: ClassVar[bool] = True
    scorer: Scorer = Field("aligned", description=_SCORER)
    form: Literal["full", "sampled"] = Field(
        "full", description="the KL over the vocabulary, or at the token drawn (authors')"
    )
    coef: PositiveFloat = Field(1.0, description="of the KL (authors': of the per-token reward)")
    samples_per_prompt: PositiveInt = Field(4, description="answers to a prompt")
    fresh_prompts: bool = Field(
        True, description="corpus.fresh_prompts too, beside the prompts of the teacher's rows"
    )

    def defines(self) -> dict[str, Any]:
        return {**_scored_by(self.scorer), "distill": {"alpha": 0.0}}


class MiniLlm(ScoredSection):
    """MiniLLM: the reverse KL of whole answers by policy gradient, the scorer at hand."""

    name: Literal["minillm"] = "minillm"
    scorer: Scorer = Field("unaligned", description=_SCORER)
    teacher_mixing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="a: tokens are drawn from a p + (1 - a) q"
    )
    clip: PositiveFloat | None = Field(0.2, description="eps of the clipped ratio; null: none")
    rollouts: PositiveInt = Field(
        256, description="answers drawn a step; distill.batch_size of them make an update"
    )
    inner_epochs: PositiveInt = Field(4, description="passes of updates over a step's answers")
    include_current: bool = Field(
        False, description="the return counts a token's own reward too (authors' code)"
    )
    discount: Share = Field(1.0, description="of later rewards (authors' code: 0.95)")
    length_normalize: bool = Field(True, description="divide a return by its number of terms")
    weight_single_step: bool = Field(
        True, description="importance weights on the exact term too (authors' code: no)"
    )
    reward_scale: PositiveFloat = Field(1.0, description="of rewards (authors' code: 2)")
    reward_clip: PositiveFloat | None = Field(
        None, description="largest reward after scaling (authors' code: 100)"
    )
    whiten: Literal["none", "responses", "padding_too"] = Field(
        "none", description="advantages less their mean, over their std (code: padding_too)"
    )
    anchor: Literal["none", "nll_on_scorer_text"] = Field(
        "none", description="an NLL beside, in place of the paper's on plain text"
    )
    anchor_weight: PositiveFloat = Field(1.0, description="weight of that NLL")
    anchor_kl_share: Share = Field(
        0.0, description="share of it that is the KL from the scorer instead (authors' code: 0.5)"
    )

    def defines(self) -> dict[str, Any]:
        return {
            **_scored_by(self.scorer),
            "distill": {"alpha": 0.0, "reduction": "token_mean"},
        }

    def rows_a_step(self, batch_size: int) -> int:
        return self.rollouts

    def updates_a_step(self, batch_size: int) -> int:
        """Updates on a step's answers."""
        return self.inner_epochs * (self.rollouts // batch_size)


class Gad(OnlineSection):
    """GAD: a discriminator between teacher and student is the student's reward."""

    name: Literal["gad"] = "gad"
    needs: ClassVar[Needs] = "nothing"
    discriminates: ClassVar[bool] = True
    samples_per_prompt: PositiveInt = Field(8, description="answers to a prompt")
    temperature: PositiveFloat = Field(
        0.8, description="of the student that answers and is trained"
    )
    kl_weight: NonNegativeFloat = Field(0.001, description="of the KL to the warmed-up student")
    advantage_ddof: Literal[0, 1] = Field(1, description="std over n - 1 or over n answers")
    discriminator_learning_rate: PositiveFloat | None = Field(
        None, description="of the discriminator (default: the student's)"
    )

    def defines(self) -> dict[str, Any]:
        return {"distill": {"alpha": 0.0, "reduction": "token_mean"}}


# Those that ``distill`` can run.
Method = Annotated[
    ProxyKd
    | BlackBoxKd
    | ForwardKl
    | Takd
    | MentorKd
    | MiniLlm
    | Gkd
    | OnPolicy
    | Soda
    | Gad
    | RandomLabels,
    Field(discriminator="name"),
]


def named_method(data: dict[str, Any]) -> dict[str, Any]:
    """``method: takd`` is short for ``method: {name: takd}``."""
    name = data.get("method")
    return {**data, "method": {"name": name}} if isinstance(name, str) else data


def contradictions(
    defined: dict[str, Any], data: dict[str, Any], method: str, place: str = ""
) -> list[str]:
    """Keys of the file that have another value than what makes the method."""
    problems = []
    for key, value in defined.items():
        if key not in data:
            continue
        given, here = data[key], f"{place}{key}"
        if isinstance(value, dict):
            if isinstance(given, dict):
                problems += contradictions(value, given, method, f"{here}.")
        elif given != value:
            problems.append(
                f"{here}: with this method.name, {method}, it is {json.dumps(value)} "
                f"(got {json.dumps(given)}); leave it out, or change the method's own keys"
            )
    return problems


def _scored_by(scorer: Scorer) -> dict[str, Any]:
    return {"align": {"alignment": "none"}} if scorer == "unaligned" else {}


def _mixed(lam: float) -> dict[str, Any]:
    """(1 - lam) NLL + lam KL, every example alike."""
    # Rounded, so that 1 - 0.7 is written as 0.3.
    return {"alpha": lam, "nll_weight": round(1 - lam, 12), "weights": {"enabled": False}}
