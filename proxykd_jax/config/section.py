"""Base class of the config's sections, and the types of its values: ranges of numbers, paths."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from proxykd_jax.small_files import path_problem

# Counts and sizes are int32 in the arrays.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


def expand_path(text: str) -> str:
    """Expands ``$NAME`` and ``${NAME}`` to environment variables, then a leading ``~`` to a home.

    Raises:
      ValueError: a variable is not set, or the result can be no path.
    """
    expanded = os.path.expandvars(text)
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        raise ValueError(
            f"the environment variable {unset[1]} is not set; set it, or write the path out"
        )
    expanded = os.path.expanduser(expanded)
    problem = path_problem(expanded)
    if problem:
        raise ValueError(problem)
    return expanded


def expand_named_path(text: str) -> str:
    """Applies ``expand_path`` to ``PATH``, or to the path in ``NAME=PATH``."""
    named = re.match(r"[\w.-]+=", text)
    start = named.end() if named else 0
    return text[:start] + expand_path(text[start:])


# A path, or text that may be one: a model or a data set is a local folder or a name on the hub.
PathText = Annotated[str, AfterValidator(expand_path)]
NamedPathText = Annotated[str, AfterValidator(expand_named_path)]


def is_path(annotation: Any) -> bool:
    """Returns whether a type is ``PathText`` or ``NamedPathText``."""
    return annotation in (PathText, NamedPathText)


class Section(BaseModel):
    """A section of the config. It is frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
