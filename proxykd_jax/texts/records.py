"""A row of a corpus as text, and the count of dropped rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from proxykd_jax.texts.normalise import normalise_text

Role = Literal["system", "user", "assistant", "tool"]
OTHER_NOTES = "other notes"


@dataclass(frozen=True, slots=True)
class TurnExtras:
    """What a turn has beside its text.

    Attributes:
      thought: an assistant's thought without its tags; "" for an empty one that the text spells
        out, None for none.
      spelled: the text of an assistant's turn as given, if it holds the thought itself.
      calls: an assistant's tool calls as the JSON text of a list in OpenAI's form, whose
        ``arguments`` are objects; None for none.
      name, call_id: of a tool's result: the function, and the call that it answers.
    """

    thought: str | None = None
    spelled: str | None = None
    calls: str | None = None
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: who speaks.
      content: the text, without a thought; "" for a call alone.
      extras: calls, thoughts and what belongs to a result; None for a turn that is a text alone.
      learnt: False for an assistant's turn that is context only.
    """

    role: Role
    content: str
    extras: TurnExtras | None = None
    learnt: bool = True

    @property
    def thought(self) -> str | None:
        """An assistant's thought, or None."""
        return None if self.extras is None else self.extras.thought

    @property
    def calls(self) -> str | None:
        """An assistant's calls as JSON text, or None."""
        return None if self.extras is None else self.extras.calls


@dataclass(frozen=True, slots=True)
class TextRow:
    """A conversation, or a plain text.

    Attributes:
      messages: an optional system message, then user and assistant alternating; results of tools
        stand behind the assistant's turn that called them. A teacher's row ends with the
        assistant's answer, a prompt with the user or with results. Empty for a plain text.
      text: the plain text; None for a conversation.
      origin: where the row was read, ``file:line`` (``file:row`` if files have no lines).
      source_index: index of its source in the config.
      prompt: for a plain text, the beginning that is its prompt; None if it has none, or if it was
        not determined (``text_prompts.with_prompts``).
      tools: the tools that may be called, as the JSON text of a list in OpenAI's form; None for
        none.
      every_turn: all assistant turns are in the loss, except those that are not ``learnt``.
    """

    messages: tuple[Message, ...]
    text: str | None
    origin: str
    source_index: int = 0
    prompt: str | None = None
    tools: str | None = None
    every_turn: bool = False

    @property
    def first_user_message(self) -> str:
        """The normalised key that decides the split; one question never gets into two splits.

        For a plain text it is the prompt, or the whole text if there is no prompt.
        """
        if self.text is not None:
            return normalise_text(self.text if self.prompt is None else self.prompt)
        return normalise_text(next(m.content for m in self.messages if m.role == "user"))

    @property
    def user_texts(self) -> tuple[str, ...]:
        """What the user says, unchanged; for a plain text its prompt and the whole text."""
        if self.text is not None:
            return (self.text,) if self.prompt is None else (self.prompt, self.text)
        return tuple(m.content for m in self.messages if m.role == "user")

    @property
    def without_answer(self) -> TextRow:
        """The row when it serves only as a prompt: a plain text is cut to its prompt."""
        if self.text is None or self.prompt is None:
            return self
        return replace(self, text=self.prompt, prompt=None)

    @property
    def has_answer(self) -> bool:
        """Whether the row ends with an answer. A plain text contains its own."""
        return self.text is not None or self.messages[-1].role == "assistant"


@dataclass(slots=True)
class Drops:
    """Dropped rows: the number for each reason, and the origins of the first few.

    Attributes:
      counts: reason -> rows.
      origins: reason -> origins of the first ``keep`` rows.
      keep: number of origins kept per reason.
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
        """Rows dropped, over all reasons."""
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


@dataclass(slots=True)
class Notes:
    """What a reader should know about the rows of a source, although nothing is dropped.

    Attributes:
      counts: note -> how often.
      examples: note -> origin of the first, and what it has there.
      most: different notes that are kept; further ones are counted as one.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    most: int = 1000

    def add(self, note: str, origin: str, example: str, count: int = 1) -> None:
        """Counts a note."""
        if note not in self.counts and len(self.counts) >= self.most:
            note = OTHER_NOTES
        self.counts[note] = self.counts.get(note, 0) + count
        self.examples.setdefault(note, (origin, example))

    def merge(self, other: Notes) -> None:
        """Adds another count to this one."""
        for note, count in other.counts.items():
            self.add(note, *other.examples[note], count)

    def as_json(self) -> dict[str, Any]:
        """``{note: {"count": n, "first": origin, "example": text}}``, for a manifest."""
        return {
            note: {"count": count, "first": first, "example": example}
            for note, count in self.counts.items()
            for first, example in (self.examples[note],)
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Notes:
        """The inverse of ``as_json``."""
        return cls(
            {note: entry["count"] for note, entry in value.items()},
            {note: (entry["first"], entry["example"]) for note, entry in value.items()},
        )


class RowProblem(Exception):  # noqa: N818  (a verdict on one row, caught where rows are counted)
    """Why one row is dropped. The reason is counted in ``Drops``, and reading continues."""


class UnreadableRow(dict[str, Any]):
    """A row that its file's reader could not take apart. It has no keys; it is dropped.

    Attributes:
      reason: why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
