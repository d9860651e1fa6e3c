"""The sampler: exact distributions, draws that depend on keys alone, stops and budgets."""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from proxykd_jax.config import AxesConfig
from proxykd_jax.errors import UserError
from proxykd_jax.generation import cpu_schedule, decode, sampler
from proxykd_jax.generation.cpu_schedule import next_slots
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, sample, stream
from proxykd_jax.generation.shapes import prompt_bucket, row_counts, slot_bucket
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.random_keys import row_keys
from tests.generation.tiny import full_logps, some_prompts, tiny_model

END = 3


def run(model, prompts, row_ids, budgets, **changes):
    config, *weights = model
    draw = {"temperature": 1.0, "top_p": 1.0, "vocab_size": config.vocab_size,
            "end_token_ids": [END], "mixing": None}  # fmt: skip
    draw |= {name: changes.pop(name) for name in draw.keys() & changes.keys()}
    options = {"seed": 5, "round_index": 1, "batch_size": 8, **changes}
    asked = [Prompt(*each) for each in zip(prompts, row_ids, budgets, strict=True)]
    return sample(tuple(weights), asked, config=config, settings=DrawSettings(**draw), **options)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.finished == b.finished
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_a_mixture_is_drawn_from_token_by_token():
    """Two models with separate caches: the joint distribution of two tokens, and log-probs."""
    first, second = tiny_model(vocab_size=12), tiny_model(vocab_size=12, num_layers=1)
    prompt, number, share = np.array([4, 7, 1], np.int32), 6000, 0.4

    def mixed(tokens):
        p, q = np.exp(full_logps(second, tokens)[-1]), np.exp(full_logps(first, tokens)[-1])
        return share * p + (1 - share) * q

    samples = run(
        first, [prompt] * number, [str(i) for i in range(number)], [2] * number,
        end_token_ids=[], batch_size=512, other=second[1:], mixing=decode.Mixing(second[0], share),
    )  # fmt: skip
    joint = np.stack([mixed(prompt)[a] * mixed([*prompt, a]) for a in range(12)]).ravel()
    assert joint.sum() == pytest.approx(1)
    counts = np.bincount([12 * int(s.tokens[0]) + int(s.tokens[1]) for s in samples], minlength=144)
    common = joint * number >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(joint[common], joint[~common].sum()) * number
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    for s in samples[:5]:
        logps = [
            np.log(mixed(prompt)[s.tokens[0]]),
            np.log(mixed([*prompt, s.tokens[0]])[s.tokens[1]]),
        ]
        np.testing.assert_allclose(s.logps, logps, atol=1e-4)
    # A check of the test: the same counts fit neither model alone.
    for model in (first, second):
        one = np.exp(full_logps(model, prompt)[-1])
        seen = np.bincount([int(s.tokens[0]) for s in samples], minlength=12)
        assert stats.chisquare(seen, one / one.sum() * number).pvalue < 1e-4
    with pytest.raises(ValueError, match="together"):
        run(first, [prompt], ["a"], [2], other=second[1:])


def test_a_mixture_ends_rows_and_shrinks_batches_like_one_model():
    model = tiny_model()
    prompts, row_ids = some_prompts(40)
    budgets = [1 + i % 9 for i in range(40)]
    alone = run(model, prompts, row_ids, budgets, batch_size=32)
    config, params, adapter = model
    itself = {"other": (params, adapter), "mixing": decode.Mixing(config, 0.3)}
    assert_same(run(model, prompts, row_ids, budgets, batch_size=32, **itself), alone)


def test_draws_follow_the_softmax():
    """The first two tokens of many rows are compared with the exact joint distribution."""
    model = tiny_model(vocab_size=12)
    prompt = np.array([4, 7, 1], np.int32)
    number = 6000
    samples = run(
        model, [prompt] * number, [str(i) for i in range(number)], [2] * number,
        end_token_ids=[], batch_size=512,
    )  # fmt: skip
    first = np.exp(full_logps(model, prompt)[-1])
    joint = np.stack(
        [first[a] * np.exp(full_logps(model, [*prompt, a])[-1]) for a in range(12)]
    ).ravel()
    counts = np.bincount([12 * int(s.tokens[0]) + int(s.tokens[1]) for s in samples], minlength=144)
    common = joint * number >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(joint[common], joint[~common].sum()) * number
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    # A check of the test: the same counts do not fit if the temperature changes by 10 %.
    tempered = joint**1.1 / (joint**1.1).sum()
    wrong = np.append(tempered[common], tempered[~common].sum()) * number
    assert stats.chisquare(observed, wrong).pvalue < 1e-4


def test_temperature_and_top_p_follow_the_exact_nucleus():
    model = tiny_model(vocab_size=12)
    prompt = np.array([9, 2], np.int32)
    number, temperature, top_p = 4000, 1.7, 0.8
    logps = full_logps(model, prompt)[-1] / temperature
    probs = np.exp(logps) / np.exp(logps).sum()
    order = np.argsort(-probs, kind="stable")
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
    kept = np.zeros(12, bool)
    kept[order[:size]] = True
    assert 1 < size < 12
    samples = run(
        model, [prompt] * number, [str(i) for i in range(number)], [1] * number,
        end_token_ids=[], batch_size=512, temperature=temperature, top_p=top_p,
    )  # fmt: skip
    counts = np.bincount([int(s.tokens[0]) for s in samples], minlength=12)
    assert (counts[~kept] == 0).all()
    expected = probs[kept] / probs[kept].sum() * number
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-4
    # The log-probs are still those of the full softmax at temperature 1.
    exact = full_logps(model, prompt)[-1]
    for s in samples[:50]:
        np.testing.assert_allclose(s.logps, exact[s.tokens], atol=1e-5)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.75, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(20, 30)).astype(np.float32) * 3
    scores[0] = 0.0  # all tied
    scores[1, :5] = -np.inf
    kept = np.asarray(decode.nucleus(jnp.asarray(scores), top_p))
    for row, row_kept in zip(scores, kept, strict=True):
        probs = np.exp(row - row.max(), dtype=np.float64)
        probs /= probs.sum()
        order = np.argsort(-row, kind="stable")
        size = row_kept.sum()
        assert row_kept[order[:size]].all()
        assert probs[order[:size]].sum() >= top_p - 1e-6
        assert size == 1 or probs[order[: size - 1]].sum() < top_p + 1e-6


def test_frozen_weights_in_bfloat16_sample_what_the_training_forward_gives():
    config, params, adapter = tiny_model()
    model = (config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), adapter)
    prompts, row_ids = some_prompts(9)
    samples = run(model, prompts, row_ids, [12] * 9)
    for prompt, s in zip(prompts, samples, strict=True):
        logps = full_logps(model, np.concatenate([prompt, s.tokens]))
        places = len(prompt) - 1 + np.arange(len(s.tokens))
        # bfloat16 has eight bits, and the two passes round at different operations.
        np.testing.assert_allclose(s.logps, logps[places, s.tokens], atol=0.15)


def test_greedy_is_the_argmax_of_the_training_forward():
    model = tiny_model()
    prompts, row_ids = some_prompts(11)
    samples = run(model, prompts, row_ids, [16] * 11, temperature=0.0)
    assert any(len(s.tokens) > 5 for s in samples)
    for prompt, s in zip(prompts, samples, strict=True):
        logps = full_logps(model, [*prompt, *s.tokens])[len(prompt) - 1 : -1]
        best = np.sort(logps, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-4
        np.testing.assert_array_equal(logps.argmax(-1)[clear], s.tokens[clear])


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 5, "sliding_layers": (0,)}, {"tie_embeddings": True}]
)
def test_log_probs_are_those_of_the_training_forward(changes):
    model = tiny_model(**changes)
    prompts, row_ids = some_prompts(9)
    for prompt, s in zip(prompts, run(model, prompts, row_ids, [16] * 9), strict=True):
        exact = full_logps(model, [*prompt, *s.tokens])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(s.logps, exact[np.arange(len(s.tokens)), s.tokens], atol=2e-5)


def test_batch_order_and_padding_change_nothing():
    model = tiny_model()
    prompts, row_ids = some_prompts(21, longest=30)
    budgets = [int(b) for b in np.random.default_rng(3).integers(1, 17, 21)]
    whole = run(model, prompts, row_ids, budgets)
    order = np.random.default_rng(4).permutation(21)
    # 32 rows shrink to 16 and 8 while they finish.
    shuffled = run(
        model,
        [prompts[i] for i in order],
        [row_ids[i] for i in order],
        [budgets[i] for i in order],
        batch_size=32,
    )
    assert_same([whole[i] for i in order], shuffled)
    for i in (0, 7, 20):
        assert_same([whole[i]], run(model, [prompts[i]], [row_ids[i]], [budgets[i]]))
    # A larger budget, of this row or of others, can lengthen an answer and never alters it.
    longer = run(model, prompts, row_ids, [32] * 21)
    for a, b in zip(whole, longer, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens[: len(a.tokens)])


@pytest.mark.parametrize("mixed", [False, True])
def test_short_prompts_that_are_run_apart_draw_the_same(monkeypatch, mixed):
    model = tiny_model(max_positions=256, sliding_window=40, sliding_layers=(0,))
    second = tiny_model(max_positions=256, num_layers=1)
    other = {}
    if mixed:
        other = {"other": second[1:], "mixing": decode.Mixing(second[0], 0.4)}
    rng = np.random.default_rng(8)
    lengths = [5, 100, 17, 8, 30, 9, 71, 6, 12, 5]  # 16 and 32, and 128: of these two rows
    prompts = [rng.integers(4, 12, length).astype(np.int32) for length in lengths]
    row_ids = [str(i) for i in range(10)]
    budgets = [30, 9, 1, 60, 4, 30, 75, 8, 2, 30]
    joined = []
    monkeypatch.setattr(
        cpu_schedule, "join_rows", lambda *a, **k: joined.append(k) or join_rows(*a, **k)
    )
    join_rows = decode.join_rows
    whole = run(model, prompts, row_ids, budgets, batch_size=16, **other)
    assert not joined
    monkeypatch.setattr(cpu_schedule, "_WORTH_A_PROGRAM", 1.0)
    apart = run(model, prompts, row_ids, budgets, batch_size=16, **other)
    # The longest prompt has 100 tokens; its row of 128 loses some of its padding.
    assert [found["filled"] for found in joined] == [112]
    assert_same(whole, apart)


def test_prompts_are_cut_where_the_most_padding_is_spared():
    counts = [32, 24, 16, 12, 8]
    lengths = [10] * 14 + [60] * 6 + [200] * 4
    # The groups are 16 rows of 16 and 12 of 256. 24 of 64 and 8 of 256 would cost more.
    assert cpu_schedule._cut_by_length(lengths, counts, 24 * 256, 1e9) == 14
    # The groups are 32 rows of 64 and 8 of 256. 16 of 16 and 16 of 256 would cost more.
    more = [10] * 14 + [60] * 12 + [200] * 2
    assert cpu_schedule._cut_by_length(more, counts, 32 * 256, 1e9) == 26
    assert cpu_schedule._cut_by_length(lengths, counts, 24 * 256, 1e3) is None
    assert cpu_schedule._cut_by_length([10] * 20, counts, 24 * 16, 1e9) is None


@pytest.mark.parametrize("one_cpu", [True, False])
def test_long_answers_get_more_slots(monkeypatch, one_cpu):
    """The cache grows through 64, 96, 128 and 192 slots, and some rows end on the way.

    Layers are stacked, or each has its own cache.
    """
    monkeypatch.setattr(cpu_schedule, "_is_one_cpu", lambda params: one_cpu)
    model = tiny_model(max_positions=256)
    prompts, row_ids = some_prompts(12)
    budgets = [160, 3, 47, 48, 49, 80, 81, 112, 130, 159, 1, 160]
    samples = run(model, prompts, row_ids, budgets, end_token_ids=[], batch_size=16)
    for prompt, budget, s in zip(prompts, budgets, samples, strict=True):
        assert len(s.tokens) == budget
        exact = full_logps(model, [*prompt, *s.tokens])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(s.logps, exact[np.arange(budget), s.tokens], atol=5e-5)


def test_cores_answer_parts_of_a_batch(monkeypatch):
    """Two threads draw what one draws, and after an error no further part starts."""
    model = tiny_model()
    prompts, row_ids = some_prompts(90)
    budgets = [int(b) for b in np.random.default_rng(3).integers(1, 17, 90)]
    counted = []

    def count_parts(*arguments):
        counted.append(len(arguments[0]))
        if len(counted) == fails_at:
            raise UserError("damaged")
        return prompt_batch(*arguments)

    prompt_batch = sampler._prompt_batch
    monkeypatch.setattr(sampler, "_prompt_batch", count_parts)
    found = {}
    for cores, parts in (
        (1, [32, 32, 26]),
        (2, [16] * 4 + [13] * 2),
        (3, [11, 11, 10] * 2 + [9, 9, 8]),
    ):
        counted, fails_at = [], 0
        monkeypatch.setattr(cpu_schedule, "_cores", lambda batch_size, cores=cores: cores)
        found[cores] = run(model, prompts, row_ids, budgets, batch_size=32)
        assert sorted(counted, reverse=True) == sorted(parts, reverse=True)
        assert_same(found[cores], found[1])
    counted, fails_at = [], 2
    with pytest.raises(UserError, match="damaged"):
        run(model, prompts, row_ids, budgets, batch_size=32)
    assert len(counted) < 8


def test_a_batch_that_cannot_shrink_comes_to_its_end(monkeypatch):
    """16 devices hold 16 rows, of which half are finished, so the batch cannot shrink."""
    model = tiny_model()
    prompts, row_ids = some_prompts(16)
    budgets = [2] * 9 + [16] * 7
    expected = run(model, prompts, row_ids, budgets)
    monkeypatch.setattr(sampler, "row_ways", lambda axes: 16)
    samples = run(model, prompts, row_ids, budgets, batch_size=16, mesh=make_mesh(AxesConfig()))
    assert_same(samples, expected)


def test_keys_differ_by_seed_round_row_and_position():
    model = tiny_model()
    prompts, _ = some_prompts(1)
    twelve = [prompts[0]] * 12
    ids = [str(i) for i in range(12)]
    options = {"end_token_ids": []}
    base = run(model, twelve, ids, [12] * 12, **options)
    assert len({tuple(s.tokens) for s in base}) == 12
    other_round = run(model, twelve, ids, [12] * 12, round_index=2, **options)
    other_seed = run(model, twelve, ids, [12] * 12, seed=6, **options)
    for a, b, c in zip(base, other_round, other_seed, strict=True):
        assert tuple(a.tokens) != tuple(b.tokens) != tuple(c.tokens)
    same_ids = run(model, twelve, ["x"] * 12, [12] * 12, **options)
    assert len({tuple(s.tokens) for s in same_ids}) == 1
    keys = row_keys(jnp.uint32(1), jnp.uint32(2), jnp.arange(8, dtype="uint32")[:, None])
    data = np.asarray(jax.random.key_data(keys))
    assert len(np.unique(data, axis=0)) == 8


def test_stop_tokens_and_budgets():
    model = tiny_model()
    prompts, row_ids = some_prompts(24)
    budgets = [0, 1, 2, 3, 7, 16] * 4
    ends = [3, 11, 17, 23]
    samples = run(model, prompts, row_ids, budgets, end_token_ids=ends)
    free = run(model, prompts, row_ids, budgets, end_token_ids=[])
    for s, f, budget in zip(samples, free, budgets, strict=True):
        assert s.tokens.dtype == np.int32 and s.logps.dtype == np.float32
        assert len(s.tokens) == len(s.logps) <= budget
        assert len(f.tokens) == budget and not f.finished
        is_end = np.isin(s.tokens, ends)
        assert not is_end[:-1].any()
        assert s.finished == (len(s.tokens) > 0 and bool(is_end[-1]))
        assert s.finished or len(s.tokens) == budget
        # A stopped answer is a prefix of the answer that would be drawn without the stop.
        np.testing.assert_array_equal(s.tokens, f.tokens[: len(s.tokens)])
    assert 0 < sum(s.finished for s in samples) < len(samples)


def test_a_stream_shows_the_answer_that_is_drawn_at_once():
    model = tiny_model(vocab_size=12)
    prompt = np.array([4, 7, 1], np.int32)
    settings = DrawSettings(1.0, 1.0, 12, (END,))
    options = {"config": model[0], "settings": settings, "seed": 5, "round_index": 1}
    lengths = set()
    for name in "abc":
        looks = list(stream(model[1:], Prompt(prompt, name, 20), every=4, **options))
        (whole,) = run(model, [prompt], [name], [20], batch_size=1)
        assert_same([looks[-1]], [whole])
        for number, look in enumerate(looks[:-1]):
            np.testing.assert_array_equal(look.tokens, whole.tokens[: 1 + 4 * number])
        lengths.add(len(looks))
    assert len(lengths) > 1


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = tiny_model()
    prompts, row_ids = some_prompts(40, vocab_size=15)
    samples = run(model, prompts, row_ids, [16] * 40, end_token_ids=[], vocab_size=15)
    assert max(int(s.tokens.max()) for s in samples) == 14
    exact = full_logps(model, [*prompts[0], *samples[0].tokens])[len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(samples[0].logps, exact[np.arange(16), samples[0].tokens], atol=2e-5)
    greedy = run(model, prompts, row_ids, [16] * 40, vocab_size=15, temperature=0.0)
    assert all((s.tokens < 15).all() for s in greedy)


def test_few_programs_are_compiled():
    model = tiny_model(vocab_size=25)
    before = decode.prefill._cache_size(), decode.decode._cache_size()
    prompts, row_ids = some_prompts(64, longest=32)
    for seed in range(4):  # the sizes that occur depend on chance
        run(model, prompts, row_ids, [16] * 64, batch_size=32, seed=seed)
    first = decode.prefill._cache_size(), decode.decode._cache_size()
    assert first[0] - before[0] <= 2  # prompts are padded to 16 or 32
    assert first[1] - before[1] <= 10  # each length occurs in batches of 32, 24, 16, 12 and 8
    run(model, prompts, [f"again {i}" for i in row_ids], [16] * 64, batch_size=32, seed=9)
    assert (decode.prefill._cache_size(), decode.decode._cache_size()) == first


def test_padding_stays_within_the_positions_that_dynamic_rope_allows():
    from proxykd_jax.models.config import RopeConfig

    model = tiny_model(rope=RopeConfig(kind="dynamic", factor=2.0), max_positions=40)
    prompts, row_ids = some_prompts(3, longest=33)
    prompts.append(np.ones(33, np.int32))
    samples = run(model, prompts, [*row_ids, "last"], [7] * 4, end_token_ids=[])
    assert [len(s.tokens) for s in samples] == [7] * 4


def test_a_mesh_changes_nothing(monkeypatch):
    model = tiny_model()
    prompts, row_ids = some_prompts(5)
    placed = []

    put_rows = sampler.put_rows
    monkeypatch.setattr(
        sampler, "put_rows", lambda batch, mesh: placed.append(batch) or put_rows(batch, mesh)
    )
    mesh = make_mesh(AxesConfig())
    on_mesh = run(model, prompts, row_ids, [9] * 5, mesh=mesh)
    assert len(placed) == 1
    assert_same(on_mesh, run(model, prompts, row_ids, [9] * 5))


def test_other_processes_draw_the_same(tmp_path):
    prompts, row_ids = some_prompts(6)
    here = run(tiny_model(), prompts, row_ids, [15] * 6)
    code = (
        "import json, os\n"
        "os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "from tests.generation.test_sampler import run, some_prompts, tiny_model\n"
        "prompts, row_ids = some_prompts(6)\n"
        "answers = run(tiny_model(), prompts, row_ids, [15] * 6)\n"
        "print(json.dumps([[s.tokens.tolist(), s.logps.tolist()] for s in answers]))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": root},
    )  # fmt: skip
    there = json.loads(result.stdout.splitlines()[-1])
    assert there == [[s.tokens.tolist(), s.logps.tolist()] for s in here]


def test_what_cannot_be_sampled_is_refused():
    model = tiny_model()
    prompts, row_ids = some_prompts(2)
    with pytest.raises(ValueError, match="no token"):
        run(model, [prompts[0], np.zeros(0, np.int32)], row_ids, [3, 3])
    with pytest.raises(ValueError, match="top_p"):
        run(model, prompts, row_ids, [3, 3], top_p=0.0)
    with pytest.raises(ValueError, match="batch_size"):
        run(model, prompts, row_ids, [3, 3], batch_size=0)
    assert run(model, [], [], []) == []
    config, params, adapter = model
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(UserError, match="not numbers"):
        run((config, broken, adapter), prompts, row_ids, [3, 3])


def test_buckets_hold_what_they_are_asked_for_without_much_waste():
    for bucket, most in ((prompt_bucket, 2.0), (slot_bucket, 1.25)):
        sizes = [bucket(n) for n in range(1, 3000)]
        assert sizes == sorted(sizes)
        assert all(size >= n for n, size in enumerate(sizes, 1))
        assert all(size <= most * n for n, size in enumerate(sizes, 1) if n > 64)
        assert len(set(sizes)) <= 30


@pytest.mark.parametrize("between", [True, False])
def test_slots_grow_by_as_much_as_is_worth_a_program(between):
    for most in (40, 100, 513, 2048):
        sizes = [next_slots(16, most, between)]
        while sizes[-1] < most:
            sizes.append(next_slots(sizes[-1], most, between))
        assert sizes[-1] == most and len(sizes) <= (11 if between else 6)
        assert all(b >= a + 32 or b == most for a, b in itertools.pairwise(sizes))
        assert all(b <= (1.5 if between else 2) * a + 32 for a, b in itertools.pairwise(sizes))


def test_row_counts_divide_and_shrink():
    assert row_counts(64, 1, between=True) == [64, 48, 32, 24, 16, 12, 8]
    assert row_counts(64, 1, between=False) == [64, 32, 16, 8]
    assert row_counts(48, 16, between=True) == [48]
    assert row_counts(5, 1, between=True) == [5]
