"""The rows of all tools: NumPy arrays in a file, which each tool collates in its own way."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOP_K = 10
_FIRST_TOKEN = 3  # Tokenizers keep the ids below for themselves.


@dataclass(frozen=True)
class Rows:
    """n examples.

    Attributes:
      tokens: int32[T] for each example: prompt, then answer.
      prompt_lengths: int32[n], tokens P of each prompt.
      rejected: int32[T] for each example: the same prompt, then another answer.
      reference_chosen, reference_rejected: float32[n], summed log-probs of both answers.
      topk_ids, topk_logps: int32 and float32 [T - P, K] for each example: the answer's soft labels.
      weights: float32[n], weights of the examples.
    """

    tokens: list[np.ndarray]
    prompt_lengths: np.ndarray
    rejected: list[np.ndarray]
    reference_chosen: np.ndarray
    reference_rejected: np.ndarray
    topk_ids: list[np.ndarray]
    topk_logps: list[np.ndarray]
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """int32[n], tokens T of each row."""
        return np.array([len(row) for row in self.tokens], np.int32)

    @property
    def rejected_lengths(self) -> np.ndarray:
        """int32[n], tokens of each rejected row."""
        return np.array([len(row) for row in self.rejected], np.int32)

    @property
    def prompts(self) -> list[np.ndarray]:
        """int32[P] for each example."""
        return [row[:prompt] for row, prompt in zip(self.tokens, self.prompt_lengths, strict=True)]

    @property
    def budgets(self) -> list[int]:
        """The number of tokens of each chosen answer."""
        return (self.lengths - self.prompt_lengths).tolist()

    @property
    def answer_tokens(self) -> int:
        """The number of tokens of all chosen answers."""
        return sum(self.budgets)

    def drawing_ways(
        self, sizes: Sequence[int], draw: Callable[[list[int], int], object], more: str = ""
    ) -> dict[str, Callable[[], object]]:
        """Ways to draw an answer for every row, in batches that each go on to their longest answer.

        Args:
          sizes: sizes of a batch.
          draw: takes the places of a batch's rows, and the number of tokens of its longest answer.
          more: further settings in the names of the ways.
        """
        budgets, given = self.budgets, list(range(len(self)))
        by_budget = sorted(given, key=lambda i: (budgets[i], int(self.prompt_lengths[i])))

        def draw_all(order: list[int], size: int) -> None:
            for start in range(0, len(order), size):
                places = order[start : start + size]
                draw(places, max(budgets[i] for i in places))

        return {
            f"{name}, batch_size={size}{more}": functools.partial(draw_all, order, size)
            for name, order in (("order as given", given), ("sorted by budget", by_budget))
            for size in sizes
        }

    def tails(self, index: int) -> np.ndarray:
        """float32[T - P], log of the probability outside the soft labels."""
        outside = 1.0 - np.exp(self.topk_logps[index].astype(np.float64)).sum(axis=-1)
        return np.log(outside).astype(np.float32)

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        np.savez(
            path,
            tokens=np.concatenate(self.tokens),
            lengths=self.lengths,
            prompt_lengths=self.prompt_lengths,
            rejected=np.concatenate(self.rejected),
            rejected_lengths=self.rejected_lengths,
            reference_chosen=self.reference_chosen,
            reference_rejected=self.reference_rejected,
            topk_ids=np.concatenate(self.topk_ids),
            topk_logps=np.concatenate(self.topk_logps),
            weights=self.weights,
        )

    @staticmethod
    def load(path: str | Path) -> Rows:
        """Reads what ``save`` wrote."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        answers = arrays["lengths"] - arrays["prompt_lengths"]
        return Rows(
            tokens=_split(arrays["tokens"], arrays["lengths"]),
            prompt_lengths=arrays["prompt_lengths"],
            rejected=_split(arrays["rejected"], arrays["rejected_lengths"]),
            reference_chosen=arrays["reference_chosen"],
            reference_rejected=arrays["reference_rejected"],
            topk_ids=_split(arrays["topk_ids"], answers),
            topk_logps=_split(arrays["topk_logps"], answers),
            weights=arrays["weights"],
        )


def _split(array: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(array, np.cumsum(lengths)[:-1])


def with_labels(
    tokens: list[np.ndarray], prompt_lengths: list[int], rejected: list[np.ndarray], vocab: int
) -> Rows:
    """Rows with random soft labels and references; a model of random weights fits them as well as
    others."""
    rng = np.random.default_rng(1)
    topk_ids, topk_logps = [], []
    for row, prompt in zip(tokens, prompt_lengths, strict=True):
        answer = len(row) - prompt
        draws = rng.random((answer, vocab if vocab <= 4096 else 4096), dtype=np.float32)
        step = vocab // draws.shape[1]  # The ids are distinct and lie in the whole vocabulary.
        topk_ids.append((np.argsort(draws, axis=-1)[:, :TOP_K] * step).astype(np.int32))
        share = rng.dirichlet(np.ones(TOP_K + 1), answer) * 0.9 + 0.1 / (TOP_K + 1)
        topk_logps.append(np.log(-np.sort(-share[:, :TOP_K], axis=-1)).astype(np.float32))
    lengths = np.array([len(row) for row in tokens])
    rejected_lengths = np.array([len(row) for row in rejected])
    prompts = np.array(prompt_lengths, np.int32)
    return Rows(
        tokens=tokens,
        prompt_lengths=prompts,
        rejected=rejected,
        reference_chosen=(-np.log(vocab) * (lengths - prompts)).astype(np.float32),
        reference_rejected=(-np.log(vocab) * (rejected_lengths - prompts)).astype(np.float32),
        topk_ids=topk_ids,
        topk_logps=topk_logps,
        weights=rng.uniform(0.5, 1.0, len(tokens)).astype(np.float32),
    )


def dense_rows(count: int, length: int, prompt: int, vocab: int) -> Rows:
    """Random rows of one length, whose prompts have one length."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(_FIRST_TOKEN, vocab, (count, length)).astype(np.int32)
    rejected = tokens.copy()
    rejected[:, prompt:] = rng.integers(_FIRST_TOKEN, vocab, (count, length - prompt))
    return with_labels(list(tokens), [prompt] * count, list(rejected), vocab)


def mixed_rows(count: int, prompts: tuple[int, int], answers: tuple[int, int], vocab: int) -> Rows:
    """Random rows, whose prompts and answers have log-uniform lengths."""
    rng = np.random.default_rng(0)

    def sizes(low: int, high: int) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high + 1), count)).astype(int)

    tokens, rejected, prompt_lengths = [], [], []
    for prompt, answer, other in zip(
        sizes(*prompts), sizes(*answers), sizes(*answers), strict=True
    ):
        row = rng.integers(_FIRST_TOKEN, vocab, prompt + answer).astype(np.int32)
        tail = rng.integers(_FIRST_TOKEN, vocab, other).astype(np.int32)
        tokens.append(row)
        rejected.append(np.concatenate([row[:prompt], tail]))
        prompt_lengths.append(int(prompt))
    return with_labels(tokens, prompt_lengths, rejected, vocab)


# --- real corpora ---------------------------------------------------------------------------------


def assets_folder() -> Path:
    """The folder of models, tokenizers and corpora: $PROXYKD_ASSETS, or one beside the checkout."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "assets"
    return Path(os.environ.get("PROXYKD_ASSETS", beside))


def corpus_rows(name: str, count: int, max_length: int, vocab: int) -> Rows | str:
    """Rows of a real corpus, or a sentence about what is missing.

    Args:
      name: ``alpaca_eval`` (GPT-4's answers, Llama-2-7B-chat's as the rejected ones, Llama-2's
        tokens) or ``tinystories`` (first sentence and the rest of the story, the next story's
        rest as the rejected one, 512 tokens).
      count: the most rows; the first that fit are taken.
      max_length: the most tokens of a row.
      vocab: number of entries of the model's vocabulary.
    """
    folder = assets_folder()
    try:
        texts, tokenizer = (_alpaca if name == "alpaca_eval" else _stories)(folder)
    except FileNotFoundError as error:
        return (
            f"{error.filename} is not there; set PROXYKD_ASSETS to a folder of models, tokenizers "
            "and corpora."
        )
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.no_padding()
    encoder.no_truncation()

    def ids(text: str) -> np.ndarray:
        found = encoder.encode(text, add_special_tokens=False).ids
        return np.array([token for token in found if token < vocab], np.int32)

    begin, end = np.array([1], np.int32), np.array([2], np.int32)
    tokens, rejected, prompt_lengths = [], [], []
    for prompt_text, chosen_text, rejected_text in texts:
        prompt = np.concatenate([begin, ids(prompt_text)])
        pair = [
            np.concatenate([prompt, ids(text), end]).astype(np.int32)
            for text in (chosen_text, rejected_text)
        ]
        if max(len(row) for row in pair) > max_length:
            continue
        tokens.append(pair[0])
        rejected.append(pair[1])
        prompt_lengths.append(len(prompt))
        if len(tokens) == count:
            break
    return with_labels(tokens, prompt_lengths, rejected, vocab)


def _alpaca(folder: Path) -> tuple[list[tuple[str, str, str]], Path]:
    def read(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            (folder / "corpora/alpaca_eval" / name).read_text()
        )
        return found

    teacher, other = read("gpt4_1106_preview.json"), read("llama-2-7b-chat-hf.json")
    others = {row["instruction"]: row["output"] for row in other}
    texts = [
        (f"[INST] {row['instruction']} [/INST] ", row["output"], others[row["instruction"]])
        for row in teacher
        if row["instruction"] in others
    ]
    return texts, _existing(folder / "tokenizers/llama2/tokenizer.json")


def _stories(folder: Path) -> tuple[list[tuple[str, str, str]], Path]:
    lines = (folder / "corpora/tinystories.jsonl").read_text().splitlines()
    stories = [next(v for v in json.loads(line).values() if isinstance(v, str)) for line in lines]
    cut = [story.partition(". ") for story in stories]
    texts = [
        (first + ". ", rest, following[2])
        for (first, _, rest), following in itertools.pairwise(cut)
        if rest and following[2]
    ]
    return texts, _existing(folder / "models/stories260K/tokenizer.json")


def mean_ids(tokens_BL: np.ndarray) -> dict[str, float]:
    """Greedy answers as numbers that can be compared: the mean id at each position."""
    return {f"greedy_{place}": float(x) for place, x in enumerate(tokens_BL.mean(axis=0))}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    return path
