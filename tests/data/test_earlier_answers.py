"""Rows with several answers in the loss: on disk, in batches, with labels, and in pairs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from proxykd_jax.artifacts import open_stage
from proxykd_jax.data.collate import RowsInMemory, TokenRow, collate_rows, learnt_places
from proxykd_jax.data.corpus import open_corpus, row_id_of
from proxykd_jax.data.corpus_writer import CorpusWriter
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.generation import label_rows
from proxykd_jax.training.batches import Joined, LastAnswers, answer_positions, distill_collate

EARLIER = np.array([[2, 4], [6, 7]], np.int32)
TOKENS = np.arange(10, 22, dtype=np.int32)
ROW = TokenRow(TOKENS, 9, "ab" * 32, EARLIER)
PLAIN = TokenRow(TOKENS[:6], 4, "cd" * 32)
LEARNT = [2, 3, 6, 9, 10, 11]


def test_they_come_back_from_disk(tmp_path):
    import tensorflow_datasets as tfds

    folder = tmp_path / "corpus"
    open_stage(folder, "prepare", {"corpus": {"max_length": 20}}, {})
    writer = CorpusWriter(folder)
    shard = writer.open_shard("align", 0)
    shard.write(ROW.tokens, ROW.prompt_length, "a", ROW.earlier)
    shard.write(PLAIN.tokens, PLAIN.prompt_length, "a")
    shard.note("left off", "f:1", "a")
    shard.commit()
    assert writer.parts("align")[0].metadata["notes"]["a"]["left off"]["count"] == 1
    tokenizer = {"path": "t", "digest": "xxh3:0", "vocab_size": 100}
    writer.finish({}, tokenizer=tokenizer, end_token_ids=(2,))
    split = open_corpus(folder).split("align")
    first, second = split.read([0, 1])
    assert first.earlier.tolist() == EARLIER.tolist() and second.earlier is None
    assert first.row_id == row_id_of(TOKENS, 9, EARLIER) != row_id_of(TOKENS, 9)
    assert split.earlier_lengths.tolist() == [3, 0]
    source = tfds.builder_from_directory(folder).as_data_source(split="align")
    found = [example["earlier_answers"] for example in source]
    assert found[0].tolist() == [2, 4, 6, 7] and found[1] is None
    assert (
        "earlier_answers"
        in json.loads((folder / "features.json").read_text())["content"]["features"]
    )


def test_a_batch_masks_every_answer():
    rows = RowsInMemory([PLAIN, ROW])
    assert answer_positions(rows).tolist() == [2, 6]
    batch = collate_rows([[PLAIN, ROW]], 18, 2, 1, answers=8)
    places = np.flatnonzero(batch.mask_BL[0])
    assert batch.labels_BL[0, places].tolist() == [14, 15, *TOKENS[LEARNT]]
    assert learnt_places(ROW).tolist() == LEARNT and ROW.num_learnt == len(LEARNT)
    last = LastAnswers(rows)
    assert answer_positions(last).tolist() == [2, 3]
    assert all(row.earlier is None for row in last.read([0, 1]))


def test_labels_stand_at_every_answer(monkeypatch):
    monkeypatch.setattr(
        label_rows,
        "hidden_rows",
        lambda params, adapter, batch, config: jnp.arange(batch.tokens_BL.size)[:, None],
    )
    scorer = label_rows.RowScorer(
        None, None, SimpleNamespace(vocab_size=1 << 20), lambda positions: positions, 4, 16
    )
    for piece in scorer.dispatch([ROW, PLAIN]):
        assert piece.offsets.tolist() == [0, 1, 2, 3, 4, 5, 0, 1] or (
            piece.offsets.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
        )
        row = [ROW, PLAIN][int(piece.rows[0])]
        count = row.num_learnt
        assert piece.labels.labels_M[:count].tolist() == row.tokens[learnt_places(row)].tolist()

    def stored(wanted, row_ids):
        rows = [[PLAIN, ROW][place] for place in wanted]
        return [
            SoftLabels(
                row.row_id,
                row.tokens[learnt_places(row)][:, None],
                np.zeros((row.num_learnt, 1), np.float32),
                np.zeros(row.num_learnt, np.float32),
                np.full(row.num_learnt, -np.inf, np.float32),
            )
            for row in rows
        ]

    collate = distill_collate(
        Joined({"distill": RowsInMemory([PLAIN, ROW])}),
        {"distill": stored},
        {"distill": np.ones(2, np.float32)},
        ("distill",),
        top_k=1,
    )
    batch = collate(PlannedBatch(((0, 1),), 18, 2))
    inside = batch.rows.mask_BL
    np.testing.assert_array_equal(batch.topk_ids_BLK[inside][:, 0], batch.rows.labels_BL[inside])
    assert np.isneginf(batch.tail_logps_BL[inside]).all()
    assert np.isfinite(batch.tail_logps_BL[~inside]).all()
