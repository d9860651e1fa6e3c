"""The soft-label store: exact round trips, precision of the loss, and refused input."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from proxykd_jax.artifacts import complete_stage, open_stage
from proxykd_jax.data.parts import PartFolder
from proxykd_jax.data.soft_labels import (
    SoftLabels,
    SoftLabelStore,
    SoftLabelWriter,
    ids_dtype,
    open_soft_labels,
    weights_of,
)
from proxykd_jax.errors import UserError

INPUTS = {"proxy": "proxy-1", "tokenizer": "tok-1", "template": "chatml", "corpus": "c-1"}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def labels_of(name: str, logits: np.ndarray, top_k: int, seed: int = 0) -> SoftLabels:
    """The exact soft labels of float64 logits ``[R, V]``."""
    logps = log_softmax(logits)
    ids = np.argsort(-logps, axis=-1, kind="stable")[:, :top_k]
    top = np.take_along_axis(logps, ids, -1)
    outside = np.ones(logits.shape, bool)
    np.put_along_axis(outside, ids, False, axis=-1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(outside, np.exp(logps), 0).sum(-1))
    gold = np.random.default_rng(seed).integers(0, logits.shape[1], len(logits))
    return SoftLabels(
        hashlib.sha256(name.encode()).hexdigest(),
        ids.astype(np.int32),
        top.astype(np.float32),
        logps[np.arange(len(logits)), gold].astype(np.float32),
        tail.astype(np.float32),
        finished=not name.endswith("cut"),
    )


def some_rows(count=10, vocab_size=50, top_k=4, scale=2.0, seed=0, most=12):
    rng = np.random.default_rng(seed)
    return [
        labels_of(
            f"row {i}" + (" cut" if i == 3 else ""),
            scale * rng.normal(size=(rng.integers(1, most), vocab_size)),
            top_k,
            i,
        )
        for i in range(count)
    ]


def make(folder, rows, *, vocab_size=50, top_k=4, store_dtype="float16", per_part=4, finish=True):
    settings = {
        "top_k": top_k, "temperature": 1.0, "store_dtype": store_dtype, "vocab_size": vocab_size,
    }  # fmt: skip
    if not open_stage(folder, "score", settings, INPUTS):
        writer = SoftLabelWriter(
            folder, "distill", vocab_size=vocab_size, top_k=top_k, store_dtype=store_dtype
        )
        for index in writer.missing(-(-len(rows) // per_part)):
            writer.commit(index, rows[index * per_part : (index + 1) * per_part])
        if finish:
            complete_stage(folder, counts={"distill": len(rows)}, figures={"distill": {"a": 1}})
    return folder


def test_round_trip_in_float32_is_exact(tmp_path):
    rows = some_rows()
    store = open_soft_labels(make(tmp_path / "s", rows, store_dtype="float32"))
    order = [9, 0, 3, 3, 7]
    for row, read in zip([rows[i] for i in order], store.read("distill", order), strict=True):
        assert read.row_id == row.row_id and read.finished == row.finished
        for name in ("ids", "logps", "gold_logps", "tail_logps"):
            np.testing.assert_array_equal(getattr(read, name), getattr(row, name))
            assert getattr(read, name).dtype == getattr(row, name).dtype
    assert store.num_rows("distill") == 10 and store.num_parts("distill") == 3
    assert store.figures == {"distill": {"a": 1}}
    np.testing.assert_array_equal(store.lengths("distill"), [len(r.gold_logps) for r in rows])
    np.testing.assert_array_equal(store.finished("distill"), [i != 3 for i in range(10)])
    np.testing.assert_array_equal(
        store.seq_logliks("distill"), [r.gold_logps.sum(dtype=np.float64) for r in rows]
    )
    np.testing.assert_allclose(
        store.top_k_mass("distill", 2), np.exp(np.concatenate([r.logps for r in rows[8:]])).sum(-1)
    )


def test_float16_keeps_ids_order_and_sums(tmp_path):
    rows = some_rows(scale=6.0)
    store = open_soft_labels(make(tmp_path / "s", rows))
    for row, read in zip(rows, store.read("distill", range(10)), strict=True):
        np.testing.assert_array_equal(read.ids, row.ids)
        # Rounding gives up to 2^-11, and scaling to a sum of 1 gives less than that again.
        np.testing.assert_allclose(read.logps, row.logps, rtol=2**-10, atol=1e-3)
        np.testing.assert_allclose(read.tail_logps, row.tail_logps, rtol=2**-10, atol=1e-3)
        total = np.exp(read.logps).sum(-1) + np.exp(read.tail_logps)
        np.testing.assert_allclose(total, 1, atol=1e-6)
    # Likelihoods are not stored in the narrow type.
    np.testing.assert_array_equal(
        store.seq_logliks("distill"), [r.gold_logps.sum(dtype=np.float64) for r in rows]
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_proxy", "zero"])
@pytest.mark.parametrize("noise", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_the_loss_is_within_a_thousandth_of_that_from_float32(tmp_path, tail, noise, scale):
    from proxykd_jax.losses import topk_kl_tokens, topk_logps

    rng = np.random.default_rng(5)
    vocab_size, top_k = 400, 10
    logits = scale * rng.normal(size=(6, 60, vocab_size))
    student = (logits + noise * rng.normal(size=logits.shape)).astype(np.float32)
    rows = [labels_of(f"row {i}", x, top_k) for i, x in enumerate(logits)]
    losses, sizes = {}, {}
    for dtype in ("float16", "float32"):
        folder = make(tmp_path / dtype, rows, vocab_size=vocab_size, top_k=top_k, store_dtype=dtype)
        read = open_soft_labels(folder).read("distill", range(6))
        kl = np.array(
            [
                topk_kl_tokens(topk_logps(x, r.ids), (r.logps, r.tail_logps), tail=tail)
                for x, r in zip(student, read, strict=True)
            ],
            np.float64,
        )
        losses[dtype], sizes[dtype] = kl.mean(), np.abs(kl).mean()
    # With the tail "zero" positions have both signs and cancel. With other tails both means agree.
    assert abs(losses["float16"] - losses["float32"]) < 1e-3 * sizes["float32"]
    assert tail == "zero" or losses["float32"] == pytest.approx(sizes["float32"], rel=1e-6)


def test_a_token_of_ten_log_probs_costs_44_bytes(tmp_path):
    for vocab_size, per_token in ((65_536, 44), (65_537, 64)):
        rng = np.random.default_rng(0)
        tokens, top_k = 500, 10
        labels = SoftLabels(
            hashlib.sha256(b"x").hexdigest(),
            np.sort(rng.permutation(vocab_size)[: tokens * top_k].reshape(tokens, top_k)),
            np.full((tokens, top_k), np.log(0.05), np.float32),
            np.full(tokens, -1.0, np.float32),
            np.full(tokens, np.log(0.5), np.float32),
        )
        folder = make(tmp_path / str(vocab_size), [labels] * 2, vocab_size=vocab_size, top_k=top_k)
        size = sum(path.stat().st_size for path in (folder / "distill").iterdir())
        assert size / (2 * tokens) < per_token + 2
        assert ids_dtype(vocab_size).itemsize == (2 if per_token == 44 else 4)
        (read,) = open_soft_labels(folder).read("distill", [1])
        np.testing.assert_array_equal(read.ids, labels.ids)


def test_the_whole_vocabulary_has_no_tail(tmp_path):
    logits = np.random.default_rng(0).normal(size=(5, 8))
    logits[0, 2] = -np.inf
    rows = [labels_of("row 0", logits, 8)]
    assert np.isneginf(rows[0].tail_logps).all()
    for dtype in ("float16", "float32"):
        folder = make(tmp_path / dtype, rows, vocab_size=8, top_k=8, store_dtype=dtype)
        (read,) = open_soft_labels(folder).read("distill", [0])
        assert np.isneginf(read.tail_logps).all()
        assert np.isneginf(read.logps[0, -1]) and np.isfinite(read.logps[1:]).all()
        np.testing.assert_allclose(np.exp(read.logps).sum(-1), 1, atol=1e-5)


def test_labels_of_other_rows_or_another_run_are_refused(tmp_path):
    rows = some_rows()
    store = open_soft_labels(make(tmp_path / "s", rows))
    ids = [rows[i].row_id for i in (4, 1)]
    assert len(store.read("distill", [4, 1], ids)) == 2
    with pytest.raises(UserError, match="Row 1 of split 'distill' is not the row"):
        store.read("distill", [4, 1], [ids[0], ids[0]])
    store.check(proxy="proxy-1", tokenizer="tok-1", template="chatml", top_k=4, temperature=1.0)
    with pytest.raises(UserError) as error:
        store.check(proxy="proxy-2", tokenizer="tok-1", temperature=2.0)
    assert "proxy: 'proxy-1' in the store, 'proxy-2' in this run" in str(error.value)
    assert "temperature: 1.0 in the store, 2.0" in str(error.value)
    assert "tokenizer" not in str(error.value)
    with pytest.raises(IndexError):
        store.read("distill", [10])


def test_only_a_complete_store_opens(tmp_path):
    with pytest.raises(UserError, match="run proxykd score first"):
        open_soft_labels(tmp_path)
    make(tmp_path / "s", some_rows(), finish=False)
    with pytest.raises(UserError, match="not complete"):
        open_soft_labels(tmp_path / "s")
    make(tmp_path / "s", some_rows())
    assert open_soft_labels(tmp_path / "s").num_rows("distill") == 10


def spoilt(folder, change):
    """The store with one array of part 1 changed and its digest updated, past the manifest's."""
    parts = PartFolder(folder / "distill")
    arrays = {name: np.array(array) for name, array in parts.open(1).arrays.items()}
    change(arrays)
    parts.commit(1, arrays)
    with pytest.raises(UserError, match="is damaged"):
        open_soft_labels(folder)
    return SoftLabelStore.unfinished(folder)


def put(name, value, *place):
    def change(arrays):
        arrays[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("ids", 50, 0, 2), "not below the vocabulary"),
        (lambda a: put("ids", a["ids"][0, 0], 0, 1)(a), "occurs twice"),
        (lambda a: put("logps", a["logps"][0, ::-1].copy(), 0)(a), "falling order"),
        (put("logps", -0.05, 0, 0), "more than 1"),
        (put("tail_logps", -0.01, 0), "more than 1"),
        (put("tail_logps", -30, 0), "less than 1"),
        (put("logps", np.nan, 0, 0), "add up|falling"),
        (put("gold_logps", 0.5, 0), "above 0"),
        (put("gold_logps", np.nan, 0), "above 0"),
        (put("offsets", 1, 0), "do not fit together"),
        (lambda a: a.pop("tail_logps"), "no array 'tail_logps'"),
        (lambda a: a.update(ids=a["ids"].astype(np.uint32)), "to the manifest"),
        (lambda a: a.update(ids=a["ids"][:, :3], logps=a["logps"][:, :3]), "to the manifest"),
        (lambda a: a.update(logps=a["logps"].astype(np.float32)), "to the manifest"),
    ],
)
def test_what_is_no_distribution_is_refused(tmp_path, change, message):
    folder = make(tmp_path / "s", some_rows(scale=3.0))
    with pytest.raises(UserError, match=message) as error:
        spoilt(folder, change).read("distill", [4])
    assert "part_00001" in str(error.value)


def test_a_missing_part_is_noticed(tmp_path):
    folder = make(tmp_path / "s", some_rows())
    (folder / "distill" / "part_00001.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        open_soft_labels(folder)
    with pytest.raises(UserError, match="lacks a part"):
        SoftLabelStore.unfinished(folder).read("distill", [0])


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path):
    rows = some_rows()
    whole = make(tmp_path / "whole", rows)
    cut = make(tmp_path / "cut", rows, finish=False)
    (cut / "distill" / "part_00002.safetensors").unlink()
    (cut / "distill" / ".part_00002.safetensors.tmp").write_bytes(b"half")
    make(cut, rows)
    names = [f"distill/part_0000{i}.safetensors" for i in range(3)] + ["manifest.json"]
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((whole / "manifest.json").read_text())["status"] == "complete"


def test_log_probs_that_are_no_numbers_are_not_stored(tmp_path):
    rows = some_rows()
    rows[5].gold_logps[0] = np.nan
    with pytest.raises(UserError, match="not numbers"):
        make(tmp_path / "s", rows)


def test_threads_read_the_same(tmp_path):
    rows = some_rows(count=40)
    store = open_soft_labels(make(tmp_path / "s", rows))

    def read(seed):
        order = np.random.default_rng(seed).permutation(40)
        got = store.read("distill", order, [rows[i].row_id for i in order])
        return all(np.array_equal(g.ids, rows[i].ids) for g, i in zip(got, order, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(16)))


# --- weights --------------------------------------------------------------------------------------


def some_logliks(count=400, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 200, count)
    return -lengths * rng.gamma(8.0, 0.1, count), lengths


@pytest.mark.parametrize("loglik", ["sum", "token_mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_eq_9(loglik, normalize):
    logliks, lengths = some_logliks()
    finished = np.arange(400) % 7 > 0
    found = weights_of(logliks, lengths, finished, loglik=loglik, normalize=normalize)
    values = logliks / lengths if loglik == "token_mean" else logliks
    mean, std = values[finished].mean(), values[finished].std()
    assert found.loglik_mean == pytest.approx(mean, rel=1e-12)
    assert found.loglik_std == pytest.approx(std, rel=1e-12)
    expected = 1 / (1 + np.exp(-(values - mean) / std))
    if normalize:
        expected /= expected.mean()
        assert found.sample_weight.mean() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found.sample_weight, expected, rtol=1e-5)
    correlation = np.corrcoef(expected[finished], lengths[finished])[0, 1]
    assert found.length_correlation == pytest.approx(correlation, abs=1e-6)
    if loglik == "sum":
        assert found.length_correlation < -0.7
    else:
        assert abs(found.length_correlation) < 0.15


def test_far_off_log_likelihoods_keep_their_differences():
    base = np.array([0.0, 1.0, 2.0, 3.0])
    near = weights_of(base, np.ones(4))
    far = weights_of(base * 1e-4 - 4e5, np.ones(4))
    np.testing.assert_allclose(far.sample_weight, near.sample_weight, rtol=1e-4)


def test_weights_at_the_edges():
    same = weights_of(np.full(5, -3.0), np.arange(1, 6))
    np.testing.assert_array_equal(same.sample_weight, 0.5)
    assert same.loglik_std == 0 and same.length_correlation == 0
    normal = weights_of(np.full(5, -3.0), np.arange(1, 6), normalize=True)
    np.testing.assert_array_equal(normal.sample_weight, 1.0)
    logliks, lengths = some_logliks()
    off = weights_of(logliks, lengths, enabled=False, normalize=True)
    np.testing.assert_array_equal(off.sample_weight, 1.0)
    assert off.loglik_mean == pytest.approx(logliks.mean())
    empty = weights_of(np.zeros(0), np.zeros(0, np.int32))
    assert len(empty.sample_weight) == 0 and empty.loglik_mean == 0
    none_finished = weights_of(logliks, lengths, np.zeros(400, bool))
    assert np.isfinite(none_finished.sample_weight).all()
    with pytest.raises(ValueError, match="token_mean"):
        weights_of(logliks, lengths, loglik="mean")
