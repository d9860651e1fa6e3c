"""What every method's section of the config has."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from proxykd_jax.config.section import Section

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

    def defines(self) -> dict[str, Any]:
        """Values of the run's other keys that make it this method, nested as in the file."""
        return {}

    def suggests(self) -> dict[str, Any]:
        """Values in place of the preset's, which a file may change."""
        return {}

    def warnings(self) -> list[str]:
        """Of values that are allowed and yet seldom meant."""
        return []


def scored_by(scorer: Scorer) -> dict[str, Any]:
    """What the choice of a scorer means for ``align``."""
    return {"align": {"alignment": "none"}} if scorer == "unaligned" else {}
