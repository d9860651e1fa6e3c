"""Paragraphs and tables as Markdown, for files that are read as text."""

from __future__ import annotations

from collections.abc import Sequence

from proxykd_jax.reporting.blocks import Section, Table, Text


def markdown(section: Section) -> str:
    """Markdown of a section that consists of paragraphs and tables.

    Raises:
      TypeError: it contains another kind of block.
    """
    parts = [f"# {section.title}"]
    for block in section.blocks:
        if isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Table):
            parts += [_table(block), *([block.note] if block.note else [])]
        else:
            raise TypeError(f"{type(block).__name__} has no Markdown")
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    width = len(table.header)
    rule = ["---:" if table.numeric(column) else "---" for column in range(width)]
    lines = [_line(table.header), _line(rule)]
    for place, row in enumerate(table.rows):
        if place in table.groups:
            lines.append(_line([f"**{table.groups[place]}**", *[""] * (width - 1)]))
        lines.append(_line([table.shown(value) for value in row]))
    return f"**{table.title}**\n\n" + "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    # An unescaped final backslash or a bar would end a cell in the wrong place.
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
