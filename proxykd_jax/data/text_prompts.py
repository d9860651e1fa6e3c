"""The prompt of a plain text: its first sentences, or its first tokens.

It decides the row's split, as the first user message of a conversation does, so it must be a
function of what the model is given as the prompt and of nothing after it: two texts that begin
alike belong together. Sentences are found in the text itself. The first tokens are decoded: where
they end within a character, the text alone would let the rest of the character in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from proxykd_jax.config import SourceConfig
from proxykd_jax.data.records import TextRow

if TYPE_CHECKING:
    from proxykd_jax.data.template import Renderer

# A sentence ends with a full stop and what closes after it, before white space; in scripts that
# write without spaces, with theirs.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_BATCH_ROWS = 512


def sentence_end(text: str, count: int) -> int | None:
    """Where the first ``count`` sentences end, as a character index; None if there are fewer."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    return next(islice(ends, count - 1, None), None)


def sentences_end(text: str, source: SourceConfig | None) -> int | None:
    """Where the prompt of a text ends that is counted in sentences: one, if nothing is said."""
    count = source.prompt_sentences if source is not None else None
    return sentence_end(text, count or 1)


def with_prompts(
    rows: Iterator[TextRow], source: SourceConfig, renderer: Renderer | None
) -> Iterator[TextRow]:
    """The rows, plain texts with their ``prompt``, in order.

    Args:
      rows: of the source.
      source: how long the prompt of its plain texts is.
      renderer: cuts texts into tokens. Without it, prompts that are counted in tokens stay unknown.
    """
    if source.prompt_tokens is None:
        for row in rows:
            yield row if row.text is None else _by_sentences(row, row.text, source)
    elif renderer is None:
        yield from rows
    else:
        while batch := list(islice(rows, _BATCH_ROWS)):
            yield from _by_tokens(batch, source, renderer)


def _by_sentences(row: TextRow, text: str, source: SourceConfig) -> TextRow:
    return dataclasses.replace(row, prompt=text[: sentences_end(text, source)])


def _by_tokens(rows: list[TextRow], source: SourceConfig, renderer: Renderer) -> Iterator[TextRow]:
    texts = [row for row in rows if row.text is not None]
    encoded = iter(renderer.encode_batch(texts, source, prompts_only=True))
    for row in rows:
        if row.text is None:
            yield row
            continue
        tokens, _, drop = next(encoded)
        # Control tokens that the text quotes are ordinary tokens; only the BOS is left off.
        prompt = None if drop else renderer.tokenizer.decode(tokens, skip_special=True)
        yield dataclasses.replace(row, prompt=prompt)
