"""Writes docs/configuration.md from the schema: ``python -m docs.make_configuration``.

A test fails where the page is not what this prints.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from proxykd_jax.config import Config
from proxykd_jax.config.keys import config_keys
from proxykd_jax.config.load import _section_classes

PAGE = Path(__file__).with_name("configuration.md")

_HEAD = """\
# Keys of the config file

One YAML file describes a whole run; `configs/` holds examples. This page is made from the schema
by `python -m docs.make_configuration`; `proxykd run --help all` prints the same, and `proxykd align
--help all` the keys of one stage.

- An unknown key, a repeated key, a wrong type and a value out of range are errors, all reported at
  once, each with the place and a suggestion.
- `--set section.key=value` changes one key from the command line (an entry of a list by its number:
  `--set corpus.sources.0.limit=100`).
- In a `path`, `$NAME` and `${NAME}` stand for environment variables, and a leading `~` for a home
  folder. Keys that take a folder or a name on the hub have this type, too.
- `1e-5` is a number; YAML aliases and tags are refused. YAML's octal and sexagesimal numbers
  (`010`, `1:30`) are texts. A config has at most 256 KiB.
- Where two defaults stand, the preset decides. `preset` itself has no default."""


def page() -> str:
    """The whole page."""
    tables: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in config_keys():
        section = row[0].split(".")[0].removesuffix("[]") if "." in row[0] else ""
        tables.setdefault(section, []).append(row)
    parts = [_HEAD]
    for section, rows in tables.items():
        parts.append(f"\n## {section or 'The run'}\n")
        parts += [f"{_about(section)}\n"] if section else []
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        parts += ["| " + " | ".join(_cell(text) for text in _shown(row)) + " |" for row in rows]
    return "\n".join(parts) + "\n"


def _about(section: str) -> str:
    classes = list(_section_classes(Config.model_fields[section].annotation))
    if len(classes) == 1:
        return _first_line(classes[0])
    about = [f"- `{c.model_fields['name'].default}`: {_first_line(c)}" for c in classes]
    return "\n".join(["One of:", "", *about])


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _shown(row: tuple[str, str, str, str]) -> tuple[str, str, str, str]:
    key, kind, default, meaning = row
    return f"`{key}`", kind, default or "(required)", meaning


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
