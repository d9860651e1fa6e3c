"""Files of rows that are damaged, endless, too deep or no files: a sentence, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from proxykd_jax.config import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.files import list_files, read_file
from proxykd_jax.texts.json_files import read_json_records
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops

ROW = b'{"prompt": "p", "response": "r"}\n'


def _deep(levels: int, opened: str = "[", closed: str = "]") -> bytes:
    return b'{"prompt": "p", "response": "r", "more": %s}' % (
        (opened * levels + "1" + closed * levels).encode()
    )


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize(
    "row", [_deep(250), _deep(700), _deep(900), _deep(150_000), _deep(400, '{"a":', "}")]
)
def test_nesting_that_no_step_could_follow_is_refused(tmp_path, row, array):
    file = tmp_path / "a.json"
    file.write_bytes(b"[" + row + b"]" if array else ROW + row)
    with pytest.raises(UserError, match="nesting is too deep"):
        list(read_json_records(file))


def test_nesting_of_real_rows_and_many_brackets_are_read(tmp_path):
    wide = json.dumps({"prompt": "p", "response": "r", "more": [[[i]] for i in range(900)]})
    file = tmp_path / "a.jsonl"
    file.write_bytes(_deep(100) + b"\n" + wide.encode())
    assert len(list(read_json_records(file))) == 2


@pytest.mark.parametrize(
    "before, after", [(b"", b""), (ROW, b""), (b"[", b"]"), (b"", ROW[:-1]), (ROW, ROW)]
)
def test_blank_space_without_end_is_passed_in_bounded_memory(tmp_path, before, after):
    file = tmp_path / "a.gz"
    blank = b"\n" * (8 << 20)
    file.write_bytes(gzip.compress(before + blank + b" " * (2 << 20) + after, 1))
    del blank
    tracemalloc.start()
    try:
        found = list(read_json_records(file))
        assert len(found) == (before + after).count(b"prompt")
        if after == ROW[:-1]:
            assert found[-1][1] == f"{file}:{(8 << 20) + 1}"
    except UserError as error:
        assert "empty" in str(error)
        assert b"prompt" not in before + after
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_blank_csv_is_damaged(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"q,a,b,c,d,A\n" + b"\n" * 150_000)
    with pytest.raises(UserError, match="blank lines"):
        list(read_file(file))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_places_that_hold_no_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").symlink_to("/proc/self/status")
    names = ("pipe", "loop", "gone", "folder", "none/*", "[")
    places = [str(tmp_path / name) for name in names]
    for place in (*places, "/dev/zero", "/proc/self/status", "/proc/self", "/proc/self/stat*"):
        with pytest.raises(UserError):
            list_files(place)


@pytest.mark.parametrize(
    "lines",
    [
        [{"instruction": "i", "output": "o"}],
        [{"prompt": "p", "response": 7}, {"prompt": "p", "response": ["r"]}],
        [{"prompt": None, "response": "r"}, {"prompt": {"a": 1}, "response": "r"}],
    ],
)
def test_rows_of_other_types_are_counted_and_named(tmp_path, lines):
    file = tmp_path / "a.jsonl"
    file.write_bytes(ROW + "".join(json.dumps(line) + "\n" for line in lines).encode())
    drops = Drops()
    found = list(read_source(SourceConfig(path=str(file)), prompts_only=False, drops=drops))
    assert len(found) == 1
    assert drops.total == len(lines)
    assert f"{file}:2" in json.dumps(drops.as_json())


def test_turns_kept_as_deep_text_are_no_turns(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": "[[" + "[" * 90_000}) + "\n")
    source = SourceConfig(path=str(file), format="messages")
    with pytest.raises(UserError):
        list(read_source(source, prompts_only=False, drops=Drops()))


def test_parquet_with_two_fields_of_one_name_in_a_column(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    kind = pa.struct([pa.field("a", pa.string()), pa.field("a", pa.string())])
    inner = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], fields=list(kind))
    pq.write_table(pa.table({"prompt": ["p"], "response": ["r"], "more": inner}), tmp_path / "a")
    with pytest.raises(UserError, match="Parquet"):
        list(read_file(tmp_path / "a"))
