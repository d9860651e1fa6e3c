"""Finds benchmark questions inside a corpus by their words.

Texts are compared as words without case, punctuation and white space. A row matches a question if
a user's message (for a plain text: its prompt, or the text)

- ``whole``: equals the question, however short;
- ``contained``: contains the whole question, which has at least ``CONTAINED_WORDS`` words;
- ``overlap``: shares ``OVERLAP_WORDS`` consecutive words with it (Brown et al. 2020, appendix C,
  also use 13).

Three rules keep ordinary text from matching:

- "What is the capital of France?" inside a longer message proves nothing. A question of fewer than
  ``CONTAINED_WORDS`` words must be the whole message. So must a question of fewer than 13 words
  that has choices ("Which one of the following statements is true?"); together with its choices it
  may stand anywhere.
- Word runs that more than ``BOILERPLATE_QUESTIONS`` questions share are the benchmark's
  boilerplate ("the following paragraphs each describe a set of ...") and do not count as overlap.
- Runs with fewer than ``TELLING_WORDS`` different words of three letters or more do not count
  either, such as a loop in C ("for int i 0 i 3 i for int j 0") or "A I only B II only C III only".

Time per row is proportional to the row's words, memory to the benchmark's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from proxykd_jax.texts.benchmark_files import SoughtText
from proxykd_jax.texts.normalise import normalised_words
from proxykd_jax.texts.readers import sought_in_corpus
from proxykd_jax.texts.records import TextRow

OVERLAP_WORDS = 13
CONTAINED_WORDS = 8
BOILERPLATE_QUESTIONS = 10
TELLING_WORDS = 5
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication modulo 2^64 is invertible
_SHOWN = 120


class Match(NamedTuple):
    """A benchmark question found in a row.

    Attributes:
      origin: origin of the row.
      question: the beginning of the question.
      how: kind of match; see the module's docstring.
    """

    origin: str
    question: str
    how: Literal["whole", "contained", "overlap"]


class ContaminationIndex:
    """The questions of benchmarks, indexed for search.

    Args:
      questions: their texts. Repeated texts count once.
    """

    def __init__(self, questions: Iterable[SoughtText | str]) -> None:
        self._shown: list[str] = []
        self._whole: dict[int, int] = {}
        # First CONTAINED_WORDS words -> length in words -> hash of all words -> question.
        self._starts: dict[int, dict[int, dict[int, int]]] = {}
        seen: dict[int, tuple[int, int]] = {}  # word run -> (a question, how many questions)
        for question in questions:
            text, whole_only = (question, False) if isinstance(question, str) else question
            words = _words(text)
            hashes = _word_hashes(words)
            number = len(self._shown)
            if not words or (whole := _hash_of(hashes)) in self._whole:
                continue
            self._shown.append(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
            self._whole[whole] = number
            if whole_only:
                continue
            starts, runs = _run_hashes(hashes)
            if len(starts):
                lengths = self._starts.setdefault(int(starts[0]), {})
                lengths.setdefault(len(words), {})[whole] = number
            for run in set(runs[_telling_runs(words)].tolist()):
                seen[run] = (number, seen.get(run, (0, 0))[1] + 1)
        self._start_keys = _Keys(self._starts)
        self._runs = {run: n for run, (n, count) in seen.items() if count <= BOILERPLATE_QUESTIONS}
        self._run_keys = _Keys(self._runs)

    @classmethod
    def from_files(cls, paths: Sequence[str]) -> ContaminationIndex:
        """Reads benchmark files, folders or globs (``readers.sought_in_corpus``).

        Raises:
          UserError: a path matches nothing, or a file is damaged or of unknown form.
        """
        return cls(sought for path in paths for sought in sought_in_corpus(path))

    def __len__(self) -> int:
        return len(self._shown)

    def match(self, row: TextRow) -> Match | None:
        """The first question found in what the user says, or None."""
        for text in row.user_texts:
            found = self._find(text)
            if found is not None:
                number, how = found
                return Match(row.origin, self._shown[number], how)
        return None

    def __contains__(self, row: TextRow) -> bool:
        return self.match(row) is not None

    def _find(self, text: str) -> tuple[int, Literal["whole", "contained", "overlap"]] | None:
        hashes = _word_hashes(_words(text))
        if not len(hashes):
            return None
        if (number := self._whole.get(_hash_of(hashes))) is not None:
            return number, "whole"
        starts, runs = _run_hashes(hashes)
        for place in self._start_keys.places_in(starts):
            for length, wholes in self._starts.get(int(starts[place]), {}).items():
                if place + length <= len(hashes):
                    number = wholes.get(_hash_of(hashes[place : place + length]))
                    if number is not None:
                        return number, "contained"
        for place in self._run_keys.places_in(runs):
            if (number := self._runs.get(int(runs[place]))) is not None:
                return number, "overlap"
        return None


def contamination_report(matches: Sequence[Match], count: int) -> str:
    """Sentences for a user whose corpus contains benchmark questions.

    Args:
      matches: the first few matches.
      count: number of all rows that match.
    """
    listed = "\n  ".join(f"{m.origin}: {m.how}: {m.question!r}" for m in matches)
    return (
        f"{count} {'row holds a question' if count == 1 else 'rows hold questions'} of the "
        f"benchmarks:\n  {listed}\n"
        "What is trained on them cannot be measured with these benchmarks. Remove the rows, or "
        "set corpus.contamination: drop to leave them out."
    )


class _Keys:
    """A table of the keys' leading bits; one look-up shows that most hashes are not keys."""

    _BITS = 23

    def __init__(self, keys: Iterable[int]) -> None:
        self._occurs = np.zeros(1 << self._BITS, bool)
        for key in keys:
            self._occurs[key >> (64 - self._BITS)] = True

    def places_in(self, hashes: np.ndarray) -> list[int]:
        """Indices of the hashes that may be keys."""
        return np.flatnonzero(self._occurs[hashes >> np.uint64(64 - self._BITS)]).tolist()


def _words(text: str) -> list[bytes]:
    return " ".join(normalised_words(text)).encode("utf-8", "surrogatepass").split()


def _word_hashes(words: list[bytes]) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def _run_hashes(word_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polynomial hashes of all runs of 8 and of 13 words.

    They are built from runs of 1, 2, 4 and 8 words, in 5 passes over the text instead of 21.
    """
    runs = {1: word_hashes}
    for length in (1, 2, 4):
        runs[2 * length] = _joined(runs[length], length, runs[length], length)
    return runs[8], _joined(_joined(runs[8], 8, runs[4], 4), 12, runs[1], 1)


def _joined(left: np.ndarray, left_words: int, right: np.ndarray, right_words: int) -> np.ndarray:
    """Hashes of runs made by joining a run with the one right after it."""
    count = max(len(right) - left_words, 0)
    power = np.uint64(pow(_MULTIPLIER, right_words, 1 << 64))
    return left[:count] * power + right[left_words : left_words + count]


def _telling_runs(words: list[bytes]) -> np.ndarray:
    """Which runs of OVERLAP_WORDS words contain enough different long words."""
    long = [word if len(word) >= 3 else None for word in words]  # bytes: a Han letter has three
    return np.array(
        [
            len({word for word in long[place : place + OVERLAP_WORDS] if word}) >= TELLING_WORDS
            for place in range(len(words) - OVERLAP_WORDS + 1)
        ],
        bool,
    )


def _hash_of(word_hashes: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(word_hashes.tobytes())
