"""Answers items by a model's greedy generation, by a server, or from a file.

Each way returns an ``Answering``. It maps indices of items to lines of (id, prompt_hash, output,
finished), or, for log-likelihoods, (id, prompt_hash, logliks, bytes).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import Config
from proxykd_jax.config.schema import EndpointConfig
from proxykd_jax.data.collate import RowsInMemory, TokenRow
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.candidates import Candidate, Collected, Server
from proxykd_jax.evaluation.measures import RowMeasures, measure
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import SampleFunction
from proxykd_jax.generation.server import Connection
from proxykd_jax.peers import on_first
from proxykd_jax.tasks.items import Item
from proxykd_jax.tasks.outputs import Answering, Line
from proxykd_jax.tasks.prompts import prompt_hash, prompt_of, question_alone
from proxykd_jax.texts.json_files import read_json_records
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import check_embedding_rows, load_tokenizer
from proxykd_jax.training.draw_answers import make_draw
from proxykd_jax.training.model import Model

# An answer needs room for at least a few tokens.
FEWEST_TOKENS = 8
# Increase it when choices get other log-likelihoods: results of two versions are not comparable.
COMPARING_VERSION = 2


@dataclass(frozen=True)
class ChatModel:
    """A model on the mesh, with its tokenizer and template."""

    model: Model
    renderer: Renderer
    mesh: Mesh

    @property
    def vocab_size(self) -> int:
        """Number of ids that may be drawn."""
        return self.renderer.tokenizer.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.renderer.end_token_ids

    def drawing(
        self, *, seed: int, batch_size: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> SampleFunction:
        """The model's sampler, with rows split over the mesh; greedy at temperature 0."""
        return make_draw(
            self.model.config,
            self.model.weights,
            DrawSettings(temperature, top_p, self.vocab_size, self.end_token_ids),
            mesh=self.mesh,
            seed=seed,
            round_index=0,
            batch_size=batch_size,
        )

    def measured(self, rows: Sequence[TokenRow], batch_size: int) -> RowMeasures:
        """NLL and agreement of the rows' answers."""
        return measure(
            self.model,
            RowsInMemory(list(rows)),
            batch_size=batch_size,
            top_ks=(),
            mesh=self.mesh,
        )

    def text_of(self, answer: Sample) -> str:
        """The answer's text, without control tokens."""
        tokens = answer.tokens[:-1] if answer.finished else answer.tokens
        return self.renderer.tokenizer.decode(tokens, skip_special=True)


def load_chat_model(config: Config, candidate: Candidate, mesh: Mesh) -> ChatModel:
    """Loads a model, to be asked in the corpus's format.

    Raises:
      UserError: files are missing or do not fit.
    """
    renderer = renderer_of(config, candidate.tokenizer)
    model = candidate.load(mesh)
    check_embedding_rows(renderer.tokenizer, model.config.vocab_size, str(model.folder))
    return ChatModel(model, renderer, mesh)


def renderer_of(config: Config, own_tokenizer: Path | None = None) -> Renderer:
    """The run's template with the run's tokenizer, or with the model's own tokenizer if it differs.

    The corpus's end tokens belong to the run's tokenizer. With another tokenizer its EOS ends an
    answer, or the control token that its template writes there.
    """
    tokenizer, corpus = load_tokenizer(config), config.corpus
    if own_tokenizer is not None:
        own = load_tokenizer(own_tokenizer)
        if own.vocabulary != tokenizer.vocabulary:
            corpus = corpus.model_copy(update={"end_tokens": None})
        tokenizer = own
    return Renderer.of(tokenizer, corpus)


def generating(
    chat_model: ChatModel, items: Sequence[Item], *, seed: int, max_new_tokens: int, batch_size: int
) -> Answering:
    """Greedy answers by the built-in sampler, with rows split over the mesh.

    If a prompt leaves no room in the model's context, the output is empty and unfinished.
    """
    model = chat_model.model
    draw = chat_model.drawing(seed=seed, batch_size=batch_size)

    def answer(places: Sequence[int]) -> list[Line]:
        asked = [prompt_of(items[place]) for place in places]
        prompts = _prompt_tokens(chat_model.renderer, asked)
        room = [model.config.max_positions - len(prompt) for prompt in prompts]
        budgets = [min(max_new_tokens, left) if left >= FEWEST_TOKENS else 0 for left in room]
        names = [f"{items[place].task}/{items[place].id}" for place in places]
        lines = []
        for place, prompt, found in zip(places, asked, draw(prompts, names, budgets), strict=True):
            lines.append(_line(items[place], prompt, chat_model.text_of(found), found.finished))
        return lines

    return answer


def comparing(chat_model: ChatModel, items: Sequence[Item], *, batch_size: int) -> Answering:
    """Log-likelihoods of the choices' texts as answers to the question alone.

    Only the text counts, not the end token or anything else after it.
    """
    model = chat_model.model

    def answer(places: Sequence[int]) -> list[Line]:
        rows, owners = [], []
        for place in places:
            question = question_alone(items[place])
            rows += [_conversation(question, text) for _, text in items[place].choices]
            owners += [place] * len(items[place].choices)
        encoded = [
            TokenRow(found.tokens, found.prompt_length, "")
            for found in chat_model.renderer.encode_all(rows, with_end=False)
        ]
        # The last token is predicted but never an input.
        kept = [len(row.tokens) - 1 <= model.config.max_positions for row in encoded]
        logliks = np.full(len(encoded), np.nan)
        fitting = [row for row, fits in zip(encoded, kept, strict=True) if fits]
        if fitting:
            logliks[np.array(kept)] = -chat_model.measured(fitting, batch_size).nll
        return [_compared(items[place], owners, logliks, place) for place in places]

    return answer


def asking(
    server: Server, endpoint: EndpointConfig, items: Sequence[Item], *, max_new_tokens: int
) -> Answering:
    """Greedy answers of an OpenAI-compatible server, several requests at once."""
    connection = Connection(
        server.url,
        retries=endpoint.retries,
        timeout_s=endpoint.timeout_s,
        api_key_env=endpoint.api_key_env,
        where="evaluate.benchmarks.endpoint",
    )

    def ask(place: int) -> Line:
        prompt = prompt_of(items[place])
        reply = connection.chat(
            {
                "model": server.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": max_new_tokens,
                "temperature": 0,
            }
        )
        return _line(items[place], prompt, reply.text, reply.finished)

    def ask_all(places: Sequence[int]) -> list[Line]:
        pool = ThreadPoolExecutor(endpoint.concurrency)
        try:
            return list(pool.map(ask, places))
        except BaseException:
            connection.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    return lambda places: on_first(functools.partial(ask_all, places))


def looking_up(collected: Collected, items: Sequence[Item]) -> Answering:
    """Outputs from a file: ``{output}`` with ``prompt_hash`` or ``id``, and with ``task`` if ids
    repeat between tasks.

    Raises:
      UserError: a line is not such an object, or an item has no output.
    """
    by_hash: dict[str, Line] = {}
    by_id: dict[tuple[str | None, str], Line] = {}
    for record, origin in read_json_records(collected.path):
        if not isinstance(record.get("output"), str) or not ({"id", "prompt_hash"} & set(record)):
            raise UserError(
                f"{origin} needs output (text) and id or prompt_hash; it has the keys "
                f"{', '.join(record)}."
            )
        if "prompt_hash" in record:
            by_hash[str(record["prompt_hash"])] = dict(record)
        if "id" in record:
            by_id[record.get("task"), str(record["id"])] = dict(record)

    def find(item: Item, hashed: str) -> Line | None:
        if hashed in by_hash:
            return by_hash[hashed]
        return by_id.get((item.task, item.id)) or by_id.get((None, item.id))

    prompts = [prompt_of(item) for item in items]
    found = [find(item, prompt_hash(p)) for item, p in zip(items, prompts, strict=True)]
    absent = [item.id for item, line in zip(items, found, strict=True) if line is None]
    if absent:
        raise UserError(
            f"{collected.path} has no output for {len(absent)} of {len(items)} items of "
            f"{items[0].task}, the first with the id {absent[0]}."
        )

    def answer(places: Sequence[int]) -> list[Line]:
        lines = []
        for place in places:
            line = found[place] or {}
            finished = bool(line.get("finished", True))
            lines.append(_line(items[place], prompts[place], line["output"], finished))
        return lines

    return answer


def _line(item: Item, prompt: str, output: str, finished: bool) -> Line:
    return {
        "id": item.id,
        "prompt_hash": prompt_hash(prompt),
        "output": output,
        "finished": bool(finished),
    }


def _compared(item: Item, owners: Sequence[int], logliks: np.ndarray, place: int) -> Line:
    own = [float(value) for owner, value in zip(owners, logliks, strict=True) if owner == place]
    known = bool(np.isfinite(own).all())
    return {
        "id": item.id,
        "prompt_hash": prompt_hash(question_alone(item)),
        "logliks": own if known else None,
        "bytes": [len(text.encode()) for _, text in item.choices],
    }


def _prompt_tokens(renderer: Renderer, prompts: Sequence[str]) -> list[np.ndarray]:
    rows = [_conversation(prompt, None) for prompt in prompts]
    return [found.tokens for found in renderer.encode_all(rows, prompts_only=True)]


def _conversation(question: str, answer: str | None) -> TextRow:
    messages: list[Any] = [Message("user", question)]
    if answer is not None:
        messages.append(Message("assistant", answer))
    return TextRow(tuple(messages), None, "evaluate.benchmarks")
