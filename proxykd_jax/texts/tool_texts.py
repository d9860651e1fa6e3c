"""Tools and calls as files hold them, brought into the one form that chat templates read.

That form is OpenAI's: a list of ``{"type": "function", "function": {...}}``, and calls of ``{"id",
"type", "function": {"name", "arguments"}}`` whose arguments are an object. Both are kept as JSON
text. Read are OpenAI's lists and their JSON text, the older ``functions`` and ``function_call``,
Anthropic's ``input`` and ``input_schema``, and the text of Hermes, with ``<tools>``,
``<tool_call>`` and ``<tool_response>``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from proxykd_jax.texts.records import RowProblem

NO_TOOL_LIST = "a list of tools that cannot be read"
NO_CALL = "a tool call that cannot be read"
NO_ARGUMENTS = "a tool call whose arguments are not a JSON object"
CALL_TAG, RESULT_TAG, TOOLS_TAG = "<tool_call>", "<tool_response>", "<tools>"

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*(?:</tool_response>|\Z)", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
# Sentences about tools around the list: the template has its own.
_ABOUT_TOOLS = re.compile(
    r"</?(?:tools?|tool_call|tool_response|scratch_pad)>|\btools?\b|\bfunctions?\b|"
    r"function[- _]?(?:call|name)|pydantic",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^\n.!?]*(?:[.!?](?!\s|$)[^\n.!?]*)*[.!?]*[ \t]*\n*")
_NOTHING = ("", "null", "none")


def tools_json(value: Any) -> str | None:
    """The JSON text of a list of tools; None for an empty one.

    Raises:
      RowProblem: it is no list of tools.
    """
    tools = _listed(value, NO_TOOL_LIST)
    return _json([_tool(loaded(tool)) for tool in tools]) if tools else None


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        raise RowProblem(NO_TOOL_LIST)
    tool = _without_nulls(tool)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowProblem(NO_TOOL_LIST)
    if function is not tool:
        return tool if "type" in tool else {"type": "function", **tool}
    function = {key: value for key, value in tool.items() if key != "type"}
    if "input_schema" in function:
        function["parameters"] = function.pop("input_schema")
    return {"type": "function", "function": function}


def calls_json(value: Any) -> str | None:
    """The JSON text of a list of calls, in any of the forms; None for an empty one.

    Raises:
      RowProblem: a call cannot be read.
    """
    calls = _listed(value, NO_CALL)
    return _json([_call(loaded(call)) for call in calls]) if calls else None


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RowProblem(NO_CALL)
    function = call.get("function")
    if not isinstance(function, Mapping):
        function = call
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowProblem(NO_CALL)
    keys = ("arguments", "parameters", "input", "args")
    given = next((function[key] for key in keys if function.get(key) is not None), None)
    arguments = loaded(given)
    if arguments is None:
        if isinstance(given, str) and given.strip().lower() not in _NOTHING:
            raise RowProblem(NO_ARGUMENTS)
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowProblem(NO_ARGUMENTS)
    identity = call.get("id") or call.get("call_id")
    return {
        **({"id": identity} if isinstance(identity, str) else {}),
        "type": "function",
        "function": {"name": name, "arguments": dict(arguments)},
    }


def calls_in_text(text: str, *, expected: bool) -> tuple[str, str] | None:
    """The text around Hermes' calls, and the calls as JSON text; None if there are none.

    Args:
      text: an assistant's turn.
      expected: the conversation has tools. Otherwise tags around anything but calls are letters.

    Raises:
      RowProblem: a call is expected and cannot be read.
    """
    inside = _CALL.findall(text)
    if not inside:
        return None
    calls: list[Any] = []
    for piece in inside:
        found = loaded(piece)
        calls += found if isinstance(found, list) else [found]
    try:
        read = _json([_call(call) for call in calls])
    except RowProblem:
        if expected:
            raise
        return None
    return _CALL.sub("", text).strip(), read


def results_in_text(text: str) -> list[str] | None:
    """The results in a text that holds nothing else; None if it does."""
    if RESULT_TAG not in text or _RESULT.sub("", text).strip():
        return None
    return _RESULT.findall(text)


def tools_in_text(text: str) -> tuple[str, str] | None:
    """A system text without its list of tools and what it says about them, and the list.

    Returns None if it holds no list. The sentences about tools around the list are left out,
    because the template writes its own.
    """
    for block in _TOOLS.finditer(text):
        try:
            tools = tools_json(_lines(block[1]))
        except RowProblem:
            continue
        if tools is not None:
            before, after = text[: block.start()], text[block.end() :]
            _, example, after = after.rpartition("</tool_call>")
            if example and not after.startswith("\n"):
                after = after[len(_SENTENCE.findall(after)[0]) :]  # the rest of its sentence
            return f"{_not_about_tools(before)}\n{_not_about_tools(after)}".strip(), tools
    return None


def _not_about_tools(text: str) -> str:
    sentences = (sentence for sentence in _SENTENCE.findall(text) if sentence)
    return "".join(s for s in sentences if not _ABOUT_TOOLS.search(s)).strip()


def _lines(text: str) -> Any:
    """A list, or one tool on each line."""
    whole = loaded(text)
    if whole is not None:
        return whole
    return [loaded(line) for line in text.splitlines() if line.strip()]


def _listed(value: Any, problem: str) -> list[Any]:
    """A value as a list of objects; nothing at all is an empty one."""
    found = loaded(value)
    if isinstance(found, Mapping):
        return [found]
    if isinstance(found, list):
        return found
    if found is None and (value is None or value.strip().lower() in _NOTHING):
        return []
    raise RowProblem(problem)


def loaded(value: Any) -> Any:
    """What a JSON text says, or a Python literal; other values as they are, None if neither."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in _NOTHING:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, Mapping | list) else None
    return None


def _without_nulls(value: Any) -> Any:
    """A description without its nulls: columns of Parquet add the keys of all other tools."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem("half of a surrogate pair in the text") from error
    return text
