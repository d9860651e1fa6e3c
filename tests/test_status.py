"""The status line: what it says, when, and that it leaves other lines alone."""

from __future__ import annotations

import io
import sys

import pytest

from proxykd_jax.status import StatusLine, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    return screen


def test_what_is_left_follows_the_costs(monkeypatch: pytest.MonkeyPatch):
    """Ten units in 100 s leave 100 s of align; distill costs half of align."""
    screen, clock = _screen(monkeypatch), _Clock()
    line = StatusLine(clock)
    line.memory = lambda: "1.0 GB"
    line.plan({"align": 2.0, "distill": 1.0})
    line.begin("align", total=25, done=5)
    clock.now = 100.0
    line.idle = 10.0
    line.used(60.0)
    line.show("round 1 15/25", stage="align", rate=1234.5, done=15)
    assert screen.getvalue() == (
        "\r\x1b[Kalign round 1 15/25 | 1,234 tokens/s | 1.0 GB | 2 min left | run 3 min left | "
        "50% useful"
    )
    line.begin("distill", total=10)
    clock.now = 250.0
    line.show("train 0/10", stage="distill", done=0)
    assert screen.getvalue().endswith("\r\x1b[Kdistill train 0/10 | 1.0 GB | 20% useful")
    clock.now = 300.0
    line.show("train 5/10", stage="distill", done=5)
    assert "| 3 min left | run 3 min left |" in screen.getvalue()


def test_other_lines_stand_above(monkeypatch: pytest.MonkeyPatch):
    screen, clock = _screen(monkeypatch), _Clock()
    line = StatusLine(clock)
    line.memory = lambda: ""
    line.show("1,000 rows read")
    clock.now = 0.1
    line.show("1,001 rows read")  # too early
    line.say("a sentence")
    line.say("another")
    line.clear()
    assert screen.getvalue() == "\r\x1b[K1,000 rows read\r\x1b[Ka sentence\nanother\n"


def test_a_log_file_gets_nothing(monkeypatch: pytest.MonkeyPatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    line = StatusLine()
    line.begin("align", 10)
    line.show("step 1/10", stage="align", done=1)
    line.clear()
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 00 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
