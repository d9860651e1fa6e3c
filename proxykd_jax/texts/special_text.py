"""Keeps text that looks like a control token from becoming one.

A prompt that quotes ``</s>`` or ``<|im_end|>`` must stay text: as a token it would end the turn.
Tokenizers cannot be told which occurrence is meant, so rows with such text are handled in three
steps:

1. Every occurrence in a message is replaced by a stand-in character before the template runs.
2. Occurrences that remain in the rendered text come from the template. They get a private name, and
   the stand-ins become plain text again.
3. A copy of the tokenizer that knows its control tokens only by their private names tokenises the
   result.

The stand-ins come from Unicode's last private-use plane. A row that already contains one of them is
dropped, because it could not be told apart (``has_reserved``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

_STAND_IN, _NAME = 0x108000, 0x10B000
_MOST = _NAME - _STAND_IN
MARK_START, MARK_END = "\U0010f000", "\U0010f001"
# Appended to an answer, it shows where the answer ends in the rendered text.
ANSWER_END = "\U0010efff"
# They enclose a turn's text, to find it in the rendered text.
TURN_START, TURN_END = "\U0010effd", "\U0010effe"
_RESERVED = re.compile("[\U00108000-\U0010f001]")


def has_reserved(text: str) -> bool:
    """Whether a text contains a character that this module reserves."""
    return _RESERVED.search(text) is not None


def first_control_token(backend: Any, text: str) -> int | None:
    """The id of the first control token in a text that a template wrote, or None.

    A token that is not called special counts if no special one is there and the tokenizer finds it
    before it cuts a text.

    Args:
      backend: a ``tokenizers.Tokenizer``.
      text: the text.
    """
    places = {
        token_id: (not token.special, place, -len(token.content))
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.content.strip() and (place := text.find(token.content)) >= 0
    }
    return min(places, key=lambda token_id: places[token_id], default=None)


class SpecialText:
    """The control tokens of one tokenizer, by text.

    Args:
      backend: a ``tokenizers.Tokenizer``.
      ends: ids that end an answer. They are control tokens even where the tokenizer does not call
        them special, provided that it finds them before it cuts a text.
    """

    def __init__(self, backend: Any, ends: Collection[int] = ()) -> None:
        self._original = backend
        self._copy: Any = None
        decoder = backend.get_added_tokens_decoder()
        self.ids = frozenset(i for i, token in decoder.items() if token.special or i in ends)
        texts = [decoder[i].content for i in sorted(self.ids) if decoder[i].content][:_MOST]
        self._hide = {text: chr(_STAND_IN + n) for n, text in enumerate(texts)}
        self._names = {text: chr(_NAME + n) for n, text in enumerate(texts)}
        self._show = {ord(stand_in): text for text, stand_in in self._hide.items()}
        longest_first = sorted(texts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def occurs_in(self, text: str) -> bool:
        """Whether a text contains the text of a control token."""
        return self._pattern.search(text) is not None

    def hide(self, text: str) -> str:
        """A message's text, with stand-ins for control tokens."""
        return self._pattern.sub(lambda found: self._hide[found.group()], text)

    def reveal(self, rendered: str) -> str:
        """The rendered text; only the template's control tokens have private names."""
        named = self._pattern.sub(lambda found: self._names[found.group()], rendered)
        return named.translate(self._show)

    def plain(self, revealed: str) -> str:
        """The inverse of the private names in ``reveal``'s result, for readers."""
        return revealed.translate({ord(name): text for text, name in self._names.items()})

    @property
    def backend(self) -> Any:
        """A copy of the tokenizer that knows control tokens only by private name."""
        if self._copy is None:
            import tokenizers

            data = json.loads(self._original.to_str())
            self._copy = tokenizers.Tokenizer.from_str(json.dumps(self._renamed(data)))
        return self._copy

    def _renamed(self, data: dict[str, Any]) -> dict[str, Any]:
        names = self._names
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = data["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(text, text): i for text, i in vocabulary.items()}
        else:  # Unigram: pairs of text and score
            model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
        if "merges" in model:
            # Some converted tokenizers merge "</" and "s>" into the control token itself.
            model["merges"] = [
                merge
                for merge in model["merges"]
                if "".join(merge.split(" ") if isinstance(merge, str) else merge) not in names
            ]
        unknown = model.get("unk_token")
        if isinstance(unknown, str):
            model["unk_token"] = names.get(unknown, unknown)
        # Nothing is added around a rendered text, and the post-processor uses the old names.
        data["post_processor"] = None
        return data
