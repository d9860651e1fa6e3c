"""The files of an exported folder that say how its model is asked and where its answers end.

They are the tokenizer's own files, byte for byte, unless the run was trained with another template
or another end token. Then transformers, vLLM and llama.cpp would ask the model in a way that it
never saw, or would not stop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import read_json
from proxykd_jax.texts.template import Renderer

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"


def changed_files(renderer: Renderer, end_token_ids: Sequence[int], folder: Path) -> dict[str, str]:
    """Contents of the files that must differ from those of the tokenizer's folder.

    Args:
      renderer: of the corpus that the model was trained on.
      end_token_ids: tokens that end an answer, the appended one first.
      folder: the tokenizer's.

    Returns:
      File name -> text; empty where the folder says everything right.
    """
    tokenizer, files = renderer.tokenizer, {}
    end = tokenizer.backend.id_to_token(end_token_ids[0])
    other_end = end != tokenizer.special_texts.get("eos_token")
    template = renderer.template_text
    if template is not None:
        said = _with_variables(renderer, end)
        if said != tokenizer.chat_template:
            files[TEMPLATE_FILE] = said
    for name in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS):
        if (folder / name).is_file():
            record = read_json(folder / name)
            new = dict(record)
            if other_end and (name == _TOKENIZER_CONFIG or "eos_token" in record):
                new["eos_token"] = end
            if TEMPLATE_FILE in files:
                new.pop("chat_template", None)  # it would stand beside the file's
            if new != record:
                files[name] = _text(new)
    if (folder / _GENERATION_CONFIG).is_file():
        record = read_json(folder / _GENERATION_CONFIG)
        if set(_as_list(record.get("eos_token_id"))) != set(end_token_ids):
            ids = list(end_token_ids)
            eos = ids[0] if len(ids) == 1 else ids
            files[_GENERATION_CONFIG] = _text({**record, "eos_token_id": eos})
    return files


def _with_variables(renderer: Renderer, end: str) -> str:
    """The template, with the texts of ``bos_token`` and ``eos_token`` that it was trained with."""
    template, special = renderer.template_text or "", renderer.tokenizer.special_texts
    trained = renderer.template_variables
    theirs = {**special, "eos_token": end}
    given = "".join(
        f"{{%- set {name} = {json.dumps(trained[name], ensure_ascii=False)} %}}"
        for name in ("bos_token", "eos_token")
        if name in template and trained[name] != theirs.get(name, "")
    )
    # A line break right behind a block is not rendered.
    return given + ("{{ '' }}" if given and template.startswith("\n") else "") + template


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
