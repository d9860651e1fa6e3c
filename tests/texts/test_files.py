"""Which files of a folder are read, and what is said about the others."""

import json

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.files import list_files, read_file, source_files
from proxykd_jax.texts.readers import read_source, source_pieces
from proxykd_jax.texts.records import Drops


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, "response": "a"}) + "\n")


def read(path, **keys):
    rows = read_source(SourceConfig(path=str(path)), prompts_only=False, drops=Drops(), **keys)
    return [row.messages[0].content for row in rows]


def test_files_that_are_not_read_are_named(tmp_path):
    fill(tmp_path, "a.jsonl", "b.ndjson", "C.JSONL", "d.jsonl.xz", "e.txt", ".git/f.jsonl")
    fill(tmp_path, "dataset_infos.json", "sub/g.arrow", "sub/h.JSON")
    assert read(tmp_path) == ["C.JSONL", "a.jsonl", "b.ndjson", "sub/h.JSON"]
    assert source_files(str(tmp_path)).passed_over == {
        "d.jsonl.xz": "its ending is not read",
        "dataset_infos.json": "it holds no rows",
        "e.txt": "its ending is not read",
        "sub/g.arrow": "its ending is not read",
    }


HELD_OUT = [
    "test.jsonl",
    "tests/a.jsonl",
    "gsm8k_test.jsonl",
    "test-00000-of-00001.jsonl",
    "data/validation-00000-of-00001.jsonl",
    "val.jsonl",
    "valid_2.jsonl",
    "dev.jsonl",
    "mmlu.eval.jsonl",
    "TestSet.jsonl",
    "testset.jsonl",
    "held-out.jsonl",
    "holdout.jsonl",
]
TRAINED_ON = ["train.jsonl", "latest.jsonl", "contest.jsonl", "interval.jsonl", "device.jsonl"]


def test_a_folder_s_test_files_are_not_trained_on(tmp_path):
    fill(tmp_path, *HELD_OUT, *TRAINED_ON)
    found = source_files(str(tmp_path))
    assert [file.name for file in found.files] == sorted(TRAINED_ON)
    assert sorted(found.passed_over) == sorted(HELD_OUT)
    assert found.passed_over["gsm8k_test.jsonl"] == "its name says test"
    assert sorted(read(tmp_path)) == sorted(TRAINED_ON)
    pieces = source_pieces(SourceConfig(path=str(tmp_path)), held_out=False)
    assert [piece.path for piece in pieces] == [str(file) for file in found.files]
    # Benchmarks are read whole.
    assert len(list_files(str(tmp_path))) == len(HELD_OUT) + len(TRAINED_ON)


def test_a_test_set_is_not_read_from_training_files(tmp_path):
    fill(tmp_path, "test.jsonl", "train.jsonl", "other.jsonl")
    assert read(tmp_path, held_out=True) == ["other.jsonl", "test.jsonl"]
    assert list(source_files(str(tmp_path), held_out=True).passed_over) == ["train.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    assert read(tmp_path, held_out=True) == ["other.jsonl", "train.jsonl"]


def test_what_is_named_is_read(tmp_path):
    fill(tmp_path, "test_a.jsonl", "test_b.jsonl", "train.jsonl")
    assert read(tmp_path / "test_a.jsonl") == ["test_a.jsonl"]
    assert read(tmp_path / "test_*.jsonl") == ["test_a.jsonl", "test_b.jsonl"]
    assert read(tmp_path / "*.jsonl") == ["train.jsonl"]
    fill(tmp_path / "dev", "a_dev.jsonl", "b_dev.jsonl")
    assert read(tmp_path / "dev") == ["a_dev.jsonl", "b_dev.jsonl"]
    fill(tmp_path / "dev", "rows.jsonl")
    assert read(tmp_path / "dev") == ["rows.jsonl"]


def test_nothing_to_train_on(tmp_path):
    fill(tmp_path / "data", "test.jsonl", "validation.jsonl")
    with pytest.raises(UserError, match=r"no file to train on: test.jsonl, validation.jsonl say"):
        read(tmp_path / "data")


def test_a_folder_of_save_to_disk(tmp_path):
    fill(tmp_path, "state.json", "dataset_info.json", "data-00000-of-00001.arrow")
    with pytest.raises(UserError, match="Name it under dataset instead of path"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("begins", "what"),
    [
        (b"BZh91AY", "compressed with bzip2"),
        (b"\xfd7zXZ\x00", "compressed with xz"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"ARROW1\0\0", "an Arrow file"),
    ],
)
def test_content_that_cannot_be_read_is_called_by_name(tmp_path, begins, what):
    path = tmp_path / "a.jsonl"
    path.write_bytes(begins)
    with pytest.raises(UserError, match=what):
        list(read_file(path))


def test_a_byte_order_mark_within_a_field_stays(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeff"One\n\ufefftwo?",a,b,c,\ufeffd,A\n\ufeffThree?,a,b,c,d,B\n', "utf-8")
    records = [record for record, _ in read_file(path)]
    assert [record["question"] for record in records] == ["One\n\ufefftwo?", "\ufeffThree?"]
    assert records[0]["choices"][3] == "\ufeffd"
