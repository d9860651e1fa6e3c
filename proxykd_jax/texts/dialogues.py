"""Renders conversations with tools or thoughts, and rows in which several turns are in the loss.

The prompt is the generation prompt of the last answer, as in every row. What is new is found by
characters too:

- A thought is put where generation would write it. The template's own place is tried first, then
  the answer's text. If the template leaves thoughts out, the thought is put behind the generation
  prompt.
- An earlier turn begins where its own generation prompt ends: the text between it and the message
  before must be the same in both. It ends behind its end token. A turn that sampling would begin in
  another way, or whose thought the template leaves out, is context only.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from proxykd_jax.errors import UserError
from proxykd_jax.texts.chat_template import ChatTemplate, marked_pieces
from proxykd_jax.texts.conversations import made_id
from proxykd_jax.texts.habits import Habits, Thinking, hidden, prefilled_in
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.special_text import TURN_END, TURN_START
from proxykd_jax.texts.thoughts import OPENING, answer_start, spelled_out, without_thoughts

NO_TOOLS = (
    "the template does not write the list of tools: give corpus.template a template that does"
)
NO_CALLS = "the template does not write tool calls: give corpus.template a template that does"
NO_RESULTS = (
    "the template does not write the results of tools: give corpus.template a template that does"
)
NO_TEXT_BESIDE_CALL = "the template leaves out the text beside a tool call"
CLOSED_THOUGHT = (
    "the template's generation prompt closes the thought before it begins, so no thought can be "
    "learnt: set corpus.thinking: drop, or give corpus.template a template that thinks"
)
NO_THOUGHT = "the thought cannot be found behind the template's generation prompt"
BEGINS_OTHERWISE = (
    "an earlier turn is not in the loss, because the template does not write it behind the prompt "
    "from which it would be sampled; turns: each learns it"
)
LEFT_OUT = (
    "an earlier turn is not in the loss, because the template leaves out its thought; turns: each "
    "learns it"
)
DROPPED = "a thought is left off (corpus.thinking: drop)"
PUT_IN_THE_TEXT = (
    "a thought is put into the answer's text between <think> and </think>, because the template "
    "has no place for it"
)
PUT_BEHIND = "a thought is put behind the generation prompt, because the template leaves it out"
BESIDE_LEFT_OUT = (
    "an earlier turn is not in the loss, because the template leaves out the text beside its tool "
    "call"
)
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


class Dialogue(NamedTuple):
    """A rendered conversation.

    Attributes:
      whole: the text up to the answer's end, and perhaps more.
      prompt: the text before the last answer; None if there is none, and ``whole`` is the prompt.
      spans: where the earlier turns that are in the loss begin and end in the text.
      notes: what a reader should know.
    """

    whole: str
    prompt: str | None
    spans: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Renders rows with one template.

    Attributes:
      template: the template.
      habits: its habits.
      thinking: what happens to thoughts.
      hide, reveal: of the tokenizer's ``SpecialText``.
      ends: the texts of the end tokens after ``reveal``.
      has_marks: the template marks the assistant's text with ``{% generation %}``.
    """

    template: ChatTemplate
    habits: Habits
    thinking: Thinking
    hide: Callable[[str], str]
    reveal: Callable[[str], str]
    ends: tuple[str, ...]
    has_marks: bool

    def render(self, row: TextRow) -> Dialogue:
        """The text of a row, in which control tokens have their private names.

        Raises:
          UserError: the template rejects the row or leaves out a part of it.
        """
        try:
            return _Rendering(self, row).result()
        except UserError:
            renumbered = _with_made_ids(row)
            if renumbered is None or self.habits.call_form is None:
                raise
            # Mistral's templates reject other ids than theirs.
            try:
                return _Rendering(self, renumbered).result()
            except UserError:
                pass
            raise


class _Rendering:
    """The steps for one row."""

    def __init__(self, tools: Dialogues, row: TextRow) -> None:
        self._own, self._row = tools, row
        self._thinking = tools.thinking
        self._tools = None if row.tools is None else hidden(json.loads(row.tools), tools.hide)
        has_answer = row.messages[-1].role == "assistant"
        self._answer = row.messages[-1] if has_answer else None
        self._notes: list[str] = []
        self._asked = row.messages[:-1] if has_answer else row.messages
        self._given = [self._turn(message) for message in self._asked]

    def result(self) -> Dialogue:
        self._check_habits()
        prompt, _ = self._text(self._given, True)
        self._check_said(prompt)
        if self._answer is None:
            return Dialogue(prompt, None)
        whole, start, pieces = self._whole(prompt)
        self._check_answer(whole[start:])
        spans: list[tuple[int, int]] = []
        if self._row.every_turn:
            found = (
                self._marked_turns(whole, pieces) if self._own.has_marks else self._turns(prompt)
            )
            for span, note in found:
                spans += [] if span is None else [span]
                self._notes += [] if note is None else [note]
        return Dialogue(whole, whole[:start], tuple(spans), tuple(self._notes))

    # --- the prompt -------------------------------------------------------------------------------

    def _turn(self, message: Message, *, spelled: bool = False) -> dict[str, Any]:
        return self._own.habits.turn(
            message, thinking=self._thinking, hide=self._own.hide, spelled=spelled
        )

    def _text(
        self, messages: Sequence[dict[str, Any]], asks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        rendered = self._own.template.render(
            messages, add_generation_prompt=asks, tools=self._tools
        )
        return marked_pieces(self._own.reveal(rendered))

    def _check_habits(self) -> None:
        habits, messages = self._own.habits, self._row.messages
        if self._row.tools is not None and not habits.writes_tools:
            raise UserError(NO_TOOLS)
        if any(message.calls is not None for message in messages) and habits.call_form is None:
            raise UserError(NO_CALLS)
        if any(message.role == "tool" for message in messages) and not habits.writes_results:
            raise UserError(NO_RESULTS)

    def _check_said(self, prompt: str) -> None:
        for tool in json.loads(self._row.tools) if self._row.tools is not None else ():
            if tool.get("function", tool).get("name", "") not in prompt:
                raise UserError(NO_TOOLS)
        for message in self._asked:
            if message.role != "assistant" and not is_written(message.content, prompt):
                if message.role != "tool":
                    raise UserError(
                        f"the template does not write the {message.role}'s text as it stands"
                    )
                escaped = json.dumps(message.content, ensure_ascii=False)[1:-1]
                if not is_written(escaped, prompt) and not _is_json(message.content):
                    raise UserError(NO_RESULTS)

    # --- the answer -------------------------------------------------------------------------------

    def _whole(self, prompt: str) -> tuple[str, int, list[tuple[int, int]]]:
        """The whole text, where its answer begins, and the marked pieces."""
        answer = self._answer
        assert answer is not None
        prefilled = prefilled_in(prompt)
        opens = bool(prefilled) and prefilled.strip() == OPENING
        thought = answer.thought
        if thought is not None and self._thinking == "drop":
            self._notes += [DROPPED] if thought else []
            thought = None
        if thought is not None and prefilled and not opens:
            if thought:
                raise UserError(CLOSED_THOUGHT)
            thought = None
        if thought is None:
            whole, pieces = self._text([*self._given, self._without_thought(answer)], False)
            if self._own.has_marks and pieces:
                return self._cut(whole, pieces), pieces[-1][0], pieces
            if not whole.startswith(prompt):
                raise UserError(_not_behind(prompt, whole, prefilled))
            return whole, len(prompt), pieces
        bare, _ = self._text([*self._given, self._without_thought(answer)], False)
        for spelled in (False, True):
            turn = self._turn(answer, spelled=spelled)
            whole, pieces = self._text([*self._given, turn], False)
            if thought and whole == bare:
                continue  # it is left out
            begin = pieces[-1][0] if self._own.has_marks and pieces else len(prompt)
            start = _answer_start(whole, begin, answer)
            if start is not None and (pieces or whole.startswith(prompt)):
                whole = self._cut(whole, pieces)
                in_text = self._own.habits.thought_key is None or spelled
                if in_text and answer.extras is not None and answer.extras.spelled is None:
                    self._notes.append(PUT_IN_THE_TEXT)
                return whole, start if self._thinking == "context" else begin, pieces
        whole = self._built(prompt, bare, prefilled if opens else "", thought)
        start = _answer_start(whole, len(prompt), answer)
        if start is None:
            raise UserError(NO_THOUGHT)
        self._notes.append(PUT_BEHIND)
        return whole, start if self._thinking == "context" else len(prompt), []

    def _cut(self, whole: str, pieces: list[tuple[int, int]]) -> str:
        """The text up to the end of the last marked piece, and of an end token behind it."""
        if not pieces:
            return whole
        end = pieces[-1][1]
        return whole[: end + len(self._end_behind(whole, end))]

    def _end_behind(self, whole: str, end: int) -> str:
        return next((text for text in self._own.ends if text and whole.startswith(text, end)), "")

    def _without_thought(self, message: Message) -> dict[str, Any]:
        if message.extras is not None and message.extras.thought is not None:
            extras = dataclasses.replace(message.extras, thought=None, spelled=None)
            message = dataclasses.replace(message, extras=extras)
        return self._turn(message)

    def _built(self, prompt: str, bare: str, prefilled: str, thought: str) -> str:
        """The prompt, the thought, and what the template writes of the answer without it."""
        header = prompt[: len(prompt) - len(prefilled)]
        if not bare.startswith(header):
            raise UserError(NO_THOUGHT)
        answer = bare[len(header) :]
        empty = _EMPTY_THOUGHT.match(answer)
        if empty is not None:
            answer = answer[empty.end() :]
        between = "" if not prefilled or prefilled.endswith("\n") else "\n"
        return prompt + between + spelled_out(thought, answer, opened=bool(prefilled))

    def _check_answer(self, said: str) -> None:
        answer = self._answer
        assert answer is not None
        content = self._said(answer)
        names = [call["function"]["name"] for call in json.loads(answer.calls or "[]")]
        if any(name not in said for name in names):
            raise UserError(NO_CALLS)
        if not is_written(content, said):
            raise UserError(
                NO_TEXT_BESIDE_CALL
                if names
                else "the template does not write the assistant's text as it stands"
            )

    def _said(self, message: Message) -> str:
        """The text of an assistant's turn that the template is given."""
        drops = self._thinking == "drop" and message.extras is not None
        return without_thoughts(message.content) if drops else message.content

    # --- earlier turns ----------------------------------------------------------------------------

    def _turns(self, prompt: str) -> Iterator[tuple[tuple[int, int] | None, str | None]]:
        """Where each earlier turn to learn stands in the prompt, or why it does not."""
        places = self._places(prompt)
        for number, message in enumerate(self._asked):
            if message.role != "assistant" or not message.learnt:
                continue
            begin = None if places is None else self._begin(prompt, number, places[number - 1][1])
            if places is None or begin is None:
                yield None, BEGINS_OTHERWISE
                continue
            following = places[number + 1][0] if number + 1 < len(places) else len(prompt)
            found = [(prompt.find(end, begin), len(end)) for end in self._own.ends if end]
            ends = [(place, size) for place, size in found if 0 <= place < following]
            if ends:
                end = sum(min(ends))
            elif places[number][1] > begin:
                end = places[number][1]
            else:
                yield None, BEGINS_OTHERWISE
                continue
            if message.thought and self._thinking != "drop":
                bare = [*self._given]
                bare[number] = self._without_thought(message)
                start = _answer_start(prompt[:end], begin, message)
                if start is None or self._text(bare, True)[0] == prompt:
                    yield None, LEFT_OUT
                    continue
                begin = start if self._thinking == "context" else begin
            if message.calls and not is_written(self._said(message), prompt[begin:end]):
                yield None, BESIDE_LEFT_OUT
                continue
            yield (begin, end), None

    def _places(self, prompt: str) -> list[tuple[int, int]] | None:
        """Where the text of each message begins and ends in the prompt; None if unknown.

        An assistant's turn without a text has (0, 0).
        """
        for with_answers in (True, False):
            marked = [
                with_marks(turn)
                if isinstance(turn["content"], str)
                and turn["content"].strip()
                and (turn["role"] != "assistant" or (with_answers and message.extras is None))
                else turn
                for turn, message in zip(self._given, self._asked, strict=True)
            ]
            try:
                text, _ = self._text(marked, True)
            except UserError:
                continue
            bare, places = marked_pieces(text, TURN_START, TURN_END)
            wanted = [turn is not given for turn, given in zip(marked, self._given, strict=True)]
            if bare == prompt and len(places) == sum(wanted):
                found = iter(places)
                return [next(found) if is_marked else (0, 0) for is_marked in wanted]
        return None

    def _begin(self, prompt: str, number: int, after: int) -> int | None:
        """Where a turn's generation prompt ends in the row's text; None if it differs there.

        Args:
          prompt: the row's text.
          number: of the turn.
          after: where the message before it ends.
        """
        *before, last = self._given[:number]
        if not (isinstance(last["content"], str) and last["content"].strip()):
            asked, _ = self._text([*before, last], True)
            return len(asked) if prompt.startswith(asked) else None
        text, _ = self._text([*before, with_marks(last)], True)
        bare, places = marked_pieces(text, TURN_START, TURN_END)
        between = bare[places[-1][1] :] if places else ""
        return after + len(between) if places and prompt.startswith(between, after) else None

    def _marked_turns(
        self, whole: str, pieces: list[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int] | None, str | None]]:
        """Where the template marks the earlier turns to learn."""
        answers = [message for message in self._row.messages if message.role == "assistant"]
        for place, message in enumerate(answers[:-1]):
            if not message.learnt:
                continue
            if len(pieces) != len(answers):
                yield None, BEGINS_OTHERWISE
                continue
            begin, end = pieces[place]
            thought = None if self._thinking == "drop" else message.thought
            if thought:
                start = _answer_start(whole[:end], begin, message)
                if start is None:
                    yield None, LEFT_OUT
                    continue
                begin = start if self._thinking == "context" else begin
            yield (begin, end + len(self._end_behind(whole, end))), None


def _answer_start(text: str, begin: int, message: Message) -> int | None:
    """``answer_start`` of a turn."""
    calls = json.loads(message.calls or "[]")
    called = calls[0]["function"]["name"] if calls else ""
    return answer_start(text, begin, message.thought or "", message.content, called)


def is_written(text: str, rendered: str) -> bool:
    """Whether a template writes a text; it may trim it and change its white space."""
    said = text.strip()
    return said in rendered or "".join(said.split()) in "".join(rendered.split())


def with_marks(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose text, but not the white space around it, stands between two marks."""
    text = turn["content"]
    bare = text.strip()
    begin = text.index(bare)
    content = f"{text[:begin]}{TURN_START}{bare}{TURN_END}{text[begin + len(bare) :]}"
    return {**turn, "content": content}


def _is_json(text: str) -> bool:
    """Whether a template may have parsed a result and written it in another form."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _with_made_ids(row: TextRow) -> TextRow | None:
    """The row with ids of our own in its calls and results; None if it has no calls."""
    names: dict[str, str] = {}
    messages = []
    for message in row.messages:
        extras = message.extras
        if extras is not None and extras.calls is not None:
            calls = json.loads(extras.calls)
            for call in calls:
                call["id"] = names.setdefault(call["id"], made_id(len(names)))
            extras = dataclasses.replace(extras, calls=json.dumps(calls, ensure_ascii=False))
        elif extras is not None and extras.call_id is not None:
            made = names.setdefault(extras.call_id, made_id(len(names)))
            extras = dataclasses.replace(extras, call_id=made)
        messages.append(dataclasses.replace(message, extras=extras))
    return dataclasses.replace(row, messages=tuple(messages)) if names else None


def _not_behind(prompt: str, whole: str, prefilled: str) -> str:
    if prefilled and whole.startswith(prompt[: len(prompt) - len(prefilled)]):
        return (
            f"the template's generation prompt ends with {prefilled!r}, which it does not write "
            "before the answer of a whole conversation"
        )
    return (
        "the answer cannot be found, because the rendered prompt is not the beginning of the "
        "rendered conversation"
    )
