"""The prompt of a plain text: its first sentences or tokens.

The prompt decides the row's split, like a conversation's first user message. So it must depend only
on what the model gets as the prompt and on nothing after it: two texts that begin alike belong
together. Sentences are found in the text itself. Tokens are decoded, because they may end within a
character, and cutting the text would include the rest of that character.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from proxykd_jax.config import SourceConfig
from proxykd_jax.texts.records import TextRow

if TYPE_CHECKING:
    from proxykd_jax.texts.template import Renderer

# A sentence ends with a full stop and closing marks before white space; in scripts without spaces,
# with their own full stops.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")
_BATCH_ROWS = 512


def sentence_end(text: str, count: int) -> int | None:
    """Character index where the first ``count`` sentences end; None if there are fewer."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    return next(islice(ends, count - 1, None), None)


def sentences_end(text: str, source: SourceConfig | None) -> int | None:
    """End of a prompt that is counted in sentences; one sentence by default."""
    count = source.prompt_sentences if source is not None else None
    return sentence_end(text, count or 1)


def with_prompts(
    rows: Iterator[TextRow], source: SourceConfig, renderer: Renderer | None
) -> Iterator[TextRow]:
    """Yields the rows in order, with the ``prompt`` of plain texts.

    Args:
      rows: rows of the source.
      source: gives the length of its plain texts' prompts.
      renderer: tokenises texts. Without it, prompts that are counted in tokens stay unknown.
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
        tokens, _, drop, *_ = next(encoded)
        # Control tokens that the text quotes are ordinary tokens here; only the BOS is removed.
        prompt = None if drop else renderer.tokenizer.decode(tokens, skip_special=True)
        yield dataclasses.replace(row, prompt=prompt)
