"""Plots as SVG text. Colours, dashes and fonts come from the page's CSS, so that one drawing works
on light and dark screens and on paper. Sizes suit a phone; wider pages set plots side by side. The
same plot always gives the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from proxykd_jax.reporting.blocks import BarPlot, Histogram, LinePlot, Plot, Series, shown

WIDTH = 360
_HEIGHT = 226
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 20, 40
# Number of colours in style.css; further series reuse them.
NUM_COLOURS = 8
# Marks get tooltips only up to this number of points.
_TOOLTIPS = 80
# Approximate width of a letter of 10.5 px.
_LETTER = 5.8


def draw(plot: Plot, name: str) -> str:
    """The SVG element of a plot.

    Args:
      plot: what to draw.
      name: prefix for the ids of title and description; unique on the page.
    """
    match plot:
        case LinePlot():
            body, height = _lines(plot), _HEIGHT
        case Histogram():
            body, height = _histogram(plot), _HEIGHT
        case BarPlot():
            body, height = _bars(plot)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(plot.title)}</title>'
        f'<desc id="{name}-d">{escape(describe(plot))}</desc>{body}</svg>'
    )


def describe(plot: Plot) -> str:
    """The plot in words, for readers who cannot see it."""
    match plot:
        case LinePlot():
            return " ".join(_told(series, plot.x_label) for series in plot.series)
        case Histogram():
            edges = plot.edges
            most = max(range(len(plot.counts)), key=lambda i: plot.counts[i])
            return (
                f"{sum(plot.counts):,} values from {shown(edges[0])} to {shown(edges[-1])}; most, "
                f"{plot.counts[most]:,}, between {shown(edges[most])} and {shown(edges[most + 1])}."
            )
        case BarPlot():
            return " ".join(
                f"{group}, {name}: {shown(bar[0])}."
                for name, bars in plot.series
                for group, bar in zip(plot.names, bars, strict=True)
                if bar is not None
            )


def _told(series: Series, x_label: str) -> str:
    if not series.ys:
        return f"{series.name}: no points."
    low = min(range(len(series.ys)), key=lambda i: series.ys[i])
    high = max(range(len(series.ys)), key=lambda i: series.ys[i])
    xs, ys = series.xs, series.ys
    return (
        f"{series.name}: {shown(ys[0])} at {x_label} {shown(xs[0])}, {shown(ys[-1])} at "
        f"{shown(xs[-1])}; lowest {shown(ys[low])} at {shown(xs[low])}, highest {shown(ys[high])} "
        f"at {shown(xs[high])}."
    )


# --- axes -----------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` evenly spaced round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [round(i * step, 12) for i in range(first, last + 1)]
    return [low, high]


Scale = Callable[[float], float]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    if not high > low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _range(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """The values' range with a margin; around a single value, a range of a tenth of it."""
    low, high = min(values), max(values)
    if zero:
        low = min(low, 0.0)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - air), high + air


def _frame(
    xs: tuple[float, float], ys: tuple[float, float], x_label: str, *, whole: bool
) -> tuple[list[str], Scale, Scale]:
    """Grid, ticks and axis labels, and the scales; ``whole``: x ticks only at integers."""
    bottom = _HEIGHT - _BOTTOM
    x_of = _scale(*xs, _LEFT, WIDTH - _RIGHT)
    y_of = _scale(*ys, bottom, _TOP)
    parts = []
    for value in ticks(*ys, 5):
        y = f"{y_of(value):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y_of(value) + 3.5, _tick(value), "end"))
    for value in ticks(*xs, 5):
        if whole and value != int(value):
            continue
        parts.append(_text(x_of(value), bottom + 15, _tick(value), "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>')
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 31, x_label, "middle", "name"))
    return parts, x_of, y_of


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "\N{MINUS SIGN}", 1)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


# --- kinds of plots -------------------------------------------------------------------------------


def _lines(plot: LinePlot) -> str:
    xs = [x for series in plot.series for x in series.xs]
    ys = [y for series in plot.series for y in series.ys]
    parts, x_of, y_of = _frame((min(xs), max(xs)), _range(ys), plot.x_label, whole=True)
    parts += _phases(plot, x_of)
    for index, series in enumerate(plot.series):
        colour = f"c{index % NUM_COLOURS}"
        places = [(x_of(x), y_of(y)) for x, y in zip(series.xs, series.ys, strict=True)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        kind = "marked" if series.points else "thin"
        if len(places) > 1:
            parts.append(f'<path class="line {kind} {colour}" d="M{path}"/>')
        if series.points or len(places) == 1:
            tips = len(places) <= _TOOLTIPS
            for (x, y), value, at in zip(places, series.ys, series.xs, strict=True):
                tip = f"{series.name}, {plot.x_label} {shown(at)}: {shown(value)}" if tips else ""
                parts.append(_marker(index, x, y, colour, tip))
    for x, y, text in plot.rings:
        parts.append(f'<circle class="ring" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="6.5"/>')
        anchor = "end" if x_of(x) > WIDTH / 2 else "start"
        away = -10 if anchor == "end" else 10
        below = y_of(y) < _TOP + 14
        parts.append(_text(x_of(x) + away, y_of(y) + (16 if below else -8), text, anchor, "ring"))
    return "".join(parts)


def _marker(index: int, x: float, y: float, colour: str, tip: str) -> str:
    """Markers differ in shape, so that nobody has to tell colours apart."""
    shapes = (
        f'<circle class="mark {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.8">',
        f'<rect class="mark {colour}" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" '
        'width="5.2" height="5.2">',
        f'<path class="mark {colour}" d="M{x:.1f} {y - 3.6:.1f}l3.4 6h-6.8z">',
        f'<path class="mark {colour}" d="M{x:.1f} {y - 3.8:.1f}l3.8 3.8l-3.8 3.8l-3.8-3.8z">',
    )
    shape = shapes[index % len(shapes)]
    end = shape[1:].partition(" ")[0]
    return f"{shape}<title>{escape(tip)}</title></{end}>" if tip else f"{shape[:-1]}/>"


def _phases(plot: LinePlot, x_of: Scale) -> list[str]:
    """A line where a phase ends, and its name above the middle of it if there is room."""
    parts, begin = [], x_of(min(x for series in plot.series for x in series.xs))
    free = 0.0
    for at, name in plot.ends:
        end = x_of(at)
        width, middle = len(name) * _LETTER, (begin + end) / 2
        if end - begin > 1:
            parts.append(f'<path class="phase" d="M{end:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        if end - begin > 1 and middle - width / 2 >= free:
            middle = min(max(middle, _LEFT + width / 2), WIDTH - _RIGHT - width / 2)
            parts.append(_text(middle, _TOP - 7, name, "middle", "phase"))
            free = middle + width / 2 + 6
        begin = end
    return parts


def _histogram(plot: Histogram) -> str:
    ys = _range([0.0, *plot.counts], zero=True)
    parts, x_of, y_of = _frame((plot.edges[0], plot.edges[-1]), ys, plot.x_label, whole=False)
    for begin, end, count in zip(plot.edges[:-1], plot.edges[1:], plot.counts, strict=True):
        x, width = x_of(begin) + 0.5, max(x_of(end) - x_of(begin) - 1, 0.5)
        tip = f"{shown(begin)} to {shown(end)}: {count:,}"
        parts.append(
            f'<rect class="bar c0" x="{x:.1f}" y="{y_of(count):.1f}" width="{width:.1f}" '
            f'height="{y_of(0) - y_of(count):.1f}"><title>{escape(tip)}</title></rect>'
        )
    for value, text in plot.marks:
        x = x_of(value)
        parts.append(f'<path class="phase" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(_text(x, _TOP - 7, text, anchor, "phase"))
    return "".join(parts)


def _bars(plot: BarPlot) -> tuple[str, int]:
    """Horizontal bars below their names, so that both fit on a phone."""
    bar, gap, name_height = 13, 10, 17
    values = [b for _, bars in plot.series for b in bars if b is not None]
    most = max((value + (error or 0) for value, error in values), default=0.0) or 1.0
    x_of = _scale(0, most, 8, WIDTH - 58)
    parts, y = [], 4.0
    for place, group in enumerate(plot.names):
        parts.append(_text(8, y + 11, group, "start", "name"))
        y += name_height
        for index, (name, bars) in enumerate(plot.series):
            found = bars[place]
            if found is None:
                continue
            value, error = found
            width = max(x_of(value) - 8, 0.8)
            spread = "" if error is None else f" \N{PLUS-MINUS SIGN} {shown(error)}"
            tip = f"{group}, {name}: {shown(value)}{spread}"
            parts.append(
                f'<rect class="bar c{index % NUM_COLOURS}" x="8" y="{y:.1f}" width="{width:.1f}" '
                f'height="{bar - 2}"><title>{escape(tip)}</title></rect>'
            )
            end = x_of(value)
            if error:
                left, right = x_of(max(value - error, 0)), x_of(value + error)
                middle = y + (bar - 2) / 2
                parts.append(f'<path class="error" d="M{left:.1f} {middle:.1f}H{right:.1f}"/>')
                end = right
            parts.append(_text(end + 5, y + bar - 4, f"{value:.3g}", "start"))
            y += bar
        y += gap
    return "".join(parts), math.ceil(y)
