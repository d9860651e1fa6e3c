"""The page: sections of one run, or a comparison of several, as one HTML text."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxykd_jax.reporting import compare, cost, first_screen, overview, proxy, student, svg
from proxykd_jax.reporting.benchmark_tables import benchmarks
from proxykd_jax.reporting.blocks import Block, Plot, Section, Text
from proxykd_jax.reporting.examples import texts
from proxykd_jax.reporting.run_folder import UNREADABLE, RunFolder, told

_FILES = Path(__file__).parent


@dataclass(frozen=True)
class Chapter:
    """The sections of one run, or of the comparison.

    Attributes:
      title: a heading above them; empty on the page of a single run.
      sections: in order.
      folded: hidden until the reader opens them.
    """

    title: str
    sections: Sequence[Section]
    folded: bool = False


def render(runs: Sequence[RunFolder]) -> str:
    """The page of one run, or of several, first compared and then one by one.

    A run always gets a page: a section that fails is replaced by the reason.
    """
    if len(runs) == 1:
        return page(runs[0].label, "report of a run", [Chapter("", run_sections(runs[0]))])
    title = " and ".join((", ".join(r.label for r in runs[:-1]), runs[-1].label))
    chapters = [Chapter("", _comparison(runs))]
    plain = first_screen.plain_of(runs)
    chapters += [Chapter(f"Run {r.label}", run_sections(r, plain), folded=True) for r in runs]
    return page(title, "runs compared", chapters)


def run_sections(run: RunFolder, plain: RunFolder | None = None) -> list[Section]:
    """All sections of one run; ``plain`` is a run of plain fine-tuning on the same page."""
    found = []
    for title, make in (
        ("Verdict", lambda: first_screen.first_screen(run, plain)),
        ("What was run", lambda: overview.what_was_run(run)),
        ("Corpus", lambda: overview.corpus(run)),
        ("Alignment of the proxy", lambda: _with_others(run, "align")),
        ("How near to the teacher", lambda: proxy.nearness(run)),
        ("Soft labels and weights", lambda: student.soft_labels(run)),
        ("Distillation of the student", lambda: _with_others(run, "distill")),
        ("Student beside proxy", lambda: student.beside_the_proxy(run)),
        *([("Benchmarks", lambda: benchmarks([run]))] if run.has_benchmarks else []),
        ("Machine, time and tokens", lambda: cost.cost(run)),
        ("Answers while training", lambda: texts(run)),
    ):
        found.append(_guarded(title, make))
    return found


def _with_others(run: RunFolder, stage: str) -> Section:
    module = proxy if stage == "align" else student
    section = module.training(run)
    others = student.other_series(run, stage, module.SHOWN)
    return Section(section.title, [*section.blocks, *([] if others is None else [others])])


def _comparison(runs: Sequence[RunFolder]) -> list[Section]:
    return [
        _guarded("Verdict", lambda: first_screen.compared_runs(runs)),
        _guarded("Settings that differ", lambda: compare.settings(runs)),
        _guarded("Final figures", lambda: compare.figures(runs)),
        _guarded("Curves", lambda: compare.curves(runs)),
        *(
            [_guarded("Benchmarks", lambda: benchmarks(runs))]
            if any(run.has_benchmarks for run in runs)
            else []
        ),
    ]


def _guarded(title: str, make: Callable[[], Section]) -> Section:
    """A section, or one that says why it could not be made."""
    try:
        return make()
    except UNREADABLE as error:
        return Section(title, [Text(told(error), missing=True)])


def page(title: str, about: str, chapters: Sequence[Chapter]) -> str:
    """The HTML text of chapters.

    Args:
      title: its heading.
      about: the kind of page, shown above the heading.
      chapters: its content.
    """
    import jinja2

    numbers = itertools.count(1)

    def figure(plot: Plot) -> jinja2.utils.markupsafe.Markup:
        return jinja2.utils.markupsafe.Markup(svg.draw(plot, f"plot{next(numbers)}"))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        figure=figure,
        kind=lambda block: type(block).__name__,
        data_uri=_data_uri,
        file_name=_file_name,
        num_colours=svg.NUM_COLOURS,
    )
    style = jinja2.utils.markupsafe.Markup((_FILES / "style.css").read_text(encoding="utf-8"))
    template = environment.get_template("page.html")
    return template.render(title=title, about=about, chapters=chapters, style=style) + "\n"


def _data_uri(text: str) -> str:
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()


def _file_name(title: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in title.lower()).split()
    return "_".join(words[:8]) + ".csv"


__all__ = ["Block", "Chapter", "page", "render", "run_sections"]
