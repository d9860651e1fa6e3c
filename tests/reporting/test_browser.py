"""In a real browser nothing on the page is wider than the screen of a phone or a computer."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from proxykd_jax.reporting.page import render
from proxykd_jax.reporting.run_folder import read_runs

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1"),
)
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
# The page reports its width, and elements that are wider and in no box that scrolls.
PROBE = """
<script>
addEventListener("load", () => {
  const page = document.documentElement, wide = [];
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest(".scroll") && !one.classList.contains("scroll")) continue;
    if (one.getClientRects().length && one.getBoundingClientRect().right > innerWidth + 0.5)
      wide.push(one.tagName + "." + one.getAttribute("class"));
  }
  const small = [...document.querySelectorAll("svg.plot text")].filter(
    (one) => one.getClientRects().length && one.getBoundingClientRect().height < 9).length;
  const ink = getComputedStyle(document.body).color;
  parent.postMessage(
    [innerWidth, page.scrollWidth, wide.length, small, ink, wide.slice(0, 5)].join("|"), "*");
});
</script>
"""
# A window of headless Chromium is at least 500 wide, so a frame in it has the width of a phone.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<script>addEventListener("message",
  (told) => document.documentElement.setAttribute("data-probe", told.data));</script>
<iframe src="{page}" width="{width}" height="900" style="border: 0"></iframe>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture(scope="module")
def pages(made, other, tmp_path_factory) -> Path:
    """``run.html`` and ``runs.html`` with all sections unfolded and the probe added."""
    folder = tmp_path_factory.mktemp("pages")
    for name, runs in (("run", [made.folder]), ("runs", [made.folder, other.folder])):
        text = render(read_runs(runs)).replace("<details", "<details open")
        (folder / f"{name}.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    return folder


def _open(browser: str, page: Path, profile: Path, *flags: str) -> str:
    command = [browser, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


@pytest.mark.parametrize(
    "page, width, scheme",
    [
        ("run", 390, LIGHT),
        ("run", 390, DARK),
        ("run", 1280, DARK),
        ("runs", 390, LIGHT),
        ("runs", 768, DARK),
        ("runs", 1280, LIGHT),
    ],
)
def test_nothing_is_wider_than_the_screen(browser, pages, tmp_path, page, width, scheme):
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=(pages / f"{page}.html").as_uri(), width=width))
    flags = ("--window-size=1400,1000", scheme, "--dump-dom", "--virtual-time-budget=5000")
    dom = _open(browser, frame, tmp_path / "profile", *flags)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, dom[:2000]
    inner, scroll, wide, small, ink, names = found.group(1).split("|")
    assert int(inner) == width
    assert int(scroll) <= width and int(wide) == 0, names
    assert int(small) == 0, f"{small} labels of plots are too small to read"
    bright = sum(map(int, re.findall(r"\d+", ink)[:3])) > 384
    assert bright == (scheme == DARK)


def test_it_can_be_printed(browser, pages, tmp_path):
    out = tmp_path / "page.pdf"
    _open(browser, pages / "run.html", tmp_path / "profile", f"--print-to-pdf={out}")
    assert out.read_bytes().startswith(b"%PDF") and out.stat().st_size > 20_000
