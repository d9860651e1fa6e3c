"""Chat templates: the built-in ones, and Jinja text that runs in a sandbox with limits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.small_files import read_text
from proxykd_jax.texts.special_text import MARK_END, MARK_START
from proxykd_jax.texts.template_sandbox import Allowance, TemplateTooCostly, sandbox

# Llama 3.1's has 4 KB, gpt-oss's 16 KB. A longer one is an attack or a mistake.
_MOST_CHARACTERS = 100_000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")

_PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{{- message['content'] }}{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}
{%- endfor %}"""

_ALPACA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{%- else %}{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '\\n\\n### Instruction:\\n' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{{- '\\n\\n### Response:\\n' + message['content'] }}
{%- if not loop.last %}{{ eos_token }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""

_CHATML = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_LLAMA2 = """\
{%- set system = namespace(text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set system.text = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- bos_token + '[INST] ' + system.text + message['content'] + ' [/INST]' }}
{%- set system.text = '' %}
{%- else %}
{{- ' ' + message['content'] + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

BUILT_IN: Mapping[str, str] = {
    "plain": _PLAIN,
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "llama2": _LLAMA2,
}


def template_text(name: str, tokenizer_template: str | None) -> str | None:
    """The Jinja text that a config's ``template`` names; None if ``auto`` finds none.

    Raises:
      UserError: no such template, or it is too large.
    """
    if name == "auto":
        text = tokenizer_template
    elif name in BUILT_IN:
        text = BUILT_IN[name]
    else:
        try:
            text = read_text(Path(name), "Jinja file")
        except UserError as error:
            raise UserError(
                f"corpus.template: {name} is neither auto, {', '.join(BUILT_IN)} nor a Jinja "
                f"file that can be read. {error}"
            ) from error
    if text is not None and (found := _CONTROL.search(text)):
        raise UserError(
            f"corpus.template: {name} holds the control character U+{ord(found[0]):04X}, so it is "
            "no template."
        )
    if text is not None and len(text) > _MOST_CHARACTERS:
        raise UserError(
            f"corpus.template: {name} has {len(text)} characters; at most {_MOST_CHARACTERS} are "
            "taken for a chat template."
        )
    return text


class ChatTemplate:
    """A compiled template.

    Args:
      text: Jinja. ``{% generation %}`` ... ``{% endgeneration %}`` may mark the assistant's text.
      variables: texts of special tokens by name.

    Raises:
      UserError: the text is not valid Jinja.
    """

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        self.text = text
        self.variables = dict(variables)
        self._allowance = Allowance()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # Python's, about odd expressions
                self._compiled = sandbox(self._allowance).from_string(text)
        except Exception as error:  # Python refuses some of what Jinja accepts, as deep nesting
            reason = str(error) or type(error).__name__
            raise UserError(f"The chat template is not valid Jinja: {reason}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The rendered text; marks enclose each ``generation`` block.

        Raises:
          UserError: the template rejects the messages, or does something forbidden.
          TemplateTooCostly: it takes too much time or memory. This is the template's fault, so no
            row may be tried after it.
        """
        self._allowance.begin(messages, tools)
        try:
            # None and not undefined, as in Transformers: templates ask whether they are none.
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self.variables,
            )
        except TemplateTooCostly:
            raise
        except Exception as error:  # a template can raise any Python exception
            reason = str(error) or type(error).__name__
            raise UserError(f"the chat template fails: {reason}") from error


def split_marks(rendered: str) -> tuple[str, tuple[int, int] | None]:
    """Removes the marks from a rendered text.

    Returns:
      The text, and start and end of the last marked piece in it (None if nothing is marked).
    """
    text, spans = marked_pieces(rendered)
    return text, spans[-1] if spans else None


def marked_pieces(
    rendered: str, begin: str = MARK_START, end: str = MARK_END
) -> tuple[str, list[tuple[int, int]]]:
    """Removes the marks from a rendered text; returns it with start and end of each piece."""
    text, *pieces = rendered.split(begin)
    spans = []
    for piece in pieces:
        inside, _, after = piece.partition(end)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans
