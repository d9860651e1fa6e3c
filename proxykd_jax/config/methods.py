"""The methods that can train a student: Proxy-KD, and those that the paper compares it with.

A method's section holds its own keys. ``defines()`` returns the values of other keys that the
method requires; a file that contradicts them is refused. ``suggests()`` returns values that replace
the preset's. docs/methods.md gives definitions, the sources of the defaults, and how the papers
were interpreted.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.method_section import (
    SCORER,
    AnsweringSection,
    MethodSection,
    Needs,
    Scorer,
    scored_by,
)
from proxykd_jax.config.online_methods import Gad, Gkd, MiniLlm, OnPolicy
from proxykd_jax.config.section import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Share,
)

if TYPE_CHECKING:
    from proxykd_jax.config.schema import Config


class ProxyKd(AnsweringSection):
    """Proxy-KD (the paper): the teacher's texts, and the aligned proxy's distribution."""

    name: Literal["proxy_kd"] = "proxy_kd"
    uses_fresh_prompts: ClassVar[bool] = True
    student_share: Share = Field(
        0.0,
        description="share of steps that learn the proxy's distribution on the student's own "
        "answers (beyond the paper; above 0 the proxy is loaded as well)",
    )

    def needed(self, alpha: float) -> Needs:
        return "nothing" if alpha == 0 else self.needs

    @property
    def student_answers(self) -> bool:
        return self.student_share > 0

    @property
    def changes_training(self) -> bool:
        # Plain Proxy-KD uses none of these keys, so runs made before the keys existed stay valid.
        return self.student_answers

    def check(self, config: Config) -> None:
        share = self.student_share
        if share == 0:
            return
        if config.distill.alpha == 0:
            raise ValueError(
                f"method.student_share {share}: the loss on the student's own answers is alpha x "
                "KL alone, and distill.alpha is 0; give it a weight, or remove student_share"
            )
        if config.score.temperature != 1:
            raise ValueError(
                f"method.student_share {share}: on the student's own answers the KL is taken at "
                f"temperature 1, and score.temperature is {config.score.temperature}; set it to 1, "
                "or remove student_share"
            )


class BlackBoxKd(MethodSection):
    """Black-box KD: only the NLL of the teacher's texts; no proxy is loaded."""

    name: Literal["black_box_kd"] = "black_box_kd"
    needs: ClassVar[Needs] = "nothing"

    def defines(self) -> dict[str, Any]:
        return {"distill": {"alpha": 0.0}}


class ForwardKl(MethodSection):
    """White-box KD: a model's own answers to the prompts of D_s, and its distribution on them."""

    name: Literal["forward_kl"] = "forward_kl"
    proxy_answers: ClassVar[bool] = True
    scorer: Scorer = Field("unaligned", description=SCORER)
    kl_weight: NonNegativeFloat = Field(
        0.5, description="weight of the forward KL (LMOps minillm/finetune.py)"
    )
    nll_weight: NonNegativeFloat = Field(
        0.5, description="weight of the NLL of the scorer's answers (LMOps minillm/finetune.py)"
    )

    def defines(self) -> dict[str, Any]:
        return {
            **scored_by(self.scorer),
            "distill": {
                "alpha": self.kl_weight,
                "nll_weight": self.nll_weight,
                "weights": {"enabled": False},
                "data": "distill",
            },
        }


class Takd(MethodSection):
    """TAKD: the student learns from an assistant trained on the teacher's texts by NLL alone."""

    name: Literal["takd"] = "takd"
    assistant: Literal["finetuned", "raw"] = Field(
        "finetuned",
        description="the proxy after NLL on the teacher's texts of D_w and D_p, or the raw proxy",
    )
    lam: Share = Field(0.5, description="weight of the KL; the NLL has 1 - lam (authors: tuned)")
    temperature: PositiveFloat = Field(
        1.0, description="T of both softmaxes; the KL is scaled by T^2 (authors: tuned)"
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
    """Mentor-KD: fine-tuned on the teacher's rationales, a mentor writes and scores more."""

    name: Literal["mentor_kd"] = "mentor_kd"
    proxy_answers: ClassVar[bool] = True
    lam: Share = Field(0.3, description="weight of the KL; the NLL has 1 - lam")
    temperature: PositiveFloat = Field(2.0, description="T of both softmaxes")
    rescale: bool = Field(
        False, description="scale the KL by T^2, which the authors' code does not do"
    )
    num_rationales: PositiveInt = Field(3, description="answers of the mentor per prompt")
    sample_temperature: PositiveFloat = Field(
        0.7, description="temperature at which the mentor answers"
    )
    filter: Literal["answer_match", "none"] = Field(
        "answer_match",
        description="keep only answers (teacher's and mentor's) whose final answer is the gold one",
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
    """SODA: DPO that prefers the teacher's texts to the student's answers from before training."""

    name: Literal["soda"] = "soda"
    needs: ClassVar[Needs] = "nothing"
    beta: PositiveFloat = Field(description="strength of the preference (authors' value unknown)")
    temperature: PositiveFloat = Field(
        1.0,
        description="temperature at which the untrained student answers (authors' value unknown)",
    )
    warmup_epochs: PositiveInt = Field(
        1, description="passes of NLL on the teacher's texts before DPO (authors' value unknown)"
    )
    warmup_max_steps: PositiveInt | None = Field(None, description="most steps of this warm-up")
    nll_weight: NonNegativeFloat = Field(
        0.0,
        description="weight of an NLL of the teacher's texts added to DPO (authors' value unknown)",
    )

    @property
    def student_answers(self) -> bool:
        return True

    def defines(self) -> dict[str, Any]:
        # Here the student answers, but a sampling server would serve the proxy.
        return {"distill": {"alpha": 0.0}, "align": {"sampling": {"server": None}}}


class RandomLabels(MethodSection):
    """RS-KD: Proxy-KD with soft labels drawn at random instead of the most probable ones."""

    name: Literal["random_labels"] = "random_labels"
    draws: PositiveInt = Field(50, description="ids drawn per position, with replacement")
    proposal_power: PositiveFloat = Field(
        1.0,
        description="tau: ids are drawn from p^tau and, unless tau is 1, weighted by p / proposal",
    )

    def defines(self) -> dict[str, Any]:
        return {"score": {"temperature": 1.0}}

    def suggests(self) -> dict[str, Any]:
        # The ordinary store is then needed only for the answers' likelihoods in eq. 9.
        return {"score": {"top_k": 1}}

    def check(self, config: Config) -> None:
        if config.distill.alpha == 0:
            raise ValueError("random_labels with distill.alpha 0 is method: black_box_kd")


# The methods that ``distill`` can run.
Method = Annotated[
    ProxyKd
    | BlackBoxKd
    | ForwardKl
    | Takd
    | MentorKd
    | Soda
    | RandomLabels
    | Gkd
    | OnPolicy
    | MiniLlm
    | Gad,
    Field(discriminator="name"),
]


def named_method(data: dict[str, Any]) -> dict[str, Any]:
    """Expands ``method: takd`` to ``method: {name: takd}``."""
    name = data.get("method")
    return {**data, "method": {"name": name}} if isinstance(name, str) else data


def contradictions(
    defined: dict[str, Any], data: dict[str, Any], method: str, place: str = ""
) -> list[str]:
    """Returns a problem for each key of the file that contradicts the method's definition."""
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
                f"{here}: method.name {method} requires {json.dumps(value)} "
                f"(got {json.dumps(given)}); leave it out, or change the method's own keys"
            )
    return problems


def _mixed(lam: float) -> dict[str, Any]:
    """Returns (1 - lam) NLL + lam KL, with equal weights for all examples."""
    # Rounding writes 1 - 0.7 as 0.3.
    return {"alpha": lam, "nll_weight": round(1 - lam, 12), "weights": {"enabled": False}}
