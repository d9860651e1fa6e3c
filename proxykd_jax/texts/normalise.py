"""Normalises texts for comparison. Only keys are normalised; models read the corpus unchanged."""

from __future__ import annotations

import re
import unicodedata

# In scripts without spaces (kana, Han, Hangul) each letter counts as a word.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
    r"|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


def normalise_text(text: str) -> str:
    """NFKC, case folding, single spaces between words, no space at the ends. Idempotent."""
    if text.isascii():
        return " ".join(text.split()).lower()
    # Folding can leave forms that NFKC composes, so NFKC runs before and after it.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def normalised_words(text: str) -> list[str]:
    """The words of a text without punctuation and case, for comparing questions."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
