"""A row of a corpus as text, and the count of rows that were left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from proxykd_jax.data.normalise import normalise_text

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """A conversation, or a plain text.

    Attributes:
      messages: an optional system message, then user and assistant in turn. A teacher's row ends
        with the assistant's answer, a prompt without answer with the user. Empty for a plain text.
      text: the plain text; None for a conversation.
      origin: where the row was read, ``file:line`` (``file:row`` where files have no lines).
      source_index: which source of the config it came from.
      prompt: of a plain text: the beginning that is its prompt; None where it has none or it was
        not looked for (``text_prompts.with_prompts``).
    """

    messages: tuple[Message, ...]
    text: str | None
    origin: str
    source_index: int = 0
    prompt: str | None = None

    @property
    def first_user_message(self) -> str:
        """The normalised key that decides the split: one question never lands in two splits.

        Of a plain text it is the prompt, and the whole text where there is no prompt.
        """
        if self.text is not None:
            return normalise_text(self.text if self.prompt is None else self.prompt)
        return normalise_text(next(m.content for m in self.messages if m.role == "user"))

    @property
    def user_texts(self) -> tuple[str, ...]:
        """What the user says (a plain text: its prompt, and all of it), as it stands."""
        if self.text is not None:
            return (self.text,) if self.prompt is None else (self.prompt, self.text)
        return tuple(m.content for m in self.messages if m.role == "user")

    @property
    def without_answer(self) -> TextRow:
        """The row as it is where it serves as a prompt alone: a plain text cut to its prompt."""
        if self.text is None or self.prompt is None:
            return self
        return replace(self, text=self.prompt, prompt=None)

    @property
    def has_answer(self) -> bool:
        """Whether the row ends with an answer. A plain text answers itself."""
        return self.text is not None or self.messages[-1].role == "assistant"


@dataclass(slots=True)
class Drops:
    """Rows left out: how many for each reason, and where the first few of them stand.

    Attributes:
      counts: reason -> rows.
      origins: reason -> origins of the first ``keep`` rows.
      keep: origins kept a reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)
    keep: int = 5

    def add(self, reason: str, origin: str) -> None:
        """Counts one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.origins.setdefault(reason, [])
        if len(kept) < self.keep:
            kept.append(origin)

    def merge(self, other: Drops) -> None:
        """Adds another count to this one."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            kept = self.origins.setdefault(reason, [])
            kept.extend(other.origins[reason][: self.keep - len(kept)])

    @property
    def total(self) -> int:
        """Rows left out for any reason."""
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """``{reason: {"count": n, "first": [origins]}}``, for a manifest."""
        return {
            reason: {"count": count, "first": list(self.origins[reason])}
            for reason, count in self.counts.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Drops:
        """The inverse of ``as_json``."""
        return cls(
            {reason: entry["count"] for reason, entry in value.items()},
            {reason: list(entry["first"]) for reason, entry in value.items()},
        )

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count} (first at {self.origins[reason][0]})"
            for reason, count in sorted(self.counts.items(), key=lambda item: -item[1])
        )


class RowProblem(Exception):  # noqa: N818  (a verdict on one row, caught where rows are counted)
    """Why one row is left out. The reason is counted in ``Drops``; reading goes on."""
