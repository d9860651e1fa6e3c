"""The analytic teacher: its conditionals, its samples, and KL against enumeration."""

import itertools

import numpy as np
import pytest

from benchmarks.miniature import world as w


@pytest.fixture(scope="module", params=sorted(w.REGIMES))
def worlds(request: pytest.FixtureRequest) -> w.Worlds:
    return w.make_worlds(3, request.param)


def prompt(value: int, *functions: int) -> np.ndarray:
    filled = [w.FIRST_FUNCTION + f for f in functions]
    filled += [w.NO_FUNCTION] * (w.MAX_FUNCTIONS - len(filled))
    return np.array([value, *filled, w.EQUALS], np.int32)


def all_answers(num_functions: int) -> np.ndarray:
    """All answers to a prompt with this number of functions, padded with end tokens."""
    values = range(w.NUM_VALUES)
    connectors = range(w.FIRST_CONNECTOR, w.END)
    answers = [(w.FIRST_STYLE, value) for value in values]
    places = [values if i % 2 == 0 else connectors for i in range(2 * num_functions - 1)]
    for style in range(w.FIRST_STYLE + 1, w.FIRST_CONNECTOR):
        answers += [(style, *rest) for rest in itertools.product(*places)]
    table = np.full((len(answers), w.MAX_ANSWER), w.END, np.int32)
    for row, answer in zip(table, answers, strict=True):
        row[: len(answer)] = answer
    return table


def sequence_probs(world: w.World, prompt_P: np.ndarray, answers_NT: np.ndarray) -> np.ndarray:
    """The probability of each answer, without the conditionals of the code under test."""
    functions = [t - w.FIRST_FUNCTION for t in prompt_P[1:-1] if t != w.NO_FUNCTION]
    probs = []
    for answer in answers_NT:
        style = answer[0] - w.FIRST_STYLE
        prob = world.styles_MS[len(functions) - 1, style]
        if style == 0:
            marginal = np.eye(w.NUM_VALUES)[prompt_P[0]]
            for function in functions:
                marginal = marginal @ world.results_FAA[function]
            skill = world.direct_skill if len(functions) > 1 else 1.0
            prob *= skill * marginal[answer[1]] + (1 - skill) / w.NUM_VALUES
        else:
            value = prompt_P[0]
            for index, function in enumerate(functions):
                result = answer[1 + 2 * index]
                prob *= world.results_FAA[function, value, result]
                value = result
                if index + 1 < len(functions):
                    connector = answer[2 + 2 * index] - w.FIRST_CONNECTOR
                    prob *= world.connectors_SC[style, connector]
        probs.append(prob)
    return np.array(probs)


def chain_logps(world: w.World, prompt_P: np.ndarray, answers_NT: np.ndarray) -> np.ndarray:
    prompts = np.repeat(prompt_P[None], len(answers_NT), axis=0)
    probs_NTV = w.answer_probs(world, prompts, answers_NT)
    return np.log(np.take_along_axis(probs_NTV, answers_NT[..., None], axis=-1)[..., 0]).sum(axis=1)


def test_the_symbols_are_46() -> None:
    assert w.VOCAB_SIZE == 46
    assert len(set(w.SYMBOLS)) == 46
    assert (w.SYMBOLS[w.END], w.SYMBOLS[w.EQUALS], w.SYMBOLS[w.NO_FUNCTION]) == ("</s>", "=", ".")


def test_conditionals_sum_to_one_at_every_place(worlds: w.Worlds) -> None:
    prompts = w.PromptPool(0).take(300)
    answers = w.sample_answers(worlds.teacher, prompts, np.random.default_rng(0))
    for world in (worlds.teacher, worlds.public):
        probs_NTV = w.answer_probs(world, prompts, answers)
        np.testing.assert_allclose(probs_NTV.sum(axis=-1), 1, atol=1e-12)
        assert probs_NTV.min() >= 0


@pytest.mark.parametrize("num_functions", [1, 2, 3])
def test_the_chain_rule_gives_the_probability_of_every_answer(
    worlds: w.Worlds, num_functions: int
) -> None:
    one = prompt(4, *range(num_functions))
    answers = all_answers(num_functions)
    expected = sequence_probs(worlds.teacher, one, answers)
    np.testing.assert_allclose(expected.sum(), 1, atol=1e-9)
    got = np.exp(chain_logps(worlds.teacher, one, answers))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("num_functions", [1, 2, 3])
def test_sum_of_conditional_kls_is_the_kl_of_sequences(num_functions: int) -> None:
    """The KL of whole answers is the expected sum over positions of the next token's KL."""
    worlds = w.make_worlds(5, "fmt")
    one = prompt(7, *range(3, 3 + num_functions))
    answers = all_answers(num_functions)
    probs = sequence_probs(worlds.teacher, one, answers)
    others = sequence_probs(worlds.public, one, answers)
    expected = (probs * np.log(probs / others)).sum()
    prompts = np.repeat(one[None], len(answers), axis=0)
    p_NTV = w.answer_probs(worlds.teacher, prompts, answers)
    q_NTV = w.answer_probs(worlds.public, prompts, answers)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p_NTV > 0, p_NTV * np.log(p_NTV / q_NTV), 0)
    np.testing.assert_allclose((probs[:, None, None] * terms).sum(), expected, rtol=1e-9)


def test_samples_have_the_frequencies_of_the_process() -> None:
    worlds = w.make_worlds(0, "fmt")
    one, num = prompt(2, 5, 11), 200_000
    answers = all_answers(2)
    probs = sequence_probs(worlds.teacher, one, answers)
    prompts = np.repeat(one[None], num, axis=0)
    drawn = w.sample_answers(worlds.teacher, prompts, np.random.default_rng(1))
    known = {answer.tobytes(): index for index, answer in enumerate(answers)}
    counts = np.bincount([known[row.tobytes()] for row in drawn], minlength=len(answers))
    # Pearson's statistic over the m answers whose expected count is large enough; its standard
    # deviation is sqrt(2 m).
    expected = probs * num
    enough = expected > 20
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    assert abs(statistic - enough.sum()) < 5 * np.sqrt(2 * enough.sum())


def test_greedy_answers_are_the_most_probable_tokens() -> None:
    worlds = w.make_worlds(1, "fmt")
    prompts = w.PromptPool(1).take(50)
    answers = w.greedy_answers(worlds.teacher, prompts)
    probs_NTV = w.answer_probs(worlds.teacher, prompts, answers)
    np.testing.assert_array_equal(probs_NTV.argmax(axis=-1), answers)
    assert np.all(answers[:, 0] != w.FIRST_STYLE), "the teacher prefers a chain of thought"


def test_truth_is_the_composition() -> None:
    worlds = w.make_worlds(2, "fmt")
    truth = worlds.truth_FA
    prompts = np.stack([prompt(3, 1), prompt(3, 1, 9), prompt(3, 1, 9, 20)])
    step1 = truth[1, 3]
    step2 = truth[9, step1]
    expected = [step1, step2, truth[20, step2]]
    np.testing.assert_array_equal(w.true_results(truth, prompts), expected)


def test_a_pool_never_hands_out_a_prompt_twice() -> None:
    pool = w.PromptPool(0)
    taken = np.concatenate([pool.take(768), pool.take(2200), pool.take(2700)])
    assert len(np.unique(w.encode_prompts(taken))) == len(taken)
    shares = np.bincount(w.count_functions(taken), minlength=4)[1:] / len(taken)
    np.testing.assert_allclose(shares, w.PromptPool.shares, atol=0.01)
    with pytest.raises(ValueError, match="are left"):
        pool.take(10_000)


def test_public_prompts_avoid_the_excluded() -> None:
    excluded = w.encode_prompts(w.PromptPool(0).take(768))
    drawn = w.random_prompts(np.random.default_rng(0), 20_000, excluded)
    assert len(drawn) == 20_000
    assert not np.isin(w.encode_prompts(drawn), excluded).any()
    counts = np.bincount(w.count_functions(drawn), minlength=4)[1:]
    assert np.all(np.abs(counts / len(drawn) - 1 / 3) < 0.03)


def test_codes_of_prompts_are_distinct_and_decode_covers_all() -> None:
    codes = w.encode_prompts(w.decode_prompts(np.arange(5760), 2))
    assert len(np.unique(codes)) == 5760


def test_final_values() -> None:
    end, style = w.END, w.FIRST_STYLE
    answers = [[style, 7, end], [style, 7], [style, 3, w.FIRST_CONNECTOR, end], [end], [style, 1]]
    got = w.final_values([np.array(answer) for answer in answers])
    np.testing.assert_array_equal(got, [7, -1, -1, -1, -1])


def test_a_broken_prefix_is_refused() -> None:
    worlds = w.make_worlds(0, "fmt")
    one = prompt(2, 5, 11)[None]
    with pytest.raises(ValueError, match="style"):
        w.next_token_probs(worlds.teacher, one, np.array([[5]], np.int32))
    broken = np.array([[w.FIRST_STYLE + 1, w.END, w.FIRST_CONNECTOR]], np.int32)
    with pytest.raises(ValueError, match="value"):
        w.next_token_probs(worlds.teacher, one, broken)


def test_regimes_differ_as_they_say() -> None:
    for name, regime in w.REGIMES.items():
        worlds = w.make_worlds(0, name)
        np.testing.assert_allclose(worlds.public.styles_MS[:, 0], regime.direct)
        uniform = np.isclose(worlds.public.results_FAA, 0.1).all(axis=(1, 2)).sum()
        assert uniform == regime.unknown_functions
    modes = [w.make_worlds(0, name).teacher.results_FAA for name in w.REGIMES]
    np.testing.assert_array_equal(modes[0], modes[1])  # the regime only changes the public text


def test_the_teacher_is_good_but_not_perfect() -> None:
    for seed in range(3):
        worlds = w.make_worlds(seed, "fmt")
        prompts = w.PromptPool(seed).take(1000)
        greedy = w.final_values(list(w.greedy_answers(worlds.teacher, prompts)))
        accuracy = (greedy == w.true_results(worlds.truth_FA, prompts)).mean()
        assert 0.75 < accuracy < 0.95
