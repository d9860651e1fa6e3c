"""Shapes of published chat templates, each with the text that it should give, built in Python.

``TEMPLATES`` are Jinja texts of our own in the shape of published ones. ``rendered`` builds the
same texts without a template, and says which stretches are the assistant's. It shares no code with
the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_CHATML_CALLS = """\
{%- if m.content %}{{ '\\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"""
_TOOL_BLOCK = """\
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"""
_SYSTEM_TOOLS = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{ '<|im_start|>system\\n' + first + '\\n# Tools\\n<tools>' }}
{%- for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif first %}{{ '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}{% endif %}"""

QWEN25 = (
    _SYSTEM_TOOLS
    + """
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"""
    + _CHATML_CALLS
    + """{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}"""
    + _TOOL_BLOCK
    + """{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

QWEN3 = (
    _SYSTEM_TOOLS
    + """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content if m.content is string else '' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for c in m.tool_calls or [] %}
{%- if not loop.first or content %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}"""
    + _TOOL_BLOCK
    + """{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

HERMES = """\
{%- if tools %}{{ '<|im_start|>system\\nYou call functions. <tools> ' }}
{%- for t in tools %}{{ (t | tojson) + ' ' }}{% endfor %}{{ '</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant\\n' + (m.content or '') }}
{%- for c in m.tool_calls %}{{ '<tool_call>\\n' + ({'name': c.function.name, 'arguments':
 c.function.arguments} | tojson) + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>tool\\n<tool_response>\\n' + m.content +
 '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA31 = """\
{{- bos_token }}
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: 26 Jul 2024\\n\\n' + (first | trim) +
 '<|eot_id|>' }}
{%- set ns = namespace(told=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
{%- if tools and not ns.told %}{% set ns.told = true %}
{%- for t in tools %}{{ (t | tojson(indent=4)) + '\\n\\n' }}{% endfor %}{% endif %}
{{- (m.content | trim) + '<|eot_id|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}
{%- else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' +
 (m.content | tojson) + '<|eot_id|>' }}{% endif %}{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools is not none and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}
{%- if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + (m.content | trim) + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + ({'content': m.content, 'call_id':
 m.tool_call_id} | tojson) + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' +
 (m.content | trim) + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

_DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>OPENING' }}{% endif %}"""
DEEPSEEK = _DEEPSEEK.replace("OPENING", "")
DEEPSEEK_OPEN = _DEEPSEEK.replace("OPENING", "<think>\\n")


@dataclass(frozen=True)
class Shape:
    """A template and what it can do.

    Attributes:
      template: Jinja.
      tools: ``many`` calls at once, ``one``, or None without tools.
      system: whether it takes a system message.
      beside: whether it writes a text beside a call.
      thoughts: ``last`` if it writes the last turn's thought, ``opened`` if its generation prompt
        opens one, ``behind`` if it leaves thoughts out, ``text`` if they stand in the text.
    """

    template: str
    tools: str | None = None
    system: bool = True
    beside: bool = True
    thoughts: str = "text"


SHAPES = {
    "qwen2.5": Shape(QWEN25, "many"),
    "qwen3": Shape(QWEN3, "many", thoughts="last"),
    "hermes": Shape(HERMES, "many"),
    "llama3.1": Shape(LLAMA31, "one", beside=False),
    "mistral3": Shape(MISTRAL, "many", system=False, beside=False),
    "gemma": Shape(GEMMA, system=False),
    "zephyr": Shape(ZEPHYR),
    "phi3": Shape(PHI3),
    "deepseek": Shape(DEEPSEEK, thoughts="behind"),
    "deepseek_open": Shape(DEEPSEEK_OPEN, thoughts="opened"),
}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|User|>", "<|Assistant|>"),
]


def dumps(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def rendered(name: str, turns: list[dict], tools: list | None) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces (text, in the loss), up to the last answer's end.

    Args:
      name: of the shape.
      turns: ``role`` and ``content``; of an assistant ``thought``, ``calls`` of (name, arguments,
        id) and ``learnt``; of a result ``id``.
      tools: in OpenAI's form.
    """
    return _Built(name, turns, tools).pieces


class _Built:
    def __init__(self, name: str, turns: list[dict], tools: list | None) -> None:
        self.pieces: list[tuple[str, bool]] = []
        self.turns, self.tools = turns, tools
        self.system = turns[0]["content"] if turns[0]["role"] == "system" else ""
        self.last_user = max(n for n, turn in enumerate(turns) if turn["role"] == "user")
        family = {"qwen2.5": self.qwen, "qwen3": self.qwen, "hermes": self.hermes}
        family |= {"llama3.1": self.llama, "mistral3": self.mistral, "gemma": self.gemma}
        family |= {"zephyr": self.bars, "phi3": self.bars}
        family |= {"deepseek": self.deepseek, "deepseek_open": self.deepseek}
        self.name = name
        family[name]()

    def say(self, text: str, learnt: bool = False) -> None:
        self.pieces.append((text, learnt))

    def is_last(self, n: int) -> bool:
        return n == len(self.turns) - 1

    def qwen(self) -> None:
        if self.tools:
            listed = "".join("\n" + dumps(tool) for tool in self.tools)
            self.say(f"<|im_start|>system\n{self.system}\n# Tools\n<tools>{listed}\n</tools>")
            self.say("<|im_end|>\n")
        elif self.system:
            self.say(f"<|im_start|>system\n{self.system}<|im_end|>\n")
        for n, turn in enumerate(self.turns):
            role, content = turn["role"], turn["content"]
            if role == "user":
                self.say(f"<|im_start|>user\n{content}<|im_end|>\n")
            elif role == "tool":
                if self.turns[n - 1]["role"] != "tool":
                    self.say("<|im_start|>user")
                self.say(f"\n<tool_response>\n{content}\n</tool_response>")
                if self.turns[n + 1]["role"] != "tool":
                    self.say("<|im_end|>\n")
            elif role == "assistant":
                calls = [
                    f'<tool_call>\n{{"name": "{c[0]}", "arguments": {dumps(c[1])}}}\n</tool_call>'
                    for c in turn["calls"]
                ]
                learnt = turn["learnt"]
                thought = turn.get("thought")
                if self.name == "qwen3":
                    seen = n > self.last_user and (self.is_last(n) or thought)
                    if seen:
                        content = f"<think>\n{thought or ''}\n</think>\n\n{content}"
                    elif thought and not self.is_last(n):
                        learnt = False
                    joined = "\n".join([turn["content"], *calls] if turn["content"] else calls)
                    body = content[: len(content) - len(turn["content"])] + joined
                else:
                    if thought:
                        content = f"<think>\n{thought}\n</think>\n\n{content}"
                    # The generation prompt ends with the line break before a call.
                    body = "\n".join([content, *calls] if content else calls)
                self.say("<|im_start|>assistant\n")
                self.say(f"{body}<|im_end|>", learnt)
                self.say("\n")

    def hermes(self) -> None:
        if self.tools:
            listed = "".join(dumps(tool) + " " for tool in self.tools)
            self.say(
                f"<|im_start|>system\nYou call functions. <tools> {listed}</tools><|im_end|>\n"
            )
        for turn in self.turns:
            role, content = turn["role"], turn["content"]
            if role == "tool":
                content = f"<tool_response>\n{content}\n</tool_response>"
            if role != "assistant":
                self.say(f"<|im_start|>{role}\n{content}<|im_end|>\n")
                continue
            if turn.get("thought"):
                content = f"<think>\n{turn['thought']}\n</think>\n\n{content}"
            for called, arguments, _ in turn["calls"]:
                inside = dumps({"name": called, "arguments": arguments})
                content += f"<tool_call>\n{inside}\n</tool_call>"
            self.say("<|im_start|>assistant\n")
            self.say(f"{content}<|im_end|>", turn["learnt"])
            self.say("\n")

    def llama(self) -> None:
        begin, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
        self.say(f"<s>{begin}system{end}Date: 26 Jul 2024\n\n{self.system.strip()}<|eot_id|>")
        told = False
        for turn in self.turns:
            role, content = turn["role"], turn["content"].strip()
            if role == "user":
                listed = "".join(dumps(tool, indent=4) + "\n\n" for tool in self.tools or ())
                self.say(f"{begin}user{end}{'' if told else listed}{content}<|eot_id|>")
                told = True
            elif role == "tool":
                self.say(f"{begin}ipython{end}{dumps(turn['content'])}<|eot_id|>")
            elif role == "assistant":
                if turn.get("thought"):
                    content = f"<think>\n{turn['thought']}\n</think>\n\n{content}"
                for called, arguments, _ in turn["calls"]:
                    content = f'{{"name": "{called}", "parameters": {dumps(arguments)}}}'
                self.say(f"{begin}assistant{end}")
                self.say(f"{content}<|eot_id|>", turn["learnt"])

    def mistral(self) -> None:
        self.say("<s>")
        for n, turn in enumerate(self.turns):
            role, content = turn["role"], turn["content"]
            if role == "user":
                if self.tools and n == self.last_user:
                    self.say(f"[AVAILABLE_TOOLS]{dumps(self.tools)}[/AVAILABLE_TOOLS]")
                self.say(f"[INST]{content}[/INST]")
            elif role == "tool":
                inside = dumps({"content": content, "call_id": turn["id"]})
                self.say(f"[TOOL_RESULTS]{inside}[/TOOL_RESULTS]")
            else:
                if turn.get("thought"):
                    content = f"<think>\n{turn['thought']}\n</think>\n\n{content}"
                body = " " + content.strip()
                if turn["calls"]:
                    listed = [{"name": c[0], "arguments": c[1], "id": c[2]} for c in turn["calls"]]
                    body = f"[TOOL_CALLS]{dumps(listed)}"
                self.say(f"{body}</s>", turn["learnt"])

    def gemma(self) -> None:
        self.say("<s>")
        for turn in self.turns:
            if turn["role"] == "assistant":
                content = turn["content"].strip()
                if turn.get("thought"):
                    content = f"<think>\n{turn['thought']}\n</think>\n\n{content}"
                self.say("<start_of_turn>model\n")
                self.say(f"{content}<end_of_turn>", turn["learnt"])
                self.say("\n")
            else:
                self.say(f"<start_of_turn>user\n{turn['content'].strip()}<end_of_turn>\n")

    def bars(self) -> None:
        end = "</s>" if self.name == "zephyr" else "<|end|>"
        for turn in self.turns:
            role, content = turn["role"], turn["content"]
            if role == "assistant" and turn.get("thought"):
                content = f"<think>\n{turn['thought']}\n</think>\n\n{content}"
            self.say(f"<|{role}|>\n")
            self.say(f"{content}{end}", role == "assistant" and turn["learnt"])
            self.say("\n")

    def deepseek(self) -> None:
        self.say("<s>" + self.system)
        opened = self.name == "deepseek_open"
        for n, turn in enumerate(self.turns):
            if turn["role"] == "user":
                self.say(f"<|User|>{turn['content']}")
            elif turn["role"] == "assistant":
                thought, learnt = turn.get("thought"), turn["learnt"]
                self.say("<|Assistant|>")
                if self.is_last(n):
                    if opened:
                        self.say("<think>\n")
                    if thought:
                        self.say("" if opened else "<think>\n", True)
                        self.say(f"{thought}\n</think>\n\n", True)
                elif thought or opened:
                    learnt = False  # sampling would meet a thought first
                self.say(f"{turn['content']}</s>", learnt)
