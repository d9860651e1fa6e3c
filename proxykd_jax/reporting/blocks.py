"""What a page is made of. A section builder returns these; ``page.html`` knows how each looks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Value = str | int | float | None


@dataclass(frozen=True)
class Text:
    """A paragraph; with ``missing`` one that says what the run does not have."""

    text: str
    missing: bool = False


@dataclass(frozen=True)
class Code:
    """Text as it stands, in a box that scrolls."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a header row.

    Attributes:
      title: its caption.
      header: a name a column.
      rows: values; numbers are shown rounded, and whole in the CSV.
      note: a sentence below it.
      digits: after the point, of numbers that are no integers (default: as many as say something).
      groups: rows (by number) that begin a group, with the group's name.
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
        """Whether a column holds numbers, which are set flush right."""
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)

    @property
    def has_numbers(self) -> bool:
        """Whether there is a column of numbers, and so something to compute with."""
        return any(self.numeric(column) for column in range(len(self.header)))

    def shown(self, value: Value) -> str:
        """A cell's text."""
        return shown(value, self.digits)


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
      name: in the legend.
      xs, ys: its points, by rising x.
      points: each is marked; for few of them.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Curves over steps.

    Attributes:
      title: what the y axis is, with its unit.
      x_label: what the x axis is.
      series: the curves, in the order of the legend.
      ends: (x, name) of phases that end there.
      rings: (x, y, text) of points to be pointed out.
      note: a sentence below the plot.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    ends: Sequence[tuple[float, str]] = ()
    rings: Sequence[tuple[float, float, str]] = ()
    note: str = ""

    def csv(self) -> str:
        """A row a point, of all that is drawn."""
        rows = (
            (series.name, x, y)
            for series in self.series
            for x, y in zip(series.xs, series.ys, strict=True)
        )
        return to_csv(("series", self.x_label, "value"), rows)


@dataclass(frozen=True)
class BarPlot:
    """Values of at least 0 side by side.

    Attributes:
      title: what the bars are, with their unit.
      names: of the bars' groups.
      series: (name, a value and its standard error or None for each group; None for no bar).
      note: a sentence below the plot.
    """

    title: str
    names: Sequence[str]
    series: Sequence[tuple[str, Sequence[tuple[float, float | None] | None]]]
    note: str = ""

    def csv(self) -> str:
        """A row a bar."""
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
      counts: ``n`` of them.
      marks: (x, text) of values to be pointed out.
      note: a sentence below the plot.
    """

    title: str
    x_label: str
    edges: Sequence[float]
    counts: Sequence[int]
    marks: Sequence[tuple[float, str]] = ()
    note: str = ""

    def csv(self) -> str:
        """A row a bin."""
        rows = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        return to_csv(("from", "to", "count"), rows)


Plot = LinePlot | BarPlot | Histogram


@dataclass(frozen=True)
class Plots:
    """Plots beside or below one another, as the width allows."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Tiles:
    """A few figures, large: (what, the figure, what it is compared with or of)."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Answers:
    """Texts that belong together: (who, what they said, a remark)."""

    title: str
    answers: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Code | Table | Plots | Tiles | Answers | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def shown(value: Value, digits: int | None = None) -> str:
    """A value as a person reads it; a dash for none."""
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
    """Comma-separated values; numbers as Python writes them, nothing for None."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
