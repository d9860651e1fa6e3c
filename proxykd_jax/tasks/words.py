"""Answers that are words of a small set, closing brackets, or words in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from proxykd_jax.tasks.final_answer import (
    Statement,
    bold_spans,
    closing_sentences,
    decide,
    last_paragraph,
    refuses,
    unwrapped,
    without_emphasis,
)

PAIRS = (("true", "false"), ("yes", "no"), ("valid", "invalid"))
# "no" as an answer, not before a noun: "there are no turns".
_NO = (
    r"no(?!\s+(?!(?:because|since|as|and|but|or|if|for|due|given|it|he|she|they|you|we|I|this|that|these|those|"
    r"the|there|in|is|to|not)\b)[A-Za-z])"
)
# Synonyms of the words of a pair; a denied synonym means the other word.
_SYNONYMS = {
    "yes": r"yes|yep|yeah|yup|plausible|correct|true",
    "no": rf"{_NO}|nope|nah|implausible|incorrect|false",
    "true": r"true",
    "false": r"false",
    "valid": r"valid",
    "invalid": r"invalid|does\s+not\s+follow|doesn't\s+follow",
}
_DENIES = (
    r"(?:\b(?:not|cannot|never)|n't)\s+(?:be\s+)?(?:(?:considered|called|deemed|regarded\s+as)\s+)?(?:an?\s+|the\s+)?"
    r"(?:(?:\w+ly|at\s+all|very|even|that)\s+)*"
)
_IS_NOT = re.compile(r"\b(?:isn't|is\s+not|(?:can't|cannot|can\s+not)\s+be)\s+\w+$", re.IGNORECASE)
_EDGES = "\"'“”‘’`*.,:;!?()[]{}$<>\\"
# What stands around brackets in a line that gives them: "The closing brackets are ..", ".. is it".
_AROUND = re.compile(
    r"^[^:]*[A-Za-z)]\s*:\s*|^[^()\[\]{}<>]*\b(?:is|are|be)\b\s*|\s+(?:is|are)\b[^()\[\]{}<>]*$",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"[()\[\]{}<>](?:(?:[\s,\"'`]|\b(?:and|then)\b)*[()\[\]{}<>])*")
# The braces of an answer in a box need not match.
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{\s*(?:\\text\s*\{(?=.*\}\}))?([()\[\]{}<>\s\\$]*[^\s$\\])\}")
_LISTED = re.compile(r"^\s*(?:\d+[.):]|[-*•])\s*(.+?)\s*$")


def pair_of(word: str) -> tuple[str, str] | None:
    """The pair that contains a word, in any case."""
    return next((pair for pair in PAIRS if word.strip().lower() in pair), None)


def one_of(output: str, pair: tuple[str, str]) -> str | None:
    """Which of two words a text gives as its final answer; "not valid" means "invalid".

    The word of the last final statement. Otherwise the first word of the text, if it is one of the
    two. Otherwise the last one in the last sentences of the last paragraph.
    """
    asked = rf"\b{pair[0]}\s*(?:/|or)\s*{pair[1]}\s*[:?]"
    output = re.sub(asked, "", output, flags=re.IGNORECASE)
    text = without_emphasis(output)
    decided, found = decide(text, lambda statement: _in_statement(statement, pair))
    if decided:
        return found
    for part in bold_spans(output):
        if said := _said(part, pair):
            return said[0]
    head = re.match(r"\W*(\w+)\b(?=\W*(?:$|[.,;:!\n]))", text)
    if head and head[1].lower() in pair:
        return head[1].lower()
    for sentence in closing_sentences(text):
        said = _said(sentence, pair)
        # "=": the text stops inside an expression.
        if refuses(sentence) or _both(sentence, pair) or (not said and "=" in sentence):
            return None
        if said:
            return said[-1]
    return None


def _in_statement(statement: Statement, pair: tuple[str, str]) -> str | None:
    text = statement.first
    if _both(text, pair):
        return ""
    said = _said(text, pair)
    return said[0] if said else None


def _both(text: str, pair: tuple[str, str]) -> bool:
    if pair == PAIRS[0]:  # "True or False" is an expression
        return False
    joined = rf"\b{pair[0]}(?:\s+(?:or|and|nor)\s+|\s*/\s*){pair[1]}\b"
    return re.search(joined, text, re.IGNORECASE) is not None


def _said(text: str, pair: tuple[str, str]) -> list[str]:
    """The words of the pair that a text says, in order.

    The end of a chain of expressions counts only if it is a single value: "= False" does,
    "= not False and" does not.
    """
    ways = "|".join(f"(?P<{word}>{_SYNONYMS[word]})" for word in pair)
    pattern = rf"(?P<denied>{_DENIES})?\b(?:{ways})\b"
    _, equals, text = text.replace("\\text", " ").rpartition("=")
    found: list[str] = []
    for match in re.finditer(pattern, text, re.IGNORECASE):
        word = pair[0] if match[pair[0]] else pair[1]
        # "not True" is an expression; "not" denies only adjectives.
        denied = (
            bool(match["denied"])
            and (pair != PAIRS[0] or _IS_NOT.search(text[: match.end()]) is not None)
            and (pair != PAIRS[0] or not re.search(r"\w", text[match.end() :]))
        )
        found.append(pair[1 - pair.index(word)] if denied else word)
    value = re.fullmatch(r"\W*\w+\W*", text) is not None
    return found if value or not equals else []


def brackets_in(output: str, question: str) -> str | None:
    """The brackets that a text gives as its final answer, separated by single spaces.

    An answer that repeats the question's brackets is cut to the closing ones.
    """
    text = without_emphasis(_BOX.sub(r"<answer>\1</answer>", output))
    decided, found = decide(text, lambda each: _brackets(each.text, question, whole=each.whole))
    lines = [line for line in text.strip().split("\n") if line.strip(" `")]
    if decided or not lines:
        return found
    inside = _AROUND.sub("", lines[-1])
    found = _brackets(inside, question, whole=True)
    return found if inside == lines[-1] or (found and found[0] in ")]}>") else None


def _brackets(text: str, question: str, *, whole: bool) -> str | None:
    """The first brackets of a text; of a whole one only if it holds nothing else."""
    text = re.sub(r"\\[()\[\]]", " ", text)
    plain = text.replace("\\{", "{").replace("\\}", "}").replace("\\", " ").replace("$", " ")
    runs = [_joined(match[0]) for match in _BRACKETS.finditer(plain)]
    rest = _BRACKETS.sub("", plain).strip(_EDGES + " ")
    return None if not runs or (whole and rest) else _closing(runs[0], question)


def _joined(run: str) -> str:
    return " ".join(re.findall(r"[()\[\]{}<>]", run))


def _closing(run: str, question: str) -> str:
    asked = _joined(question.rpartition("Input:")[2])
    return run[len(asked) :].strip() if asked and run.startswith(asked) else run


def listed_words(output: str, question: str) -> str | None:
    """The words of a question's list in the order that a text gives them.

    The list may use commas, numbering or one word per line. It runs from the first to the last word
    that occurs in the question.
    """
    asked = [_bare(word) for word in question.rpartition(":")[2].split()]
    text = without_emphasis(output)

    def read(statement: Statement) -> str | None:
        after = [] if statement.whole else _following_list(text[statement.start :])
        return _in_order([unwrapped(statement.text)], asked) or _in_order(after, asked)

    decided, found = decide(text, read)
    if decided:
        return found
    tail = [line for line in last_paragraph(text).split("\n") if line.strip()]
    numbered = [line for line in tail if _LISTED.match(line)]
    for candidate in (tail[-1:], numbered, tail):
        found = _in_order(candidate, asked)
        if found and sorted(found.split()) == sorted(asked):
            return found
    return None


def _following_list(text: str) -> list[str]:
    """The lines after a mark, as long as each is a list item or one word."""
    lines = []
    for line in text.split("\n")[1:]:
        if line.strip() and not _LISTED.match(line) and len(line.split()) > 1:
            break
        lines.append(line)
    return lines


def _in_order(lines: Sequence[str], asked: Sequence[str]) -> str | None:
    words: list[str] = []
    for line in lines:
        item = _LISTED.match(line)
        words += [_bare(word) for word in re.split(r"[\s,;<>→|]+", item[1] if item else line)]
    words = [
        word
        for word in words
        if word in asked or (re.search(r"\w", word) and word != "and" and not word.isdigit())
    ]
    places = [place for place, word in enumerate(words) if word in asked]
    if not places or (len(places) == 1 and len(asked) > 1):
        return None
    return " ".join(words[places[0] : places[-1] + 1])


def _bare(word: str) -> str:
    return word.strip(_EDGES).lower()
