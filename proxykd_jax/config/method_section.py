"""Base classes of the methods' sections: for all methods, and for those whose student answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.section import PositiveInt, Section

if TYPE_CHECKING:
    from proxykd_jax.config.schema import Config

# What a method needs beside the teacher's texts: nothing, the proxy's soft labels on disk, or the
# proxy itself during the student's training.
Needs = Literal["nothing", "labels", "proxy"]
Scorer = Literal["unaligned", "aligned"]
SCORER = "the white-box model whose distribution is learnt: the raw proxy, or the aligned one"


class MethodSection(Section):
    """A method's own keys. Each method's class adds its name and keys."""

    needs: ClassVar[Needs] = "labels"
    # Whether the student trains on answers that the proxy gave beforehand.
    proxy_answers: ClassVar[bool] = False
    # Whether the student learns from ``corpus.fresh_prompts``, if there are any.
    uses_fresh_prompts: ClassVar[bool] = False

    @property
    def reads_scorer_text(self) -> bool:
        """Whether the scorer's answers to the prompts of D_s are drawn once and stored."""
        return False

    def defines(self) -> dict[str, Any]:
        """Values of the run's other keys that define this method, nested as in the file."""
        return {}

    def suggests(self) -> dict[str, Any]:
        """Values that replace the preset's, and that a file may change."""
        return {}

    def needed(self, alpha: float) -> Needs:
        """What is taken beside the teacher's texts, with this ``distill.alpha``."""
        return self.needs

    @property
    def changes_training(self) -> bool:
        """Whether its own keys change what the student learns from what is stored."""
        return True

    def check(self, config: Config) -> None:
        """Refuses values of the run's other keys that this method cannot have.

        Raises:
          ValueError: what does not go together, and what to choose.
        """

    def warnings(self) -> list[str]:
        """Warnings about values that are allowed but rarely intended."""
        return []


class AnsweringSection(MethodSection):
    """Common part of the methods whose student can answer while it trains."""

    max_new_tokens: PositiveInt | None = Field(
        None, description="length budget of a student's answer (default: what max_length leaves)"
    )
    sample_batch_size: PositiveInt = Field(32, description="answers decoded together")

    def rows_a_step(self, batch_size: int) -> int:
        """Prompts per step."""
        return batch_size


def scored_by(scorer: Scorer) -> dict[str, Any]:
    """What the choice of a scorer implies for ``align``."""
    return {"align": {"alignment": "none"}} if scorer == "unaligned" else {}
