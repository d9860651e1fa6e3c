"""Base classes of the methods' sections: for all methods, and for those whose student answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.section import PositiveInt, Section

if TYPE_CHECKING:
    from proxykd_jax.config.schema import Config

# What a method needs besides the teacher's texts: nothing, the proxy's soft labels on disk, or the
# proxy itself during the student's training.
Needs = Literal["nothing", "labels", "proxy"]
Scorer = Literal["unaligned", "aligned"]
SCORER = "the white-box model whose distribution is learnt: the raw proxy, or the aligned one"


class MethodSection(Section):
    """A method's own keys. Each method's class adds its name and its keys."""

    needs: ClassVar[Needs] = "labels"
    # Whether the student trains on answers that the proxy gave beforehand.
    proxy_answers: ClassVar[bool] = False
    # Whether the student learns from ``corpus.fresh_prompts``, if there are any.
    uses_fresh_prompts: ClassVar[bool] = False

    @property
    def reads_scorer_text(self) -> bool:
        """Whether the scorer's answers to the prompts of D_s are drawn once and stored."""
        return False

    @property
    def student_answers(self) -> bool:
        """Whether the student gives answers before or while it trains."""
        return False

    def defines(self) -> dict[str, Any]:
        """Returns the values of other keys that define this method, nested as in the file."""
        return {}

    def suggests(self) -> dict[str, Any]:
        """Returns values that replace the preset's; a file may change them."""
        return {}

    def needed(self, alpha: float) -> Needs:
        """Returns what is needed besides the teacher's texts, with this ``distill.alpha``."""
        return self.needs

    @property
    def changes_training(self) -> bool:
        """Whether the method's own keys change what the student learns from stored data."""
        return True

    def check(self, config: Config) -> None:
        """Checks that the run's other keys fit this method.

        Raises:
          ValueError: a value does not fit; the message says what to choose instead.
        """

    def warnings(self) -> list[str]:
        """Returns warnings about values that are allowed but rarely intended."""
        return []


class AnsweringSection(MethodSection):
    """Keys of the methods whose student can answer during its training."""

    max_new_tokens: PositiveInt | None = Field(
        None, description="length budget of a student's answer (default: what max_length leaves)"
    )
    sample_batch_size: PositiveInt = Field(32, description="answers decoded together")

    @property
    def student_answers(self) -> bool:
        return True

    def rows_a_step(self, batch_size: int) -> int:
        """Returns the number of prompts per step."""
        return batch_size


def scored_by(scorer: Scorer) -> dict[str, Any]:
    """Returns the keys of ``align`` that the choice of a scorer implies."""
    return {"align": {"alignment": "none"}} if scorer == "unaligned" else {}
