"""Files that are compressed with Zstandard."""

import sys

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops

LINE = b'{"prompt": "q", "response": "a"}\n'
FILES = {
    "a.jsonl.zst": LINE * 3,
    "a.json.zst": b"[" + LINE + b"," + LINE + b"," + LINE + b"]",
    "a.csv.zst": b"prompt,response\n" + b"q,a\n" * 3,
    "a.TSV.ZST": b"prompt\tresponse\n" + b"q\ta\n" * 3,
}


def read(path):
    rows = read_source(SourceConfig(path=str(path)), prompts_only=False, drops=Drops())
    return [[m.content for m in row.messages] for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    """One frame or several, with a frame of no rows between; cut off or damaged anywhere."""
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor().compress
    data, path = FILES[name], tmp_path / name
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    for content in (compress(data), compress(data[:9]) + skippable + compress(data[9:])):
        path.write_bytes(content)
        assert read(tmp_path) == [["q", "a"]] * 3
        for damaged, said in (
            (content[:-1], "cut off"),
            (content + b"x", "damaged Zstandard"),
            (content[:8] + b"\xff" * 8 + content[16:], "damaged Zstandard"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=said):
                read(path)


def test_a_long_file_is_read_to_its_end(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(LINE * 100_000))
    assert len(read(path)) == 100_000


def test_without_the_package_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd1234")
    with pytest.raises(UserError, match=r"pip install 'proxykd_jax\[zstd\]'.*zstd -d a.jsonl.zst"):
        read(path)
