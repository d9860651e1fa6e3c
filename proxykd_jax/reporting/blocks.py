"""Building blocks of a page. Section builders return them; ``page.html`` renders them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxykd_jax.reporting.verdict import Finding

Value = str | int | float | None


@dataclass(frozen=True)
class Text:
    """A paragraph; ``missing`` marks one that says what the run does not have."""

    text: str
    missing: bool = False


@dataclass(frozen=True)
class Code:
    """Preformatted text in a box that scrolls."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a header row.

    Attributes:
      title: its caption.
      header: one name per column.
      rows: values; numbers are rounded on the page and complete in the CSV.
      note: a sentence below it.
      digits: decimals of numbers that are not integers (default: as many as are meaningful).
      groups: numbers of rows that start a group, with the group's name.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    digits: int | None = None
    groups: dict[int, str] = field(default_factory=dict)

    def csv(self) -> str:
        """Header and rows, numbers unrounded."""
        return to_csv(self.header, self.rows)

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are right-aligned."""
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)

    @property
    def has_numbers(self) -> bool:
        """Whether any column holds numbers."""
        return any(self.numeric(column) for column in range(len(self.header)))

    def shown(self, value: Value) -> str:
        """A cell's text."""
        return shown(value, self.digits)


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
      name: name in the legend.
      xs, ys: its points, by increasing x.
      points: mark each point; for series with few points.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Curves over steps.

    Attributes:
      title: what the y axis shows, with its unit.
      x_label: what the x axis shows.
      series: the curves, in the order of the legend.
      ends: (x, name) of phases, at their ends.
      rings: (x, y, text) of points to highlight.
      note: a sentence below the plot.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    ends: Sequence[tuple[float, str]] = ()
    rings: Sequence[tuple[float, float, str]] = ()
    note: str = ""

    def csv(self) -> str:
        """One line per point of all series."""
        rows = (
            (series.name, x, y)
            for series in self.series
            for x, y in zip(series.xs, series.ys, strict=True)
        )
        return to_csv(("series", self.x_label, "value"), rows)


@dataclass(frozen=True)
class BarPlot:
    """Nonnegative values side by side.

    Attributes:
      title: what the bars show, with their unit.
      names: names of the groups of bars.
      series: (name, for each group a value and its standard error or None; None for no bar).
      note: a sentence below the plot.
    """

    title: str
    names: Sequence[str]
    series: Sequence[tuple[str, Sequence[tuple[float, float | None] | None]]]
    note: str = ""

    def csv(self) -> str:
        """One line per bar."""
        rows = [
            (group, name, *bar)
            for name, bars in self.series
            for group, bar in zip(self.names, bars, strict=True)
            if bar is not None
        ]
        return to_csv(("group", "series", "value", "standard_error"), rows)


@dataclass(frozen=True)
class Histogram:
    """Counts between edges.

    Attributes:
      title: what is counted.
      x_label: what the edges are.
      edges: ``n + 1`` numbers.
      counts: ``n`` numbers.
      marks: (x, text) of values to highlight.
      note: a sentence below the plot.
    """

    title: str
    x_label: str
    edges: Sequence[float]
    counts: Sequence[int]
    marks: Sequence[tuple[float, str]] = ()
    note: str = ""

    def csv(self) -> str:
        """One line per bin."""
        rows = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        return to_csv(("from", "to", "count"), rows)


Plot = LinePlot | BarPlot | Histogram


@dataclass(frozen=True)
class Plots:
    """Plots side by side or below one another, depending on the page's width."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Findings:
    """What was found, in words; each has ``outcome``, ``headline`` and ``detail``."""

    findings: Sequence[Finding]


@dataclass(frozen=True)
class Steps:
    """What a reader may do: (sentence, command or an empty text)."""

    title: str
    steps: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Columns:
    """Lists of blocks side by side, or below one another on a narrow screen."""

    columns: Sequence[Sequence[Block]]


@dataclass(frozen=True)
class Answers:
    """Texts that belong together: (speaker, text, remark)."""

    title: str
    answers: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Fold:
    """Blocks that the reader can hide; hidden at first unless ``is_open``."""

    summary: str
    blocks: Sequence[Block]
    is_open: bool = False


Block = Text | Code | Table | Plots | Findings | Steps | Columns | Answers | Fold


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def shown(value: Value, digits: int | None = None) -> str:
    """A value as text for readers; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\N{MINUS SIGN}")
    if not math.isfinite(value):
        return str(value)
    if digits is not None:
        text = f"{value:,.{digits}f}"
    elif value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        text = f"{value:.2e}"
    else:
        text = f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text


def to_csv(header: Iterable[str], rows: Iterable[Iterable[Value]]) -> str:
    """Comma-separated values; numbers as Python writes them, empty for None."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
