"""Parquet, Hugging Face datasets and TFDS give the same rows as JSON Lines would."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.columnar_files import read_parquet
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops

ROWS = [{"id": str(n), "prompt": f"é {n}", "response": "2024-01-01"} for n in range(700)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
    for n in range(5)
]


def test_parquet_columns_without_a_text_mark(tmp_path):
    path = tmp_path / "a.parquet"
    chat = [{"role": b"user", "content": b"q"}, {"role": b"assistant", "content": "é".encode()}]
    pq.write_table(pa.table({"messages": [chat], "blob": [b"\xff\x00"]}), path)
    (record,) = [record for record, _ in read_parquet(path)]
    assert record["messages"][1] == {"role": "assistant", "content": "é"}
    assert record["blob"] == b"\xff\x00"


def test_parquet_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(UserError, match="two columns of the name prompt"):
        list(read_parquet(path))


def read(**keys):
    rows = read_source(SourceConfig(**keys), prompts_only=False, drops=Drops())
    return [(row.messages[0].content, row.messages[1].content, row.origin) for row in rows]


def expected(origin):
    return [
        (row["prompt"], row["response"], f"{origin}:{n}") for n, row in enumerate(ROWS, start=1)
    ]


@pytest.fixture
def parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    return path


def test_parquet(parquet):
    assert read(path=str(parquet)) == expected(parquet)


def test_damaged_parquet(tmp_path, parquet):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(parquet.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(path=str(cut))
    (tmp_path / "other.parquet").write_text("{}")
    with pytest.raises(UserError, match="not a Parquet file"):
        read(path=str(tmp_path / "other.parquet"))


def test_parquet_without_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS[:1]).slice(1), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="is empty"):
        read(path=str(tmp_path / "a.parquet"))


def test_dataset_folders(tmp_path, parquet):
    import datasets

    folder = str(parquet.parent)
    assert read(dataset=folder) == expected(f"{folder}/train")
    with pytest.raises(UserError, match="Bad split: test"):
        read(dataset=folder, split="test")
    stored = datasets.Dataset.from_list(ROWS)
    stored.save_to_disk(tmp_path / "one")
    assert read(dataset=f"{tmp_path}/one") == expected(f"{tmp_path}/one/train")
    datasets.DatasetDict(dev=datasets.Dataset.from_list(CHATS)).save_to_disk(tmp_path / "many")
    rows = read(dataset=f"{tmp_path}/many", split="dev")
    assert rows == [(f"q{n}", "a", f"{tmp_path}/many/dev:{n + 1}") for n in range(5)]
    with pytest.raises(UserError, match="has no split 'train'; it has dev"):
        read(dataset=f"{tmp_path}/many")


def test_datasets_kept_as_json_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "response": "2024-01-01"}\n')
    with pytest.raises(UserError, match="guessed types"):
        read(dataset=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read(dataset=f"{tmp_path}/empty")


def test_the_mixed_openorca_dataset_is_refused(tmp_path):
    import datasets

    folder = tmp_path / "Open-Orca" / "OpenOrca"
    row = {"id": "1", "system_prompt": "", "question": "q", "response": "a"}
    datasets.Dataset.from_list([row]).save_to_disk(folder)
    with pytest.raises(UserError, match="mixes answers of GPT-4 and GPT"):
        read(dataset=str(folder))


def _builder(folder, file_format):
    import tensorflow_datasets as tfds

    text = tfds.features.Text

    class Chats(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            messages = tfds.features.Sequence({"role": text(), "content": text()})
            features = tfds.features.FeaturesDict({"messages": messages})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(CHATS)

    # The class is defined in a script, because tfds looks for checksum files beside a module.
    Chats.__module__ = "__main__"
    builder = Chats(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize(
    "file_format", ["array_record", pytest.param("tfrecord", marks=pytest.mark.slow)]
)
def test_tfds(tmp_path, file_format):
    """ArrayRecord files are read without TensorFlow; TFRecord needs it (13 s to import)."""
    builder = _builder(tmp_path, file_format)
    for folder in (tmp_path, builder.data_dir):
        rows = read(tfds=str(folder))
        assert sorted(row[:2] for row in rows) == [(f"q{n}", "a") for n in range(5)]
        assert rows[2][2] == f"{folder}/train:3"
    assert len(read(tfds=str(tmp_path), split="train[:40%]")) == 2
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        read(tfds=str(tmp_path), split="test")


def test_tfds_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tfds="no_such_builder_anywhere")
    with pytest.raises(UserError, match="cannot be read"):
        read(tfds=str(tmp_path))
