"""Texts made comparable. Only keys are normalised: what a model reads is the corpus as it is."""

from __future__ import annotations

import re
import unicodedata

# A letter of a script without spaces (kana, Han, Hangul) counts as a word of its own.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
    r"|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


def normalise_text(text: str) -> str:
    """NFKC and case folded, runs of white space as one space, ends trimmed. Doing it twice
    changes nothing more.
    """
    if text.isascii():
        return " ".join(text.split()).lower()
    # Folding can leave forms that NFKC composes, so it comes between two rounds of NFKC.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def normalised_words(text: str) -> list[str]:
    """The words of a text without punctuation and case, for comparing questions."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
