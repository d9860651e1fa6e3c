r"""Finds where a model's text states its final answer.

Models mark a final answer in a few ways: ``\boxed{..}``, ``#### ..``, "the answer is ..",
"Answer: ..", "the best choice would be ..", and Chinese forms. ``marked_spans`` returns the text
after such marks, last mark first. ``closing_sentences`` returns the conclusion of a text without
marks. The modules for the kinds of answers interpret a span (a number, a label, words).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ASCII: dict[int, int | str | None] = {
    **str.maketrans("（）［］：；，．。！？－−–＝＋％＄　\xa0", "()[]:;,..!?---=+%$  "),
    **{0xFF21 + place: chr(65 + place) for place in range(26)},
    **{0xFF10 + place: chr(48 + place) for place in range(10)},
    **dict.fromkeys((0x200B, 0xFEFF), None),
}

_BEST = (
    r"(?:correct|right|best|final|appropriate|likely|logical|suitable|accurate|probable|plausible|"
    r"reasonable|obvious|only|possible|valid|sensible|fitting|natural)"
)
_SUBJECT = (
    r"(?<!\w)(?:answers?(?:\s+(?:choice|option))?"
    rf"|{_BEST}\s+(?:answer\s+)?(?:choices?|options?|ones?|statements?|responses?|results?|closing"
    r"|order|sequence|list))"
)
_ABOUT = r"(?:\s+(?:to|for|in|of|here|choice|option)\b[^.:=\n]{0,80}?)?"
_VERB = r"\s*(?:\b(?:is|are)\b|\b(?:would|will|should|must|could|may|might)\s+be\b)(?!\s+not\b)"
_SOFTLY = (
    r"(?:[\s:,]*\b(?:therefore|thus|then|hence|so|likely|probably|clearly|actually|indeed|simply|"
    r"just|definitely|most\s+likely|that|as\s+follows)\b)*[\s:,]*"
)
_CHOOSE = (
    r"(?<!\w)(?:I|we)(?:\s+would|\s+will|'d|'ll)?\s+"
    r"(?:choose|select|pick|say|go\s+with|opt\s+for)\s+"
)
_CHINESE = (
    r"(?:正确)?(?:答案|选项)\s*(?:应该|应|就)?\s*(?:是|为|选|】|\])\s*[:]?\s*|答案\s*:\s*"
    r"|(?:故|因此|所以|应该|应|本题|应当)\s*选择?\s*[:]?\s*"
)
_HASHES = (
    r"^[ \t]*\#{4}[ \t]*(?!\#|\d+[.)]\s+\S)"
    r"(?=[^A-Za-z\s]|[A-Za-z](?:\W|$)|(?i:yes|no|true|false)\b)"
)
_STATED = re.compile(rf"{_SUBJECT}{_ABOUT}{_VERB}{_SOFTLY}|{_CHOOSE}|{_CHINESE}", re.IGNORECASE)
_HEADED = re.compile(
    rf"(?:{_SUBJECT}|(?<!\w)ans\.?)\s*(?::|=|-+>?|→|–|—)\s*|-->\s*"
    r"|^\W*(?:choice|option|conclusion)\s*:\s*",
    re.IGNORECASE,
)
_HASHED = re.compile(_HASHES, re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
# A text that repeats itself up to its budget has thousands of marks; only the last ones count.
_MOST_MARKS = 32
# Characters after a mark that are searched.
_LONGEST_REST = 4000
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|math(?:bf|rm|it|sf)|boldsymbol|bf)\s*\{([^{}]*)\}"
)
_NEXT_QUESTION = re.compile(
    r"\n\s*(?:#+\s*)?(?:Q|Question|Problem|User|Human|Instruction|问题?)\s*\d*\s*:", re.IGNORECASE
)
_REFUSES = re.compile(
    r"\b(?:can\s?not|can't|could not|couldn't|unable to|impossible to|not possible to|"
    r"difficult to|hard to)\s+(?:\w+\s+){0,2}?"
    r"(?:determin\w*|answer\w*|say|tell|conclude|provide|assist|help|choose|select|comply)"
    r"|\b(?:not enough|insufficient|no) information\b"
    r"|\bI (?:do not|don't) know\b|\bnone of the (?:given |above |provided )?(?:options|choices)\b"
    r"|\bdepends on\b|无法(?:确定|回答|判断)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"(?<=[!?])\s+|(?<=\.)\s+(?=[^\sa-z])|(?<=[.!?][\"')*$])\s+(?=[A-Z])|\n+"
)
_MARKS = (_BOXED, _STATED, _HEADED, _HASHED)


class Span(NamedTuple):
    """The text that a mark points at.

    Attributes:
      text: the text up to the end of the line.
      start: position of the mark.
      boxed: the text is the whole content of a box.
    """

    text: str
    start: int
    boxed: bool


def cleaned(output: str) -> str:
    """A model's text, prepared for the search.

    Full-width signs become ASCII. Hidden thoughts are removed, and so are the questions that a base
    model goes on to ask itself after marking an answer.
    """
    text = output.translate(_ASCII)
    text = text.rpartition("</think>")[2].strip()
    ends = [match.end() for each in _MARKS for match in [each.search(text)] if match]
    following = _NEXT_QUESTION.search(text, min(ends)) if ends else None
    return text[: following.start()].strip() if following else text


def marked_spans(text: str) -> list[Span]:
    """The spans after the marks of a final answer, last mark first.

    Statements before a closing refusal do not count, except for boxes.

    Args:
      text: a text from ``cleaned``.
    """
    spans = [Span(content, start, True) for start, content in boxed_contents(text)]
    for start, end, headed in _positions(text)[-_MOST_MARKS:]:
        rest = _rest_of_line(text, end)
        if rest and not (headed and _is_prose(rest)):
            spans.append(Span(rest, start, False))
    spans.sort(key=lambda span: -span.start)
    if spans and refuses(text[spans[0].start :]) and not spans[0].boxed:
        return [span for span in spans if span.boxed]
    return spans


def boxed_contents(text: str) -> list[tuple[int, str]]:
    r"""(start, content) of each ``\boxed{content}`` with braces matched; unclosed ones run on."""
    found = []
    for match in list(_BOXED.finditer(text))[-_MOST_MARKS:]:
        depth = 0
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                break
        else:
            place = len(text)
        found.append((match.start(), text[match.end() + 1 : place]))
    return found


def bold_spans(text: str) -> list[str]:
    """The bold spans of the last paragraph, last first."""
    return [match[1].strip() for match in _BOLD.finditer(last_paragraph(text))][::-1]


def last_paragraph(text: str) -> str:
    """The text after the last empty line."""
    return re.split(r"\n\s*\n", text.strip())[-1]


def sentences(text: str) -> list[str]:
    """The sentences of a text; the end of a line ends a sentence."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def closing_sentences(text: str) -> list[str]:
    """The sentences of the last paragraph, last first; none if the text ends in a refusal."""
    found = sentences(last_paragraph(text))[::-1]
    return [] if found and refuses(found[0]) else found


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer."""
    return _REFUSES.search(text) is not None


def without_emphasis(text: str) -> str:
    """A text without Markdown's bold markers."""
    return text.replace("**", "").replace("__", "")


def unwrapped(text: str) -> str:
    r"""A text without LaTeX's fonts and mathematics: "\text{(C) city}" becomes "(C) city"."""
    before = None
    while before != text:
        before, text = text, _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[(\[\])]|\\[ ,;!]|\\quad", " ", text)
    text = text.replace("$", " ").strip()
    braced = re.fullmatch(r"\{+([^{}]*)\}+", text)
    return braced[1].strip() if braced else text


def _positions(text: str) -> list[tuple[int, int, bool]]:
    """(start, end, whether it is a heading) of each mark other than boxes."""
    found = [(m.start(), m.end(), False) for m in _STATED.finditer(text)]
    found += [(m.start(), m.end(), True) for m in _HEADED.finditer(text)]
    found += [(m.start(), m.end(), False) for m in _HASHED.finditer(text)]
    return sorted(found)


def _rest_of_line(text: str, start: int) -> str:
    """The rest of the line, or the next non-empty line if the rest is empty."""
    for line in text[start : start + _LONGEST_REST].split("\n"):
        if re.search(r"[\w()\[\]{}<>]", line.replace("\\[", "").replace("\\(", "")):
            return line.strip()
    return ""


def _is_prose(rest: str) -> bool:
    """Whether the text after "Answer:" is an explanation of several sentences, not an answer."""
    parts = sentences(rest)
    return len(parts) > 1 and len(parts[0].split()) > 6
