"""What every method's section of the config has, and those whose student can answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from proxykd_jax.config.section import PositiveInt, Section

if TYPE_CHECKING:
    from proxykd_jax.config.schema import Config

# What a method takes beside the teacher's texts: nothing, the proxy's soft labels on disk, or the
# proxy itself while the student trains.
Needs = Literal["nothing", "labels", "proxy"]
Scorer = Literal["unaligned", "aligned"]
SCORER = "the white-box model whose distribution is learnt: the proxy as it is, or aligned"


class MethodSection(Section):
    """A method's knobs. A class of each method adds its name and its keys."""

    needs: ClassVar[Needs] = "labels"
    # Whether the student's texts are answers of the proxy, drawn before it trains.
    proxy_answers: ClassVar[bool] = False
    # Whether a discriminator learns beside the student.
    discriminates: ClassVar[bool] = False
    # Whether the student learns from ``corpus.fresh_prompts``, where there are any.
    uses_fresh_prompts: ClassVar[bool] = False

    @property
    def reads_scorer_text(self) -> bool:
        """Whether answers of the scorer to the prompts of D_s are drawn once and stored."""
        return False

    def defines(self) -> dict[str, Any]:
        """Values of the run's other keys that make it this method, nested as in the file."""
        return {}

    def suggests(self) -> dict[str, Any]:
        """Values in place of the preset's, which a file may change."""
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


def scored_by(scorer: Scorer) -> dict[str, Any]:
    """What the choice of a scorer means for ``align``."""
    return {"align": {"alignment": "none"}} if scorer == "unaligned" else {}
