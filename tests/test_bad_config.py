"""Configs and places that cannot be used: a sentence each, before any work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from proxykd_jax import cli
from proxykd_jax.config import Config, load_config
from proxykd_jax.errors import UserError
from proxykd_jax.small_files import check_folder, read_object, read_text

MINIMAL = """\
preset: paper
name: one
corpus: {sources: [{path: rows.jsonl}]}
proxy: {path: large}
student: {path: little}
"""


def _load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    "scalar",
    [
        *("0x", "0x__", "0b101", "0o17", "017", "12:30", "1:2:3.5", "_1", "+", "0xg", "7" * 6000),
        *("!!int seven", "!!int ''", "!!int 017", "!!int 1:10", "!!int [7]", "!!float 1.x"),
        *("!!bool perhaps", "!!null 7", "!!seq 7", "!!map 7", "!!str {a: 7}", "!own 7"),
        *("!!binary Nw==", "-0x1", "1e2", "7.", "null", "yes", "2001-02-03", "0x" + "e" * 6000),
    ],
)
def test_scalars_that_are_no_seed(tmp_path, scalar):
    for text, overrides in (
        (MINIMAL + f"seed: {scalar}\n", ()),
        (MINIMAL, (f"seed={scalar}",)),
    ):
        with pytest.raises(UserError) as caught:
            _load(tmp_path, text, *overrides)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("scalar, value", [("0", 0), ("+12", 12), ("1_000", 1000), ("0x1f", 31)])
def test_scalars_that_are_a_seed(tmp_path, scalar, value):
    assert _load(tmp_path, MINIMAL + f"seed: {scalar}\n").seed == value


@pytest.mark.parametrize(
    "override, said",
    [
        ("corpus.sources.¹.path=x", "no index"),
        ("corpus.sources.੩.path=x", "no index"),
        (f"corpus.sources.{'8' * 6000}.path=x", "no index"),
        ("corpus.sources.0.path=''", "empty"),
        ("proxy.path='  '", "empty"),
        ('student.path="a\\0"', "NUL"),
        (f"runs_dir={'long/' * 1200}", "too long"),
        (f"tokenizer={'é' * 200}", "too long"),
        ("corpus.validation_fraction=1.0", "less than 1"),
        ("corpus.end_tokens=[]", "at least 1"),
        ("align.num_rounds=2147483648", "less than"),
    ],
)
def test_values_that_are_refused(tmp_path, override, said):
    with pytest.raises(UserError, match=said):
        _load(tmp_path, MINIMAL, override)


def test_thousands_of_mistakes_take_seconds_and_are_not_all_listed(tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match="more keys are wrong") as caught:
        _load(tmp_path, "".join(f"key{i}: {i}\n" for i in range(5000)))
    assert len(str(caught.value).splitlines()) < 200
    assert time.monotonic() - began < 30
    with pytest.raises(UserError, match="bytes"):
        _load(tmp_path, MINIMAL + "# much\n" * 50_000)


def _places(folder: Path) -> dict[str, Path | str]:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "file").write_text("{")
    return {
        "loop": folder / "loop",
        "gone": folder / "gone",
        "pipe": folder / "pipe",
        "folder": folder,
        "under a file": folder / "file" / "below",
        "device": "/dev/zero",
        "kernel": "/proc/self/status",
        "nul": f"{folder}/a\0b",
        "empty": "",
        "long": folder / ("n" * 300),
    }


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_places_that_are_no_file(tmp_path):
    for place in _places(tmp_path).values():
        with pytest.raises(UserError, match="cannot read the config"):
            load_config(place)
        with pytest.raises(UserError):
            read_object(Path(place), "object")
    with pytest.raises(UserError, match="more than 0 bytes"):
        read_text(tmp_path / "file", "file", most_bytes=0)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 90_000, '{"a": ' + "9" * 5000 + "}"])
def test_text_that_is_no_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        read_object(tmp_path / "a.json", "object")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_run_folder_that_cannot_be_used_is_told_before_any_work(tmp_path, capsys):
    places = _places(tmp_path)
    for name in ("loop", "gone", "pipe", "under a file", "device", "kernel"):
        path = tmp_path / "c.yaml"
        path.write_text(MINIMAL + f"runs_dir: {places[name]}\n")

        def work(config: Config) -> None:
            raise AssertionError("the work began")

        assert cli.run_command("prepare", work, "", ["--config", str(path)]) == 2
        assert "error: runs_dir: " in capsys.readouterr().err
    check_folder(tmp_path / "new" / "run", "runs_dir")


def test_what_the_disk_refuses_is_a_sentence(capsys):
    def work() -> int:
        raise OSError(28, "No space left on device", "/data/part")

    assert cli.run_work(work) == 2
    assert "error: /data/part cannot be used: No space left" in capsys.readouterr().err
