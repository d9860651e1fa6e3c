"""The tokenised corpus: written shard by shard, read at random, read by TFDS."""

import hashlib

import numpy as np
import pytest

from proxykd_jax.artifacts import open_stage
from proxykd_jax.data.corpus import SPLITS, TokenCorpus, open_corpus, row_id_of
from proxykd_jax.data.corpus_writer import CorpusWriter
from proxykd_jax.errors import UserError

RNG = np.random.default_rng(0)
ROWS = [
    (RNG.integers(0, 50_000, n).astype(np.int32), int(RNG.integers(1, n)))
    for n in RNG.integers(2, 300, 47)
]
SHARDS = (20, 0, 27)


def write(folder, shards=SHARDS, split="align"):
    settings = {"corpus": {"max_length": 300}}
    open_stage(folder, "prepare", settings, {})
    writer = CorpusWriter(folder)
    begin = 0
    for number, count in enumerate(shards):
        shard = writer.open_shard(split, number)
        for tokens, prompt_length in ROWS[begin : begin + count]:
            shard.write(tokens, prompt_length, "a source")
        shard.commit()
        begin += count
    return writer


def finish(writer):
    writer.finish(
        {"rows": 47},
        tokenizer={"path": "somewhere", "digest": "xxh3:0", "vocab_size": 50_000},
        end_token_ids=(2, 7),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "corpus"
    finish(write(folder))
    return folder


def test_rows_come_back(folder):
    corpus = open_corpus(folder)
    assert (corpus.vocab_size, corpus.end_token_ids) == (50_000, (2, 7))
    assert (corpus.tokenizer_path, corpus.max_length) == ("somewhere", 300)
    split = corpus.split("align")
    assert len(split) == 47
    assert split.lengths.tolist() == [len(tokens) for tokens, _ in ROWS]
    assert split.prompt_lengths.tolist() == [prompt for _, prompt in ROWS]
    wanted = [*RNG.permutation(47).tolist(), 3, 3, 46]
    for number, row in zip(wanted, split.read(wanted), strict=True):
        tokens, prompt_length = ROWS[number]
        np.testing.assert_array_equal(row.tokens, tokens)
        assert row.tokens.dtype == np.int32 and row.prompt_length == prompt_length
        assert row.row_id == split.row_ids[number] == row_id_of(tokens, prompt_length)
        assert row.prompt.tolist() + row.answer.tolist() == tokens.tolist()
    assert [row.row_id for row in split] == list(split.row_ids)
    assert split.read([]) == []


def test_row_id_is_sha256_of_tokens_and_prompt_length():
    data = b"".join(int(i).to_bytes(4, "little") for i in (5, 70_000, 3, 2))
    assert row_id_of(np.array([5, 70_000, 3]), 2) == hashlib.sha256(data).hexdigest()


def test_empty_splits(folder):
    for name in SPLITS:
        split = open_corpus(folder).split(name)
        assert len(split) == len(split.row_ids) == (47 if name == "align" else 0)
    with pytest.raises(ValueError, match="train"):
        open_corpus(folder).split("train")


def test_tfds_reads_the_folder(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["align"].num_examples == 47
    source = builder.as_data_source(split="align")
    assert len(source) == 47
    for example, (tokens, prompt_length) in zip(source, ROWS, strict=True):
        np.testing.assert_array_equal(example["tokens"], tokens)
        assert example["prompt_length"] == prompt_length
        assert example["row_id"].decode() == row_id_of(tokens, prompt_length)


def test_features_are_what_tfds_would_write(folder):
    import json

    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "prompt_length": tfds.features.Scalar(np.int32),
            "row_id": tfds.features.Text(),
        }
    )
    assert json.loads((folder / "features.json").read_text()) == features.to_json()


def test_reading_needs_no_tensorflow(folder):
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from proxykd_jax.data.corpus import open_corpus\n"
        f"print(len(open_corpus({str(folder)!r}).split('align').read([0, 46])))\n"
        "print('tensorflow' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["2", "False", "False"]


def test_out_of_range_is_an_error(folder):
    for number in (47, -1):
        with pytest.raises(IndexError, match="47 rows"):
            open_corpus(folder).split("align").read([number])
        if number > 0:
            with pytest.raises(IndexError):
                open_corpus(folder).split("align").row_ids[number]


def test_half_made_corpus_is_not_opened_but_goes_on(tmp_path):
    folder = tmp_path / "corpus"
    with pytest.raises(UserError, match="holds no corpus"):
        open_corpus(folder)
    writer = write(folder, (20,))
    with pytest.raises(UserError, match="not complete"):
        open_corpus(folder)
    (folder / ".x.array_record-00001.tmp").write_bytes(b"left by a killed process")
    again = CorpusWriter(folder)
    assert again.has("align", 0) and not again.has("align", 1)
    assert not (folder / ".x.array_record-00001.tmp").exists()
    finish(writer)
    assert len(open_corpus(folder).split("align")) == 20


def test_finish_can_be_cut_off_anywhere(tmp_path, monkeypatch):
    """The renames at the end can be interrupted: stop after each of them, then finish."""
    import os

    real = os.replace
    for allowed in range(4):
        folder = tmp_path / str(allowed) / "corpus"
        writer = write(folder)
        done = []

        def replace(source, target, done=done, allowed=allowed):
            if len(done) == allowed:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                finish(writer)
        finish(CorpusWriter(folder))
        assert len(open_corpus(folder).split("align")) == 47


def test_damage_is_found(tmp_path):
    folder = tmp_path / "corpus"
    finish(write(folder))
    path = next(folder.glob("*00002-of-00003"))
    data = path.read_bytes()
    manifest = open_corpus(folder).manifest

    def align():  # opened before the damage: records have digests of their own
        return TokenCorpus(folder, manifest).split("align")

    found = 0
    written = np.flatnonzero(np.frombuffer(data, np.uint8))  # the rest pads blocks of 64 KiB
    for at in written[:: len(written) // 40]:
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            rows = align().read(range(20, 47))
        except UserError as error:
            assert "is damaged" in str(error)
            found += 1
        else:  # no row depends on this byte
            for row, (tokens, _) in zip(rows, ROWS[20:], strict=True):
                np.testing.assert_array_equal(row.tokens, tokens)
    assert found > 30
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        align().read([46])
    with pytest.raises(UserError, match="is damaged"):
        open_corpus(folder)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        align().read([46])
    assert len(align().read([0, 19])) == 2
