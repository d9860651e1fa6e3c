"""CSV and TSV with a row of names: cells, separators, compression, damage."""

import gzip

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.csv_files import FEWER_CELLS, MORE_CELLS
from proxykd_jax.texts.files import read_file
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops

READ = {
    "comma.csv": ("prompt,response\nq,a\n", [["q", "a"]]),
    "tab.tsv": ("prompt\tresponse\nq, r\ta\n", [["q, r", "a"]]),
    "tab.csv": ("prompt\tresponse\nq\ta\n", [["q", "a"]]),
    "semicolon.csv": ("prompt;response\nq, r;a\n", [["q, r", "a"]]),
    "mark.csv": ('\ufeff"prompt";"response"\n"q";"a"\n', [["q", "a"]]),
    "breaks.csv": ('prompt,response\n"q\n\n""r""","a,\nb"\n', [['q\n\n"r"', "a,\nb"]]),
    "name_breaks.csv": ('\nprompt,"response"\r\nq,a\r\n\r\nr,b', [["q", "a"], ["r", "b"]]),
    "system.csv": ("prompt,response,system\nq,a,s\nr,b,\n", [["s", "q", "a"], ["r", "b"]]),
    "index.csv": (",prompt,response\n0,q,a\n", [["q", "a"]]),
    "long.csv": ("prompt,response\nq," + "a" * 200_000 + "\n", [["q", "a" * 200_000]]),
    "turns.csv": (
        'messages\n"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", '
        '""content"": ""a""}]"\n',
        [["q", "a"]],
    ),
    "spaces.csv": ("prompt, response \n q , a \n", [[" q ", " a "]]),
}


def read(path, **keys):
    drops = Drops()
    rows = list(read_source(SourceConfig(path=str(path), **keys), prompts_only=False, drops=drops))
    return [[m.content for m in row.messages] for row in rows], drops


@pytest.mark.parametrize("name", READ)
def test_tables(tmp_path, name):
    text, expected = READ[name]
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        found, drops = read(path)
        assert found == expected and not drops.total
    assert read(tmp_path)[0] == expected * 2  # a folder reads both


def test_any_names_and_six_columns(tmp_path):
    """Six columns with numbers are no benchmark, and a row is named by the line it begins at."""
    path = tmp_path / "a.csv"
    path.write_text('question,reply,a,b,c,score\n"x\ny",a,,,,1\nz,b,,,,2\n')
    columns = {"prompt": "question", "response": "reply"}
    assert read(path, columns=columns)[0] == [["x\ny", "a"], ["z", "b"]]
    assert [origin for _, origin in read_file(path)] == [f"{path}:2", f"{path}:4"]


def test_cells_that_are_missing_or_blank(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\nq\nq,a,b\nq,\n,a\nq,a\n")
    found, drops = read(path)
    assert found == [["q", "a"]]
    assert drops.counts == {
        FEWER_CELLS: 1, MORE_CELLS: 1, "empty answer": 1, "empty prompt": 1,
    }  # fmt: skip


REFUSED = {
    "names alone": (b"prompt,response\n", "column names and no row"),
    "nothing": (b"\n\n", "is empty"),
    "same names": (b"prompt,prompt\nq,a\n", "two columns of the name prompt"),
    "no names": (b'"' + b"word " * 30 + b'",a\nq,a\n', "no column names"),
    "UTF-16": ("prompt,response\n".encode("utf-16"), "UTF-16, but text must be UTF-8"),
    "Latin-1": ("prompt,response\né,a\n".encode("latin-1"), r":2 is not UTF-8 \(byte 0xe9\)"),
    "open quote": (b'prompt,response\nq,"a\n', "damaged CSV: unexpected end of data"),
    "quote within": (b'prompt,response\nq,"a" b\n', ":2 is damaged CSV.* are doubled"),
    "returns": (b"prompt,response\rq,a\r", "carriage returns alone"),
    "cut gzip": (gzip.compress(b"prompt,response\nq,a\n" * 99)[:-12], "damaged gzip"),
    "other names": (b"foo,bar\nq,a\n", r"keys foo \(str\), bar \(str\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_cannot_be_read(tmp_path, case):
    data, said = REFUSED[case]
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.csv.*{said}"):
        read(tmp_path / "a.csv")
