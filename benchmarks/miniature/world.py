"""The analytic teacher composes functions, with or without a chain of thought.

A prompt is ``a f1 f2 f3 =``: a value and one to three functions (``.`` fills the rest). An answer
is ``style r1 c r2 c r3 </s>``: a style token, the intermediate values with connectors between
them, and the end token. Style 0 answers at once, ``s0 r </s>``, and is then often wrong. Every
conditional is known exactly, so the KL from the teacher to any model is exact. The correct result
of a prompt is known as well, and the teacher is not always right.

Axes: N prompts, P tokens of a prompt (5), T tokens of an answer (at most 7), V vocabulary (46),
F functions (24), A values (10), S styles (4), C connectors (4), M number of functions less one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_VALUES, NUM_FUNCTIONS, MAX_FUNCTIONS, NUM_STYLES, NUM_CONNECTORS = 10, 24, 3, 4, 4
PROMPT_LENGTH, MAX_ANSWER = MAX_FUNCTIONS + 2, 2 * MAX_FUNCTIONS + 1

SYMBOLS: tuple[str, ...] = (
    *(str(value) for value in range(NUM_VALUES)),
    *(f"f{function}" for function in range(NUM_FUNCTIONS)),
    ".",
    "=",
    *(f"s{style}" for style in range(NUM_STYLES)),
    *(f"c{connector}" for connector in range(NUM_CONNECTORS)),
    "</s>",
    "<unk>",
)
VOCAB_SIZE = len(SYMBOLS)
FIRST_FUNCTION = NUM_VALUES
NO_FUNCTION = FIRST_FUNCTION + NUM_FUNCTIONS
EQUALS = NO_FUNCTION + 1
FIRST_STYLE = EQUALS + 1
FIRST_CONNECTOR = FIRST_STYLE + NUM_STYLES
END = FIRST_CONNECTOR + NUM_CONNECTORS
UNKNOWN = END + 1

NOISE_LEVELS = (0.1, 0.35, 0.6)
TEACHER_MISTAKES = 0.06  # This share of the table's entries has a wrong most probable value.
TEACHER_DIRECT = 0.05  # This share of the answers has no chain of thought.
DIRECT_SKILL = 0.5  # The exact marginal has this weight in a direct answer; a guess has the rest.


@dataclass(frozen=True)
class Regime:
    """The differences between the teacher and the public text of the pre-training.

    Attributes:
      altered: share of table entries that are drawn anew.
      unknown_functions: number of functions whose results are uniform noise in the public text.
      direct: share of public answers without a chain of thought.
      student_steps: pre-training steps of the student.
    """

    altered: float
    unknown_functions: int
    direct: float
    student_steps: int


REGIMES: dict[str, Regime] = {
    "weak": Regime(altered=0.25, unknown_functions=6, direct=0.30, student_steps=1000),
    "strong": Regime(altered=0.08, unknown_functions=1, direct=0.30, student_steps=250),
    "fmt": Regime(altered=0.08, unknown_functions=1, direct=0.65, student_steps=250),
}


@dataclass(frozen=True)
class World:
    """A process that answers prompts.

    Attributes:
      results_FAA: probability of each result of a function at a value.
      styles_MS: probability of each style by the number of functions.
      connectors_SC: probability of each connector by style.
      direct_skill: weight of the exact marginal in a direct answer to two or more functions.
    """

    results_FAA: np.ndarray
    styles_MS: np.ndarray
    connectors_SC: np.ndarray
    direct_skill: float = DIRECT_SKILL


@dataclass(frozen=True)
class Worlds:
    """The teacher, the public text, and the correct results ``truth_FA``."""

    teacher: World
    public: World
    truth_FA: np.ndarray


def make_worlds(seed: int, regime: str) -> Worlds:
    """The worlds of a seed.

    Args:
      seed: the seed of everything that is drawn.
      regime: a name in ``REGIMES``.

    Raises:
      KeyError: the regime is unknown.
    """
    settings = REGIMES[regime]
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    shape = (NUM_FUNCTIONS, NUM_VALUES)
    truth_FA = rng.integers(NUM_VALUES, size=shape)
    mode_FA = _other_values(truth_FA, rng.random(shape) < TEACHER_MISTAKES, rng)
    noise_FA = rng.choice(NOISE_LEVELS, size=shape)
    teacher = World(
        results_FAA=_noisy_table(mode_FA, noise_FA),
        styles_MS=_styles(TEACHER_DIRECT, rng),
        connectors_SC=_rows(NUM_STYLES, NUM_CONNECTORS, rng),
    )
    altered_FA = rng.random(shape) < settings.altered
    public_mode_FA = _other_values(mode_FA, altered_FA, rng)
    public_noise_FA = np.where(altered_FA, rng.choice(NOISE_LEVELS, size=shape), noise_FA)
    results_FAA = _noisy_table(public_mode_FA, public_noise_FA)
    unknown = rng.permutation(NUM_FUNCTIONS)[: settings.unknown_functions]
    results_FAA[unknown] = 1 / NUM_VALUES
    public = World(
        results_FAA=results_FAA,
        styles_MS=_styles(settings.direct, rng),
        connectors_SC=_rows(NUM_STYLES, NUM_CONNECTORS, rng),
    )
    return Worlds(teacher=teacher, public=public, truth_FA=truth_FA)


def _other_values(table: np.ndarray, where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shift = rng.integers(1, NUM_VALUES, size=table.shape)
    return np.where(where, (table + shift) % NUM_VALUES, table)


def _noisy_table(mode_FA: np.ndarray, noise_FA: np.ndarray) -> np.ndarray:
    """One half of the noise goes to the two neighbours of the mode, the other to all values."""
    eye = np.eye(NUM_VALUES)
    neighbours = (np.roll(eye, 1, axis=1) + np.roll(eye, -1, axis=1)) / 2
    spread = 0.5 * neighbours + 0.5 / NUM_VALUES
    noise = noise_FA[..., None]
    return (1 - noise) * eye[mode_FA] + noise * spread[mode_FA]


def _styles(direct: float, rng: np.random.Generator) -> np.ndarray:
    chain = _rows(MAX_FUNCTIONS, NUM_STYLES - 1, rng) * (1 - direct)
    return np.concatenate([np.full((MAX_FUNCTIONS, 1), direct), chain], axis=1)


def _rows(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffled geometric probabilities, so that each row has a clear favourite."""
    favour = 0.5 ** np.arange(columns)
    return np.stack([rng.permutation(favour / favour.sum()) for _ in range(rows)])


# --- prompts --------------------------------------------------------------------------------------


class PromptPool:
    """Hands out distinct prompts.

    There are only 240 prompts with one function. ``shares`` keeps them rare, so that a few thousand
    distinct prompts can be drawn.
    """

    shares = (0.03, 0.485, 0.485)

    def __init__(self, seed: int) -> None:
        rng = np.random.Generator(np.random.PCG64([seed, 2]))
        sizes = [NUM_VALUES * NUM_FUNCTIONS**count for count in range(1, MAX_FUNCTIONS + 1)]
        self._rng = rng
        self._waiting = [rng.permutation(size) for size in sizes]

    def take(self, count: int) -> np.ndarray:
        """Returns int32 ``[count, P]`` new prompts, in random order.

        Raises:
          ValueError: the pool has fewer prompts left.
        """
        numbers = [round(count * share) for share in self.shares[:-1]]
        numbers.append(count - sum(numbers))
        taken = []
        for index, number in enumerate(numbers):
            if number > len(self._waiting[index]):
                raise ValueError(f"only {len(self._waiting[index])} prompts of this kind are left")
            codes, self._waiting[index] = np.split(self._waiting[index], [number])
            taken.append(decode_prompts(codes, index + 1))
        return self._rng.permutation(np.concatenate(taken))


def decode_prompts(codes: np.ndarray, num_functions: int) -> np.ndarray:
    """int32 ``[N, P]``, the prompts with the numbers 0 .. 10 * 24**num_functions - 1."""
    prompts = np.full((len(codes), PROMPT_LENGTH), NO_FUNCTION, np.int32)
    prompts[:, -1] = EQUALS
    rest = np.asarray(codes)
    for place in range(num_functions):
        rest, function = np.divmod(rest, NUM_FUNCTIONS)
        prompts[:, 1 + place] = FIRST_FUNCTION + function
    prompts[:, 0] = rest
    return prompts


def encode_prompts(prompts_NP: np.ndarray) -> np.ndarray:
    """A number for each prompt; distinct prompts have distinct numbers."""
    base = np.int64(NUM_FUNCTIONS + 1)
    code = prompts_NP[:, 0].astype(np.int64)
    for place in range(MAX_FUNCTIONS):
        code = code * base + (prompts_NP[:, 1 + place] - FIRST_FUNCTION)
    return code


def count_functions(prompts_NP: np.ndarray) -> np.ndarray:
    """The number of functions of each prompt, 1 to 3."""
    return (prompts_NP[:, 1:-1] != NO_FUNCTION).sum(axis=1)


def random_prompts(rng: np.random.Generator, count: int, excluded: np.ndarray) -> np.ndarray:
    """Draws ``[count, P]`` prompts of one to three functions in equal shares, with repetition.

    Args:
      rng: gives the random numbers.
      count: number of prompts.
      excluded: ``encode_prompts`` of prompts that must not occur.
    """
    kept: list[np.ndarray] = []
    while (missing := count - sum(map(len, kept))) > 0:
        draw = max(missing, 64)
        prompts = np.full((draw, PROMPT_LENGTH), NO_FUNCTION, np.int32)
        prompts[:, 0] = rng.integers(NUM_VALUES, size=draw)
        prompts[:, -1] = EQUALS
        functions = rng.integers(NUM_FUNCTIONS, size=(draw, MAX_FUNCTIONS)) + FIRST_FUNCTION
        number = rng.integers(1, MAX_FUNCTIONS + 1, size=draw)
        used = np.arange(MAX_FUNCTIONS)[None, :] < number[:, None]
        prompts[:, 1:-1] = np.where(used, functions, NO_FUNCTION)
        kept.append(prompts[~np.isin(encode_prompts(prompts), excluded)][:missing])
    return np.concatenate(kept)


def true_results(truth_FA: np.ndarray, prompts_NP: np.ndarray) -> np.ndarray:
    """The correct value of each prompt."""
    value = prompts_NP[:, 0].astype(np.int64)
    for place in range(MAX_FUNCTIONS):
        function = prompts_NP[:, 1 + place] - FIRST_FUNCTION
        used = function < NUM_FUNCTIONS
        value = np.where(used, truth_FA[np.where(used, function, 0), value], value)
    return value


# --- answers --------------------------------------------------------------------------------------


def next_token_probs(world: World, prompts_NP: np.ndarray, prefix_NT: np.ndarray) -> np.ndarray:
    """Exact float64 ``[N, V]`` probabilities of the token after ``prompt + prefix``.

    After an end token the process stays at the end token.

    Args:
      world: the process.
      prompts_NP: prompts.
      prefix_NT: the answers so far, all of one length, ``[N, 0]`` at the start.

    Raises:
      ValueError: the process cannot write a prefix.
    """
    num, step = prefix_NT.shape
    probs_NV = np.zeros((num, VOCAB_SIZE))
    rows = np.arange(num)
    functions = count_functions(prompts_NP)
    if step == 0:
        probs_NV[:, FIRST_STYLE:FIRST_CONNECTOR] = world.styles_MS[functions - 1]
        return probs_NV
    style = prefix_NT[:, 0] - FIRST_STYLE
    if np.any((style < 0) | (style >= NUM_STYLES)):
        raise ValueError("an answer must begin with a style")
    direct = style == 0
    num_results = step // 2  # So many results are written, where the answer has not ended.
    ended = np.where(direct, 1, functions) <= num_results
    if step % 2 == 0:
        probs_NV[ended, END] = 1
        going = ~ended
        probs_NV[going, FIRST_CONNECTOR:END] = world.connectors_SC[style[going]]
        return probs_NV
    probs_NV[ended, END] = 1
    first = direct & ~ended
    probs_NV[first, :NUM_VALUES] = direct_probs(world, prompts_NP[first])
    chain = rows[~direct & ~ended]
    before = prompts_NP[chain, 0] if step == 1 else prefix_NT[chain, step - 2]
    if np.any((before < 0) | (before >= NUM_VALUES)):
        raise ValueError("an intermediate result must be a value")
    function = prompts_NP[chain, 1 + num_results] - FIRST_FUNCTION
    probs_NV[chain, :NUM_VALUES] = world.results_FAA[function, before]
    return probs_NV


def direct_probs(world: World, prompts_NP: np.ndarray) -> np.ndarray:
    """``[N, A]`` probabilities of a direct answer: the exact marginal, mixed with a guess."""
    functions = count_functions(prompts_NP)
    probs_NA = np.eye(NUM_VALUES)[prompts_NP[:, 0]]
    for place in range(MAX_FUNCTIONS):
        function = prompts_NP[:, 1 + place] - FIRST_FUNCTION
        used = function < NUM_FUNCTIONS
        step_NAA = world.results_FAA[np.where(used, function, 0)]
        probs_NA = np.where(used[:, None], np.einsum("na,nab->nb", probs_NA, step_NAA), probs_NA)
    guess = world.direct_skill * probs_NA + (1 - world.direct_skill) / NUM_VALUES
    return np.where((functions > 1)[:, None], guess, probs_NA)


def answer_lengths(answers_NT: np.ndarray) -> np.ndarray:
    """The number of tokens of each answer, its end token included.

    Raises:
      ValueError: an answer without an end token.
    """
    ends = answers_NT == END
    if not ends.any(axis=1).all():
        raise ValueError("an answer has no end token")
    return ends.argmax(axis=1) + 1


def answer_probs(world: World, prompts_NP: np.ndarray, answers_NT: np.ndarray) -> np.ndarray:
    """``[N, T, V]`` exact next-token probabilities at every position of complete answers.

    After an end token the end token has probability 1.
    """
    length = answers_NT.shape[1]
    return np.stack(
        [next_token_probs(world, prompts_NP, answers_NT[:, :t]) for t in range(length)], axis=1
    )


def sample_answers(world: World, prompts_NP: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws int32 ``[N, 7]`` answers from the process, filled up with end tokens."""
    answers_NT = np.zeros((len(prompts_NP), 0), np.int32)
    for _ in range(MAX_ANSWER):
        probs_NV = next_token_probs(world, prompts_NP, answers_NT)
        below_NV = probs_NV.cumsum(axis=1)
        uniform_N1 = rng.random((len(prompts_NP), 1)) * below_NV[:, -1:]
        token_N = (below_NV <= uniform_N1).sum(axis=1)
        answers_NT = np.concatenate([answers_NT, token_N[:, None].astype(np.int32)], axis=1)
    return answers_NT


def greedy_answers(world: World, prompts_NP: np.ndarray) -> np.ndarray:
    """int32 ``[N, 7]``, the most probable token at each position, filled up with end tokens."""
    answers_NT = np.zeros((len(prompts_NP), 0), np.int32)
    for _ in range(MAX_ANSWER):
        token_N = next_token_probs(world, prompts_NP, answers_NT).argmax(axis=1)
        answers_NT = np.concatenate([answers_NT, token_N[:, None].astype(np.int32)], axis=1)
    return answers_NT


def greedy_correct(worlds: Worlds, prompts_NP: np.ndarray) -> np.ndarray:
    """bool ``[N]``: whether the teacher's greedy answer ends with the correct value."""
    values = final_values(list(greedy_answers(worlds.teacher, prompts_NP)))
    return values == true_results(worlds.truth_FA, prompts_NP)


def final_values(answers: list[np.ndarray]) -> np.ndarray:
    """The last value before the end token of each answer; -1 where there is no value or no end."""
    values = np.full(len(answers), -1)
    for index, answer in enumerate(answers):
        ends = np.flatnonzero(np.asarray(answer) == END)
        if len(ends) and ends[0] > 0 and answer[ends[0] - 1] < NUM_VALUES:
            values[index] = answer[ends[0] - 1]
    return values


def to_text(tokens: np.ndarray) -> str:
    """The symbols with spaces between them."""
    return " ".join(SYMBOLS[token] for token in tokens)
