"""Greedy answers of a run's models to a few held-out prompts, for people to read.

``eval/answers.jsonl`` has a line per prompt: ``{row_id, split, prompt, teacher, answers}``.
``teacher`` is ``{text, tokens}``, and ``answers`` maps the name of a model to ``{text, tokens,
finished, digest}``. The digest covers the answer and everything that it was made from, so that an
unchanged model is not asked again, and a damaged answer is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from proxykd_jax.artifacts import digest_value, read_lines, write_bytes
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.order import permutation
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.peers import on_first, say, stop_if_wanted
from proxykd_jax.texts.tokenizer import load_tokenizer
from proxykd_jax.training.draw_answers import make_draw
from proxykd_jax.training.model import Model

FILE = "answers.jsonl"
# Most tokens of an answer. The longest answer decides what all of them cost.
MOST_TOKENS = 256
# The models whose answers are compared, in this order; of the two proxies the first that there is.
PROXIES, STUDENTS = ("proxy_aligned", "proxy_raw"), ("student_before", "student")

Line = dict[str, Any]


class HeldOutAnswers:
    """The answers of a run in ``eval/answers.jsonl``.

    Args:
      config: the run; ``evaluate.answers`` is the number of prompts.
      corpus: the corpus; test rows are asked, or validation rows if there are none.
    """

    def __init__(self, config: Config, corpus: TokenCorpus) -> None:
        self._config, self._corpus = config, corpus
        self._path = config.folder / "eval" / FILE
        self._split = "test" if len(corpus.split("test")) else "validation"
        rows = corpus.split(self._split)
        # The rows of a smaller number are among those of a larger one.
        places = permutation(len(rows), seed=config.seed, epoch=0)[: config.evaluate.answers]
        self._rows = rows.read(sorted(places.tolist()))
        self._lines: list[Line] = []

    def missing(self, identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Names of the models that must answer; the same on every process.

        Args:
          identities: what identifies each model of the run, by name.
        """
        proxy = [name for name in PROXIES if name in identities][:1]
        asked = [*proxy, *(name for name in STUDENTS if name in identities)]
        return on_first(functools.partial(self._missing, asked, identities)) if self._rows else []

    def _missing(self, asked: list[str], identities: Mapping[str, Mapping[str, Any]]) -> list[str]:
        stored = read_answers(self._path)
        tokenizer = load_tokenizer(self._config)
        missing = []
        self._lines = [
            {
                "row_id": row.row_id,
                "split": self._split,
                "prompt": tokenizer.decode(row.prompt),
                "teacher": {
                    "text": tokenizer.decode(row.answer, skip_special=True),
                    "tokens": len(row.answer),
                },
                "answers": {},
            }
            for row in self._rows
        ]
        by_row = {line["row_id"]: line["answers"] for line in stored}
        for name in asked:
            found = [by_row.get(row.row_id, {}).get(name) for row in self._rows]
            valid = [
                answer is not None
                and answer["digest"] == self._digest(identities[name], row, answer)
                for row, answer in zip(self._rows, found, strict=True)
            ]
            if not all(valid):
                missing.append(name)
                continue
            for line, answer in zip(self._lines, found, strict=True):
                line["answers"][name] = answer
        return missing

    def ask(self, name: str, identity: Mapping[str, Any], model: Model, mesh: Mesh) -> None:
        """Lets a model answer, and stores its answers. Every process calls it.

        Args:
          name: of the model.
          identity: what identifies it.
          model: on the mesh's devices.
          mesh: over which the prompts are split; ``evaluate.batch_size`` fits it.
        """
        corpus, budget = self._corpus, LengthBudget(self._corpus.max_length, MOST_TOKENS)
        draw = make_draw(
            model.config,
            model.weights,
            DrawSettings(0.0, 1.0, corpus.vocab_size, corpus.end_token_ids),
            mesh=mesh,
            seed=self._config.seed,
            round_index=0,
            batch_size=self._config.evaluate.batch_size,
        )
        say(f"evaluate: {name} answers {len(self._rows)} held-out prompts")
        most = model.config.max_positions
        found = draw(
            [row.prompt for row in self._rows],
            [row.row_id for row in self._rows],
            [
                max(0, min(budget.after(row.prompt_length), most - row.prompt_length))
                for row in self._rows
            ],
        )
        on_first(functools.partial(self._keep, name, identity, found))
        stop_if_wanted()

    def _keep(self, name: str, identity: Mapping[str, Any], found: list[Sample]) -> None:
        tokenizer = load_tokenizer(self._config)
        for line, row, sample in zip(self._lines, self._rows, found, strict=True):
            answer = {
                "text": tokenizer.decode(sample.tokens, skip_special=True),
                "tokens": len(sample.tokens),
                "finished": sample.finished,
            }
            line["answers"][name] = {**answer, "digest": self._digest(identity, row, answer)}
        lines = (json.dumps(line) + "\n" for line in self._lines)
        write_bytes(self._path, "".join(lines).encode())

    def _digest(self, identity: Mapping[str, Any], row: TokenRow, answer: Mapping[str, Any]) -> str:
        return digest_value(
            {
                "corpus": self._corpus.identity,
                "model": dict(identity),
                "most_tokens": MOST_TOKENS,
                "row": row.row_id,
                "answer": [answer["text"], answer["tokens"], answer["finished"]],
            }
        )


def read_answers(path: Path) -> list[Line]:
    """The lines of the file; lines that are damaged or of another form are left out."""
    lines = []
    for line in read_lines(path):
        if _has(line, "row_id", "split", "prompt", "teacher", "answers"):
            answers = line["answers"].values() if isinstance(line["answers"], dict) else [None]
            whole = all(_has(each, "text", "tokens", "finished", "digest") for each in answers)
            if whole and _has(line["teacher"], "text", "tokens"):
                lines.append(line)
    return lines


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)
