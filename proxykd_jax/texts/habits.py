"""What a chat template does with tools, calls, results and thoughts, found by rendering probes.

Templates differ in what they read (``reasoning_content`` or the text itself), in the form in which
they want a call's arguments, and in what they leave out without a word. A probe is a conversation
of words that occur nowhere else; what is missing from its text is not written.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from proxykd_jax.errors import UserError
from proxykd_jax.texts.chat_template import ChatTemplate, split_marks
from proxykd_jax.texts.records import Message
from proxykd_jax.texts.thoughts import CLOSING, spelled_out, without_thoughts

Thinking = Literal["keep", "drop", "context"]
Render = Callable[..., str]

_OPEN = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"</think>\s*\Z")
_KEYS = ("reasoning_content", "thinking", "reasoning")
_TOOL, _CALLED, _GIVEN, _RESULT = "zqtool", "zqcalled", "zqgiven", "zqresult"
_THOUGHT, _ANSWER = "zqthought", "zqanswer"


class CallForm(NamedTuple):
    """The form in which a template takes calls.

    Attributes:
      as_text: arguments are JSON text, not objects.
      empty: the content of a call without a text.
    """

    as_text: bool = False
    empty: str | None = None


class Habits:
    """A template's habits, each found when it is first asked for.

    Args:
      template: the template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def _text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
        options.setdefault("add_generation_prompt", False)
        try:
            return split_marks(self._template.render(messages, **options))[0]
        except UserError:
            return None

    @functools.cached_property
    def writes_tools(self) -> bool:
        """Whether the list of tools reaches the model."""
        text = self._text([_ASKED], add_generation_prompt=True, tools=_TOOLS)
        return text is None or _TOOL in text

    @functools.cached_property
    def call_form(self) -> CallForm | None:
        """How calls are given; None if the template leaves them out or cannot write them."""
        for tools in (None, _TOOLS):
            for as_text in (False, True):
                for empty in (None, ""):
                    form = CallForm(as_text, empty)
                    text = self._text(self._called(form), tools=tools)
                    if text is not None and _CALLED in text and _GIVEN in text:
                        return form
        return None

    @functools.cached_property
    def writes_results(self) -> bool:
        """Whether results of tools reach the model."""
        form = self.call_form or CallForm()
        text = self._text([*self._called(form), *_RESULTS, {"role": "assistant", "content": "b"}])
        return text is None or _RESULT in text

    @staticmethod
    def _called(form: CallForm) -> list[dict[str, Any]]:
        call = {"id": "call00000", "name": _CALLED, "arguments": {"a": _GIVEN}}
        turn = {"role": "assistant", "content": form.empty, "tool_calls": [as_call(call, form)]}
        return [{"role": "user", "content": "a"}, turn]

    @functools.cached_property
    def thought_key(self) -> str | None:
        """The key of an assistant's turn from which the template writes a thought, or None."""
        for key in _KEYS:
            text = self._text([_ASKED, {"role": "assistant", "content": _ANSWER, key: _THOUGHT}])
            if text is not None and _THOUGHT in text and _ANSWER in text:
                return key
        return None

    @functools.cached_property
    def writes_spelled(self) -> bool:
        """Whether a thought within the text of an answer is written."""
        content = spelled_out(_THOUGHT, _ANSWER)
        text = self._text([_ASKED, {"role": "assistant", "content": content}])
        return text is not None and _THOUGHT in text

    @functools.cached_property
    def keeps_earlier(self) -> bool:
        """Whether the thoughts of earlier turns stay in the conversation."""
        key = self.thought_key
        extra = {} if key is None else {key: _THOUGHT}
        content = _ANSWER if key is not None else spelled_out(_THOUGHT, _ANSWER)
        earlier = {"role": "assistant", "content": content, **extra}
        last = {"role": "assistant", "content": "b"}
        text = self._text([_ASKED, earlier, {"role": "user", "content": "b"}, last])
        return text is not None and _THOUGHT in text

    @functools.cached_property
    def prefilled(self) -> str:
        """The tags at the end of the generation prompt: "", or those that it opens or closes."""
        text = self._text([_ASKED], add_generation_prompt=True) or ""
        return prefilled_in(text)

    def turn(
        self,
        message: Message,
        *,
        thinking: Thinking,
        hide: Callable[[str], str],
        spelled: bool,
    ) -> dict[str, Any]:
        """A message as the template is given it.

        Args:
          message: the message.
          thinking: what happens to its thought.
          hide: applied to every text.
          spelled: the thought stands in the text, although the template may have a key for it.
        """
        extras = message.extras
        turn: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
        if extras is None:
            return turn
        if message.role == "tool":
            named = {"name": extras.name, "tool_call_id": extras.call_id}
            return turn | {key: value for key, value in named.items() if value is not None}
        if extras.thought is not None and thinking != "drop":
            if self.thought_key is not None and not spelled:
                turn[self.thought_key] = hide(extras.thought)
            elif spelled or self.writes_spelled:
                turn["content"] = (
                    hide(extras.spelled)
                    if extras.spelled is not None
                    else spelled_out(hide(extras.thought), hide(message.content))
                )
        elif thinking == "drop":
            turn["content"] = hide(without_thoughts(message.content))
        if extras.calls is not None:
            form = self.call_form or CallForm()
            calls = [hidden(call, hide) for call in json.loads(extras.calls)]
            turn["tool_calls"] = [
                as_call({"id": call["id"], **call["function"]}, form) for call in calls
            ]
            turn["content"] = turn["content"] or form.empty
        return turn

    def about_thoughts(self, thinking: Thinking) -> str:
        """A sentence or two on what the template does with thoughts, for readers."""
        said = []
        if self.thought_key is not None:
            said.append(f"the template writes them from the key {self.thought_key}")
        elif self.writes_spelled:
            said.append("the template has no place for them; they stand in the answer's text")
        else:
            said.append("the template leaves them out; they are put behind the generation prompt")
        if self.thought_key is not None or self.writes_spelled:
            kept = "stay" if self.keeps_earlier else "are left out by the template"
            said.append(f"those of earlier turns {kept}")
        if self.prefilled:
            said.append(f"the generation prompt ends with {self.prefilled!r}")
        return f"corpus.thinking is {thinking}; {'; '.join(said)}"

    @property
    def has_thoughts(self) -> bool:
        """Whether the template does anything of its own with thoughts."""
        return bool(self.thought_key or self.prefilled or not self.writes_spelled)


_ASKED = {"role": "user", "content": "a"}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}}
_TOOLS = [
    {"type": "function", "function": {"name": _TOOL, "description": "a", "parameters": _SCHEMA}}
]
_RESULTS = ({"role": "tool", "name": _CALLED, "tool_call_id": "call00000", "content": _RESULT},)


def prefilled_in(prompt: str) -> str:
    """The tags of a thought at the end of a generation prompt, with the white space around them."""
    if _OPEN.search(prompt):
        return prompt[prompt.rindex("<think>") :]
    if _CLOSED.search(prompt):
        place = prompt.rindex(CLOSING)
        opening = prompt.rfind("<think>", 0, place)
        empty = opening >= 0 and not prompt[opening + len("<think>") : place].strip()
        return prompt[opening if empty else place :]
    return ""


def as_call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """A call of ``id``, ``name`` and ``arguments`` in OpenAI's form."""
    arguments = call["arguments"]
    if form.as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def hidden(value: Any, hide: Callable[[str], str]) -> Any:
    """A JSON value with a function applied to each of its texts."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, Mapping):
        return {hide(key): hidden(item, hide) for key, item in value.items()}
    return [hidden(item, hide) for item in value] if isinstance(value, list) else value
