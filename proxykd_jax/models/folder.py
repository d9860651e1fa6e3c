"""Finds the files of a model or tokenizer: a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from proxykd_jax.errors import UserError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# The files of a tokenizer; changes to other files of the model folder do not affect it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_name(name: str | Path) -> bool:
    """Whether a text has the form of a name on the hub: ``owner/model``, or ``model`` alone."""
    return _HUB_NAME.fullmatch(str(name)) is not None


def local_folder(name: str | Path, files: Iterable[str] = MODEL_FILES) -> Path:
    """The model's local folder. A hub name is downloaded, or found in the cache.

    Args:
      name: a local folder, or a name on the hub (``owner/model``; old ones have no owner).
      files: patterns of the files to fetch from a hub repository.

    Raises:
      UserError: there is no such folder, and the hub does not provide it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; a model or a tokenizer is named by its folder.")
    if not is_hub_name(name):
        raise UserError(f"{name}: there is no such folder, and it is not a hub name (owner/model).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:  # network, cache and access errors share no base class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} is not a local folder, and it cannot be had from the Hugging Face hub "
            f"({reason}). Give a folder, or check the name and the connection."
        ) from error
