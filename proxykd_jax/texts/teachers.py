"""Which model gave an answer, by the row's own word, and whether it is the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
# Where neither the config nor the layout says more: the paper's teacher, of which Nectar and
# OpenOrca hold answers.
DEFAULT_TEACHER = "gpt-4"
ANOTHER_MODEL = "an answer of another model"
_MODEL_KEYS = ("model", "generator", "model_name", "model_id")
_MOST = 100


def plain_name(name: str) -> str:
    """A model's name without case, spaces and punctuation: ``GPT-4`` is ``gpt4``."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def is_teacher(model: str, teacher: str) -> bool:
    """Whether a model's name begins with the teacher's, perhaps behind its maker's name."""
    wanted = plain_name(teacher)
    return any(plain_name(name).startswith(wanted) for name in (model, model.rpartition("/")[2]))


def model_of(record: Record) -> str | None:
    """The model that a row names, or None."""
    names = (record.get(key) for key in _MODEL_KEYS)
    return next((name for name in names if isinstance(name, str) and name.strip()), None)


def another_model(model: str | None, teacher: str | None) -> str | None:
    """Why an answer of a model is dropped, or None; unknown models and teachers drop none."""
    if model is None or teacher is None or is_teacher(model, teacher):
        return None
    return f"{ANOTHER_MODEL} ({model})"


class ModelCount:
    """The models whose answers the rows of one file hold, by their own word.

    Args:
      teacher: the model that is wanted; None for any.
    """

    def __init__(self, teacher: str | None) -> None:
        self._teacher = teacher
        self._rows: dict[str, int] = {}

    def problem(self, record: Record) -> str | None:
        """Counts a row; why it is dropped, or None."""
        model = model_of(record)
        if model is None:
            return None
        if model not in self._rows and len(self._rows) >= _MOST:
            model = "others"
        self._rows[model] = self._rows.get(model, 0) + 1
        return another_model(model, self._teacher)

    def mixed(self) -> tuple[str, int] | None:
        """What to say of a file that mixes models although no teacher is named, and its rows."""
        if self._teacher is not None or len(self._rows) < 2:
            return None
        ranked = sorted(self._rows.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{model} ({rows:,})" for model, rows in ranked[:5])
        more = f" and {len(ranked) - 5:,} more" if len(ranked) > 5 else ""
        said = (
            f"answers of {len(ranked)} models are mixed, {shown}{more}; teacher keeps those of one"
        )
        return said, sum(self._rows.values())
