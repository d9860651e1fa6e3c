"""Folders that survive a kill: atomic writes, digests that notice one bit, a manifest per stage."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxykd_jax import artifacts
from proxykd_jax.errors import UserError


def test_written_files_are_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "folder" / "value.json"
    artifacts.write_json(path, {"b": 1, "a": ["é", None, 1e-5]})
    assert artifacts.read_json(path) == {"a": ["é", None, 1e-5], "b": 1}
    artifacts.write_json(path, [])
    assert artifacts.read_json(path) == []
    assert os.listdir(path.parent) == ["value.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_keeps_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "value"
    artifacts.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space"):
            artifacts.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    artifacts.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["value"]
    artifacts.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """After kill -9 at random moments of a loop of writes, the file holds one of the values."""
    path = tmp_path / "value.json"
    program = (
        "import pathlib, sys\nfrom proxykd_jax.artifacts import write_json\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "for n in range(10**9):\n    write_json(path, {'n': n, 'filler': [n] * 20_000})"
    )
    generator = random.Random(0)
    for _ in range(6):
        artifacts.write_json(path, {"n": -1, "filler": []})
        process = subprocess.Popen([sys.executable, "-c", program, str(path)])
        while artifacts.read_json(path)["n"] < 0 and process.poll() is None:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        value = artifacts.read_json(path)
        assert value["n"] >= 0 and value["filler"] == [value["n"]] * 20_000
    artifacts.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["value.json"]


def test_leftover_folders_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".part_3.tmp").mkdir()
    (tmp_path / ".part_3.tmp" / "half").write_text("x")
    (tmp_path / "part_2.tmp").write_text("kept")
    (tmp_path / ".hidden").write_text("kept")
    artifacts.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "part_2.tmp"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_that_is_no_json_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(tmp_path / "value.json", value)
    assert not os.listdir(tmp_path)


def test_reading_what_is_absent_or_damaged(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        artifacts.read_json(tmp_path / "absent.json")
    for content in (b'{"a": 1', b"", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json is damaged"):
            artifacts.read_json(tmp_path / "bad.json")


# --- digests --------------------------------------------------------------------------------------


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path):
    generator = random.Random(1)
    data = generator.randbytes(100_003)
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "array.bin"
    path.write_bytes(data)
    (tmp_path / "other").write_bytes(b"")
    digests = artifacts.digest_files(tmp_path)
    assert sorted(digests) == ["deep/array.bin", "other"]
    assert artifacts.changed_files(tmp_path, digests) == []
    for bit in (0, len(data) * 8 - 1, *(generator.randrange(len(data) * 8) for _ in range(20))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        assert artifacts.changed_files(tmp_path, digests) == [
            f"{path} was changed since it was written (digest differs)"
        ]


def test_missing_and_cut_files_are_named(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"12345")
    digests = artifacts.digest_files(tmp_path)
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "b").unlink()
    assert artifacts.changed_files(tmp_path, digests) == [
        f"{tmp_path / 'a'} has 4 bytes, not 5",
        f"{tmp_path / 'b'} is missing",
    ]


def _settled(path):
    """Makes a file look as if it had not been written just now."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**10))


def test_a_file_at_rest_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    _settled(path)
    first = artifacts.digest_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_read_digest", None)  # reading would fail
        assert artifacts.digest_file(path) == first
        assert artifacts.digest_files(tmp_path)["weights"]["digest"] == first


def test_an_edited_file_is_seen(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(b"000")
    _settled(path)
    before = artifacts.digest_file(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"abc")
    assert artifacts.digest_file(path) != before
    # An unpacked archive can leave a file of the same size and modification time.
    path.write_bytes(b"abd")
    os.utime(path, ns=times)
    edited = artifacts.digest_file(path)
    other = tmp_path / "other"
    other.write_bytes(b"abe")
    os.utime(other, ns=times)
    os.replace(other, path)
    assert len({before, edited, artifacts.digest_file(path)}) == 3


def test_a_file_that_is_being_written_is_read_again(tmp_path, monkeypatch):
    exact = artifacts._file_state

    def coarse(path):
        """A file system whose clock ticks every second."""
        inode, size, *times = exact(path)
        return inode, size, *(time // 10**9 * 10**9 for time in times)

    monkeypatch.setattr(artifacts, "_file_state", coarse)
    path = tmp_path / "source"
    seen = set()
    for number in range(50):
        path.write_bytes(b"%02d" % number)
        seen.add(artifacts.digest_file(path))
    assert len(seen) == 50


def test_bits_that_rot_leave_the_time_as_it_was_and_are_seen(tmp_path, monkeypatch):
    path = tmp_path / "array"
    path.write_bytes(b"12345")
    _settled(path)
    digests = artifacts.digest_files(tmp_path)
    state = artifacts._file_state(path)
    path.write_bytes(b"12344")
    monkeypatch.setattr(artifacts, "_file_state", lambda path: state)
    # The metadata have not changed.
    assert artifacts.digest_file(path) == digests["array"]["digest"]
    assert len(artifacts.changed_files(tmp_path, digests)) == 1


def test_digests_do_not_depend_on_chunks_or_key_order(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 40)  # a file written just now is read each time
    whole = artifacts.digest_file(path)
    monkeypatch.setattr(artifacts, "_CHUNK", 7)
    assert artifacts.digest_file(path) == whole
    assert artifacts.digest_value({"a": 1, "b": 2}) == artifacts.digest_value({"b": 2, "a": 1})
    assert artifacts.digest_value({"a": 1}) != artifacts.digest_value({"a": 2})


# --- stages ---------------------------------------------------------------------------------------

SETTINGS = {"align": {"num_rounds": 4, "targets": ["q_proj", "v_proj"]}}
INPUTS = {"corpus": "xxh3:1"}


def test_a_stage_is_opened_gone_on_with_and_complete(tmp_path):
    folder = tmp_path / "runs" / "x" / "proxy"
    assert not artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    assert not artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    (folder / "part.bin").write_bytes(b"data")
    artifacts.complete_stage(folder, counts={"rows": 3}, best_step=7)
    assert artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    assert manifest["stage"] == "align"
    assert manifest["settings"] == SETTINGS and manifest["inputs"] == INPUTS
    assert manifest["counts"] == {"rows": 3} and manifest["best_step"] == 7
    assert list(manifest["files"]) == ["part.bin"]
    assert artifacts.changed_files(folder, manifest["files"]) == []


def test_only_a_finished_stage_is_read(tmp_path):
    def refusal(stage):
        with pytest.raises(UserError) as caught:
            artifacts.finished_manifest(tmp_path / "s", stage, "corpus")
        return str(caught.value)

    assert refusal("prepare").endswith("holds no corpus; run proxykd prepare first.")
    artifacts.open_stage(tmp_path / "s", "prepare", SETTINGS, INPUTS)
    assert "is not complete; run prepare again" in refusal("prepare")
    artifacts.complete_stage(tmp_path / "s", counts={"rows": 3})
    assert "was not made by score" in refusal("score")
    assert artifacts.finished_manifest(tmp_path / "s", "prepare", "corpus")["counts"] == {"rows": 3}
    (tmp_path / "s" / artifacts.MANIFEST).write_text("[]")
    assert "is damaged" in refusal("prepare")


def test_tuples_and_lists_are_the_same_setting(tmp_path):
    artifacts.open_stage(tmp_path / "s", "align", {"targets": ("a", "b")}, {})
    artifacts.open_stage(tmp_path / "s", "align", {"targets": ["a", "b"]}, {})


def test_other_settings_and_inputs_are_all_named(tmp_path):
    folder = tmp_path / "proxy"
    artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    (folder / "part.bin").write_bytes(b"data")
    now = {"align": {"num_rounds": 2, "targets": ["q_proj", "v_proj"], "beta": 0.1}}
    with pytest.raises(UserError) as caught:
        artifacts.open_stage(folder, "align", now, {"corpus": "xxh3:2"})
    assert str(caught.value).splitlines() == [
        f"{folder} was made with other settings:",
        "  align.num_rounds: 4 then, 2 now",
        "  align.beta: null then, 0.1 now",
        '  corpus: "xxh3:1" then, "xxh3:2" now',
        f"Give the run another name, or remove {folder} to make it again.",
    ]
    assert not artifacts.open_stage(folder, "align", SETTINGS, INPUTS)


def test_a_stage_that_has_made_nothing_may_change(tmp_path):
    """As after a run that stopped at a damaged file: the repaired file is another input."""
    folder, repaired = tmp_path / "proxy", {"corpus": "xxh3:2"}
    artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    (folder / ".manifest.json.tmp").write_text("{")  # a kill's
    assert not artifacts.open_stage(folder, "align", SETTINGS, repaired)
    assert artifacts.read_json(folder / artifacts.MANIFEST)["inputs"] == repaired
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"xxh3:2.* then"):
        artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    empty = tmp_path / "empty"
    artifacts.open_stage(empty, "align", SETTINGS, INPUTS)
    artifacts.complete_stage(empty, counts={"rows": 0})
    with pytest.raises(UserError, match="made with other settings"):
        artifacts.open_stage(empty, "align", SETTINGS, repaired)


def test_folders_that_are_not_ours_are_left_alone(tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("all of it")
    with pytest.raises(UserError, match="not made by this program"):
        artifacts.open_stage(foreign, "align", {}, {})
    assert os.listdir(foreign) == ["chapter.tex"]
    with pytest.raises(UserError, match="is a file"):
        artifacts.open_stage(foreign / "chapter.tex", "align", {}, {})


def test_an_empty_folder_and_one_left_by_a_kill_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not artifacts.open_stage(tmp_path / "empty", "align", {}, {})
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".manifest.json.tmp").write_text("{")
    assert not artifacts.open_stage(tmp_path / "killed", "align", {}, {})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"status": "odd"}'])
def test_a_damaged_manifest_is_a_sentence(tmp_path, content):
    folder = tmp_path / "proxy"
    artifacts.open_stage(folder, "align", SETTINGS, INPUTS)
    (folder / artifacts.MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*remove"):
        artifacts.open_stage(folder, "align", SETTINGS, INPUTS)


def test_identity_follows_settings_inputs_and_content_alone(tmp_path):
    def identity(name: str, settings: dict, inputs: dict, data: bytes, rows: int = 1) -> str:
        folder: Path = tmp_path / name
        artifacts.open_stage(folder, "score", settings, inputs)
        (folder / "data").write_bytes(data)
        artifacts.complete_stage(folder, counts={"rows": rows})
        return artifacts.stage_identity(folder)

    first = identity("a", SETTINGS, INPUTS, b"1")
    assert identity("b", SETTINGS, INPUTS, b"1", rows=2) == first
    assert identity("c", {**SETTINGS, "top_k": 5}, INPUTS, b"1") != first
    assert identity("d", SETTINGS, {"corpus": "other"}, b"1") != first
    assert identity("e", SETTINGS, INPUTS, b"2") != first


def test_a_manifest_cut_off_while_it_was_written_is_no_content(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name / "split").mkdir(parents=True)
        artifacts.write_json(tmp_path / name / artifacts.MANIFEST, {"status": "running"})
        (tmp_path / name / "split" / "part.bin").write_bytes(b"data")
    (tmp_path / "killed" / ".manifest.json.tmp").write_text('{"status": "comp')
    for name in ("whole", "killed"):
        artifacts.complete_stage(tmp_path / name, counts={})
    whole, killed = (tmp_path / name / artifacts.MANIFEST for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(killed.parent)) == [artifacts.MANIFEST, "split"]


def test_content_given_by_the_stage_stands_for_its_files(tmp_path):
    for name in ("a", "b"):
        artifacts.open_stage(tmp_path / name, "prepare", {}, {})
        (tmp_path / name / "data").write_text(name)
        artifacts.complete_stage(tmp_path / name, counts={}, content="xxh3:same")
    assert artifacts.stage_identity(tmp_path / "a") == artifacts.stage_identity(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["content"] == "xxh3:same"


# --- stages that other runs have finished ---------------------------------------------------------


def _finish(run: Path, stage: str, settings: dict, inputs: dict | None = None) -> Path:
    folder = run / stage
    artifacts.open_stage(folder, stage, settings, inputs or {})
    artifacts.write_bytes(folder / "part", b"content")
    artifacts.complete_stage(folder, counts={})
    return folder


def test_a_stage_of_the_same_settings_and_inputs_is_linked(tmp_path):
    first = _finish(tmp_path / "one", "corpus", {"rows": 2}, {"files": "a"})
    for name in ("two", "three"):
        run = tmp_path / name
        with artifacts.borrowing(run, [run, tmp_path / "none", tmp_path / "two", first.parent]):
            assert artifacts.open_stage(run / "corpus", "corpus", {"rows": 2}, {"files": "a"})
        assert os.readlink(run / "corpus") == "../one/corpus"  # never a link to a link
        assert artifacts.stage_identity(run / "corpus") == artifacts.stage_identity(first)
    # Outside of `borrowing` the link is a stage like any other, and can be moved with the runs.
    (tmp_path / "moved").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert artifacts.open_stage(
        tmp_path / "moved/two/corpus", "corpus", {"rows": 2}, {"files": "a"}
    )


@pytest.mark.parametrize(
    "stage, settings, inputs, complete",
    [
        ("corpus", {"rows": 3}, {"files": "a"}, True),
        ("corpus", {"rows": 2}, {"files": "b"}, True),
        ("corpus", {"rows": 2, "new": 1}, {"files": "a"}, True),
        ("other", {"rows": 2}, {"files": "a"}, True),
        ("corpus", {"rows": 2}, {"files": "a"}, False),
    ],
)
def test_what_differs_or_is_not_finished_is_made_again(tmp_path, stage, settings, inputs, complete):
    one, two = tmp_path / "one", tmp_path / "two"
    if complete:
        _finish(one, "corpus", {"rows": 2}, {"files": "a"})
    else:
        artifacts.open_stage(one / "corpus", "corpus", {"rows": 2}, {"files": "a"})
    with artifacts.borrowing(two, [one]):
        assert not artifacts.open_stage(two / "corpus", stage, settings, inputs)
    assert not (two / "corpus").is_symlink()


def test_what_a_run_has_begun_itself_is_gone_on_with(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    artifacts.open_stage(two / "corpus", "corpus", {}, {})
    _finish(one, "corpus", {})
    with artifacts.borrowing(two, [one]):
        assert not artifacts.open_stage(two / "corpus", "corpus", {}, {})
        # Runs that are not lenders, and stages that were not named, are not linked.
        assert not artifacts.open_stage(tmp_path / "three" / "corpus", "corpus", {}, {})
    with artifacts.borrowing(tmp_path / "four", [one], ("proxy",)):
        assert not artifacts.open_stage(tmp_path / "four" / "corpus", "corpus", {}, {})


def test_a_link_whose_stage_is_gone_is_a_sentence(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    _finish(one, "corpus", {})
    with artifacts.borrowing(two, [one]):
        artifacts.open_stage(two / "corpus", "corpus", {}, {})
    (one / "corpus").rename(one / "elsewhere")
    with pytest.raises(UserError, match=r"a link to \.\./one/corpus, which is gone"):
        artifacts.open_stage(two / "corpus", "corpus", {}, {})
