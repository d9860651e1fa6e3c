"""The strict reader: what it accepts, and errors with file and line."""

import gzip
import json
import tracemalloc

import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.texts.json_files import read_json_records

ROWS = [
    {"id": 1, "prompt": "What day is it?", "response": "2024-01-01"},
    {"id": "2", "prompt": "naïve – 日本 🙂", "response": "1e5"},
    {"id": 123456789012345678901234567890, "prompt": "a\u2028b\r\n", "response": "null"},
]


def records(path, **limits):
    return [record for record, _ in read_json_records(path, **limits)]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def lines(rows, end="\n", **dumps):
    return "".join(json.dumps(row, **dumps) + end for row in rows)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_is_written_comes_back_unchanged(tmp_path, ascii_only):
    """Dates, long numbers and mixed ids stay as they are, and U+2028 does not end a line."""
    text = lines(ROWS, ensure_ascii=ascii_only)
    assert records(write(tmp_path / "a.jsonl", text)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("array", [True, False])
def test_content_decides_not_the_name(tmp_path, name, zipped, array):
    data = (json.dumps(ROWS, indent=1) if array else lines(ROWS)).encode()
    assert records(write(tmp_path / name, gzip.compress(data) if zipped else data)) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + lines(ROWS),
        lines(ROWS, end="\r\n"),
        "\n  \n" + lines(ROWS, end="\n\n\r\n") + "\n \n",
        lines(ROWS).rstrip("\n"),
        "\ufeff" + json.dumps(ROWS),
        "\n\n " + json.dumps(ROWS) + "\n\n",
        json.dumps(ROWS, indent=3).replace("\n", "\r\n"),
    ],
    ids=["bom", "crlf", "blank", "no_last_break", "bom_array", "blank_array", "crlf_array"],
)
def test_harmless_variants(tmp_path, text):
    assert records(write(tmp_path / "a.jsonl", text)) == ROWS


def test_not_a_number_is_null(tmp_path):
    """pandas writes a missing value so; nobody may read the column."""
    text = '{"a": NaN, "b": [Infinity, -Infinity, 1]}\n'
    for whole in (text, f"[{text}]"):
        assert records(write(tmp_path / "a.jsonl", whole)) == [{"a": None, "b": [None, None, 1]}]


def test_byte_order_marks_where_files_were_joined(tmp_path):
    text = "".join("\ufeff" + json.dumps(row) + "\n" for row in ROWS)
    assert records(write(tmp_path / "a.jsonl", text)) == ROWS


def test_origins_are_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n" + lines(ROWS, end="\n\n"))
    assert [origin for _, origin in read_json_records(path)] == [f"{path}:{n}" for n in (2, 4, 6)]
    path = write(tmp_path / "b.json", "\n" + json.dumps(ROWS, indent=1))
    places = [int(origin.rpartition(":")[2]) for _, origin in read_json_records(path)]
    text = path.read_text().splitlines()
    assert all(text[place - 1].strip() == "{" for place in places) and places == [3, 8, 13]


def test_one_object_over_several_lines_is_one_record(tmp_path):
    value = {"canary": "x", "examples": [{"input": "a", "target": "b"}]}
    assert records(write(tmp_path / "a.json", json.dumps(value, indent=2))) == [value]


DAMAGED = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n\r\n", "is empty"),
    "bom_only": (b"\xef\xbb\xbf", "is empty"),
    "empty_array": (b"[ ]", "is empty"),
    "utf16": (lines(ROWS).encode("utf-16"), "UTF-16"),
    "utf16_without_mark": (lines(ROWS).encode("utf-16-le"), "NUL bytes"),
    "latin1": ('{"prompt": "caf\xe9"}\n'.encode("latin-1"), ":1 is not UTF-8 (byte 0xe9)"),
    "latin1_array": ('[{"prompt": "caf\xe9"}]'.encode("latin-1"), "is not UTF-8 (byte 0xe9)"),
    "utf8_cut": ('{"prompt": "caf\xe9'.encode()[:-1], ":1 is not UTF-8"),
    "last_line_cut": ((lines(ROWS) + '{"prompt": "wh').encode(), ":4: the last line is cut off"),
    "middle": (b'{"a": 1}\n{"a": }\n{"a": 2}\n', ":2 is not JSON"),
    "two_on_a_line": (b'{"a": 1} {"a": 2}\n', ":1 is not JSON"),
    "no_comma_between": (b'{"a": 1},\n{"a": 2}\n', ":1 is not JSON"),
    "raw_nul": (b'{"a": "\0"}\n', "NUL bytes"),
    "raw_tab": (b'{"a": "x\ty"}\n', ":1 is not JSON"),
    "carriage_returns": (b'{"a": 1}\r{"a": 2}\r', ":1: its lines end with carriage returns"),
    "twice": (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', ":2: the key 'a' occurs twice"),
    "twice_inside": (b'{"a": [{"b": 1, "b": 1}]}\n', ":1: the key 'b' occurs twice"),
    "twice_array": (b'[{"a": 1},\n{"a": 1, "a": 3}]', ":2: the key 'a' occurs twice"),
    "array_rows": (b'{"a": 1}\n["a", 1]\n', ":2: a row must be an object {...}, not an array"),
    "string": (b'"hello"\n', "must be an object {...}, not a string"),
    "number": (b"7\n", "must be an object {...}, not a number"),
    "null": (b"null\n", "must be an object {...}, not null"),
    "huge_number": (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: "),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nesting is too deep"),
    "array_of_text": (b'[{"a": 1}, "b"]', "row 2 begins with '\"'"),
    "array_no_end": (b'[{"a": 1},\n{"a": 2}\n', "no closing ']'"),
    "array_cut": (b'[{"a": 1},\n{"a": 2', "row 2, which begins at line 2"),
    "array_no_comma": (b'[{"a": 1}\n{"a": 2}]', ":2: a ',' or ']' must follow row 1"),
    "array_last_comma": (b'[{"a": 1},]', "row 2 begins with ']'"),
    "array_more": (b'[{"a": 1}]\n{"a": 2}\n', "text follows the end"),
    "gzip_cut": (gzip.compress(lines(ROWS * 500).encode())[:-20], "damaged gzip"),
    "gzip_flipped": (b"\x1f\x8b\x08\x00" + b"\x07" * 60, "damaged gzip"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_a_sentence_with_the_place(tmp_path, case):
    data, expected = DAMAGED[case]
    path = write(tmp_path / "a.jsonl", data)
    with pytest.raises(UserError) as caught:
        records(path)
    assert str(path) in str(caught.value) and expected in str(caught.value)


def test_rows_before_the_damage_are_given_first(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a"')
    reader = read_json_records(path)
    assert [next(reader)[0]["a"], next(reader)[0]["a"]] == [1, 2]
    with pytest.raises(UserError, match="cut off"):
        next(reader)


@pytest.mark.parametrize("array", [False, True])
def test_a_100_mb_line_is_refused_in_bounded_memory(tmp_path, array):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'[{"a": "' if array else b'{"a": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}]' if array else b'"}\n')
    tracemalloc.start()
    with pytest.raises(UserError, match="longer than 8 MiB"):
        records(path, max_record_bytes=8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@pytest.mark.parametrize("array", [False, True])
def test_memory_is_flat_in_the_number_of_rows(tmp_path, array):
    row = {"prompt": "p" * 1000, "response": "r" * 1000}
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write("[" if array else "")
        for index in range(10_000):
            file.write(("," if index and array else "") + json.dumps(row) + "\n")
        file.write("]" if array else "")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    count = sum(1 for _ in read_json_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < 10_000_000


def test_long_rows_and_chunk_borders(tmp_path):
    """Rows longer than one read, and characters at the border of two reads."""
    rows = [{"text": "é" * n, "n": n} for n in (3, 600_000, 1, 2_000_000, 5)]
    for text in (lines(rows, ensure_ascii=False), json.dumps(rows, ensure_ascii=False)):
        assert records(write(tmp_path / "a.json", text)) == rows
