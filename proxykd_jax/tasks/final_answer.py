r"""Finds the final statements of a model's text: the places where it says what its answer is.

The forms of a final statement, and where each may stand:

- box: ``\boxed{B}``, ``\fbox{B}``, ``[[B]]``; anywhere.
- field: ``<answer>B</answer>``, ``{"answer": "B"}``; anywhere.
- hashes: ``#### 18``; a line of its own, and with words after the number only the last line.
- stated: "the answer is B", "I would choose B", 故选B, "La respuesta es B"; anywhere.
- headed: "Answer: B", "Réponse : B", or a heading "Final answer" above the answer; short ones only.
- refusal: "the answer cannot be determined", "none of the options is right"; after the others.

The last final statement decides, even if it names no possible answer. ``decide`` applies that rule
for every kind of answer. ``closing_sentences`` returns the conclusion of a text without statements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_ASCII: dict[int, int | str | None] = {
    **str.maketrans(
        "（）［］：，．！？－−–＝＋％＄　\xa0\u202f\u2009\u2007⁄", "()[]:,.!?---=+%$     /"
    ),
    **str.maketrans("“”„«»‘’‚", '"""""\'\'\''),
    **{0xFF21 + place: chr(65 + place) for place in range(26)},
    **{0xFF41 + place: chr(97 + place) for place in range(26)},
    **{0xFF10 + place: chr(48 + place) for place in range(10)},
    **{0x0660 + place: chr(48 + place) for place in range(10)},
    **dict.fromkeys((0x200B, 0xFEFF), None),
    ord("。"): ". ",
    ord("；"): "; ",
}

_BEST = (
    r"(?:correct|right|best|final|appropriate|likely|logical|suitable|accurate|probable|plausible|"
    r"reasonable|obvious|only|possible|valid|sensible|fitting|natural)"
)
_SUBJECT = (
    r"(?<!\w)(?:answers?(?:\s+(?:choice|option))?"
    rf"|{_BEST}\s+(?:answer\s+)?(?:choices?|options?|ones?|statements?|responses?|results?|closing"
    r"|order|sequence|list)"
    r"|(?:final|correct|right)\s+(?:value|total|number|amount|solution|verdict|conclusion|letter)"
    r"|my\s+(?:final\s+)?(?:choice|pick|guess|selection|response))"
)
_ABOUT = (
    r"(?:\s+(?:to|for|in|of|here|that|which|choice|option|then|therefore|(?:I|we|you)\s+\w+)\b[^.:=\n]{0,80}?"
    r"|\s*,[^,.:=\n]{1,40},)?"
)
_VERB = (
    r"(?:\s*\b(?:is|are|was|were)(?P<no>n't\b)?"
    r"|'s\b"
    r"|\s+(?:would|will|should|must|could|may|might|can)(?P<nor>n't|\s*not)?\s+be\b"
    r"|\s+(?:can't|won't)(?P<nt>)\s+be\b"
    r"|\s+(?:has|have|needs|appears?|seems?|turns\s+out|works\s+out|would\s+have)\s+to\s+be\b"
    r"|\s+(?:equals|comes\s+(?:out\s+)?to)\b)"
    r"(?P<not>(?:\s+(?:\w+ly\s+)?(?:not|never)\b)+)?"
)
_SOFTLY = (
    r"(?:[\s:,]*\b(?:therefore|thus|then|hence|so|likely|probably|clearly|actually|indeed|simply|"
    r"just|definitely|surely|perhaps|maybe|really|also|going\s+to\s+be|(?:clear|obvious)(?=\s*:)|"
    r"I\s+(?:think|believe)|of\s+course|most\s+likely|that|as\s+follows)\b)*[\s:,]*"
)
_CHOOSE = (
    r"(?<!\w)(?:I|we)(?:\s+would|\s+will|\s+must|\s+should|\s+do|'d|'ll)?(?:\s+have\s+to)?\s+"
    r"(?:choose|select|pick|say|go\s+(?:with|for)|opt\s+for|settle\s+on|vote\s+for|answer\s+with)"
    r"\s+(?:that\s+)?"
    r"|(?<!\w)I(?:'ve|\s+have)\s+(?:chosen|selected|picked)\s+"
    r"|(?<!\w)I(?:'m|\s+am)\s+(?:going\s+(?:with|for)|choosing|picking|selecting)\s+"
    r"|\blet's\s+(?:go\s+with|choose|pick|select|say)\s+"
)
_LABEL_NEXT = r"(?=[\"'(\[]*[A-Z]+(?![A-Za-z]))"
_CHINESE = (
    r"(?:答案|选项)\s*(?:应该|应当|应|就|只能)?\s*(?:(?P<bu>不)(?:是|为|应是)|是|为|选择?|】|\])"
    r"\s*:?\s*"
    rf"|答案?\s*:\s*|答案\s*(?=[(\[]*[A-Z0-9](?![A-Za-z]))"
    r"|(?<!不)(?<!不能)(?<!不应)(?<!不该)(?<!不会)(?<!不可)(?<!如果)(?<!若)选择?\s*:?\s*"
    rf"(?:的?是\s*)?{_LABEL_NEXT}"
    r"|(?:故|因此|所以|综上|综上所述|应|应当|应该)\s*,?\s*"
    r"(?=[A-Z](?:[A-Z、,和]*[A-Z])?\s*(?:项|选项)?\s*(?:[.;!]|$|正确|符合|对))"
    r"|(?:正确|错误|符合题意|符合要求|不当|有误|恰当)的?\s*(?:一项|选项|说法|结论)?\s*(?:的?是|为)"
    rf"\s*:?\s*{_LABEL_NEXT}"
)
_ELSEWHERE = (
    r"(?<!\w)(?:r[ée]ponse|antwort|lösung|respuesta|risposta|resposta|antwoord|odpowiedź|cevap|"
    r"yanıt|ответ|відповідь|đáp\s+án|jawaban|svar(?:et)?|vastaus)"
    r"(?:\s+(?:correct[ae]?|final[ea]?|exacte|corretta|certa|juste|đúng))?"
    r"\s*(?::|(?:est|ist|lautet|es|è|é|is|adalah|là|är|er|это|—)\s)\s*:?\s*"
    r"|(?:答え|正解|解答|回答)\s*(?:は|:)\s*:?、?\s*|(?:정답|답)\s*(?:은|는|:)\s*:?\s*"
)
_STATED = re.compile(
    rf"{_SUBJECT}{_ABOUT}{_VERB}{_SOFTLY}|{_CHOOSE}|{_CHINESE}|{_ELSEWHERE}", re.IGNORECASE
)
_HEADED = re.compile(
    rf"(?:{_SUBJECT}|(?<!\w)ans\.?)\s*(?::|=|-+>?|→|—)\s*|-->\s*"
    r"|^Q\s*:[^\n]*\n+A\s*:\s*|^[^\w\n]*(?:choice|option|conclusion|verdict|final|decision|selection|correct|pick)\s*:\s*"
    r"|^[^\w\n]*(?:\d+[.)]\s*)?(?:the\s+)?(?:final\s+|correct\s+|my\s+)*answer\W*$",
    re.IGNORECASE | re.MULTILINE,
)
_HASHED = re.compile(r"^[ \t]*\#{4}(?!\#)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_FIELD = re.compile(
    r"<(?P<tag>(?:final[ _-]?)?answer|ans|final|choice|option|result|solution)>"
    r"(?P<tagged>.*?)(?:</(?P=tag)\s*>|\n\s*\n|\Z)"
    r"|\[(?P<mark>(?:final[ _-]?)?answer)\](?P<bracketed>[^\[]*?)\[/(?P=mark)\]"
    r"|[\"'](?:(?:final|correct|my|the)?[ _-]?answer|"
    r"answer[ _-]?(?:choice|label|letter|key|option|text)|choice|"
    r"predict(?:ed|ion)[ _-]?\w*|(?:selected|correct)?[ _-]?option)[\"']\s*:\s*"
    r"(?P<value>\"(?:[^\"\\]|\\.)*\"|'[^'\n]*'|\[[^\]]*\]|[^\s,}\]]+)",
    re.IGNORECASE | re.DOTALL,
)
_BOXED = re.compile(
    r"(?:\\f|(?:\\|\x08|(?<![A-Za-z\\]))(?:b?oxed|fbox))\s*(?=\{)|\[\[(?=[^\[\]\n]{1,80}\]\])"
)
_BOXED_BARE = re.compile(r"\\boxed\s*([A-Za-z0-9.]+)(?![A-Za-z{])")
# A text that repeats itself up to its budget has thousands of marks; only the last ones count.
_MOST_MARKS = 32
# Characters after a mark that are searched.
_LONGEST_REST = 4000
# A statement with more words may explain, so it decides only if it gives an answer.
_MOST_WORDS = {"stated": 15, "headed": 5}
_BOLD = re.compile(r"\*\*(.+?)\*\*(\s*:)?", re.DOTALL)
_TITLE = re.compile(
    r"\W*(?:step|part|note|case|question|problem|explanation|reason(?:ing)?|solution|analysis|"
    r"summary|check|verification|scenario|given|calculation)s?\b|\W*\d+[.)]\s+[A-Za-z]",
    re.IGNORECASE,
)
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|math(?:bf|rm|it|sf)|mbox|boldsymbol|bf)\s*\{([^{}]*)\}"
)
_NEXT_QUESTION = re.compile(
    r"\n\s*(?:#+\s*)?(?:Q|Question|Problem|User|Human|Instruction|问题?)\s*\d*\s*:", re.IGNORECASE
)
_END_OF_TURN = re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end)\|>|</s>")
_NAMES_OF_THOUGHT = r"(?:think(?:ing)?|thoughts?|reasoning)"
_THOUGHT_BEGINS = re.compile(
    rf"<{_NAMES_OF_THOUGHT}>|\[{_NAMES_OF_THOUGHT}\]|<\|begin_of_thought\|>|◁think▷", re.IGNORECASE
)
_THOUGHT_ENDS = re.compile(
    rf"</{_NAMES_OF_THOUGHT}>|\[/{_NAMES_OF_THOUGHT}\]|<\|end_of_thought\|>|◁/think▷"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
# What precedes a mark that says what is not meant: "if the answer is", "some would say the answer
# is".
_UNMEANT = re.compile(
    r"(?:\b(?:if|whether|unless|suppose|supposing|assume|thought)"
    r"|\b(?:one|some|many|people|they|you|others|someone)\s+(?:people\s+)?"
    r"(?:might|may|could|would|will)\s+(?:\w+\s+)?(?:think|say|guess|expect|argue|assume))"
    r"\b[^,.;:!?\n]{0,40}$",
    re.IGNORECASE,
)
# The start of a text that speaks about an answer without giving one: "correct", "the one that ..".
_POINTER = re.compile(
    r"\W*(?:(?:in)?correct|final|right|wrong|true|false|clear|obvious|simple|easy|found|given|obtained|"
    r"based|determined|supported|consistent|shown|explained|discussed|derived|calculated|computed|"
    r"reached|above|below|as|because|since|if|when|that|which|what|on|by|to|from|using|let|here|"
    r"first|next|we|I\s+\w{2,}|step|sum|product|(?:the\s+)?(?:one|ones|same|option|choice|answer|statement|"
    r"sum|product|difference|number|total|value|result|following|above)\b)(?:\b|$)"
    r"|\W*(?:不?正确|错误|对|不对|如下)",
    re.IGNORECASE,
)
_REASONS = re.compile(r"\W*(?:let|first|next|we|to|step|since|because|given|here)\b", re.IGNORECASE)
_INSTEAD = re.compile(
    r"(?:\b(?:but|rather|instead)\b[\s,:]*(?:it(?:'s|\s+is)\s+)?|[,;]\s*it(?:'s|\s+is)\s+"
    r"|而?是\s*)(?!not\b)",
    re.IGNORECASE,
)
_KNOWING = (
    r"(?:determin\w*|answer\w*|say|tell|conclude|provide|give|assist|help|choose|select|pick|decide|"
    r"comply|know|solve|find|identify|calculat\w*|comput\w*|infer|deduce|estimate)"
)
_CANNOT = (
    r"(?:can\s?not|can't|could\s+not|couldn't|unable\s+to|not\s+able\s+to|impossible\s+to|"
    r"not\s+possible\s+to|difficult\s+to|hard\s+to)"
)
# A text that says that the question has no answer, or that it does not give one.
_NO_ANSWER = (
    r"\b(?:answer|question|problem|it|this)\s+(?:to\s+this\s+question\s+)?"
    r"(?:can\s?not|can't|could\s+not|couldn't)\s+be\s+(?:\w+ly\s+)?"
    r"(?:determined|answered|known|given|found|calculated|inferred|concluded|solved|decided)"
    rf"|\b{_CANNOT}\s+(?:\w+\s+){{0,2}}?{_KNOWING}\s+(?:(?:the|a|an|one|any|this|that|your|which)\s+)?"
    r"(?:\w+\s+){0,2}?(?:answer|question|choice|option|request|is\s+(?:right|correct))\b"
    r"|\bI(?:'m|\s+am)?\s+(?:can\s?not|can't|unable\s+to|not\s+able\s+to)\s+"
    r"(?:help|assist|comply|choose|answer|decide)\b"
    r"|\bnone\s+of\s+(?:the\s+)?(?:given\s+|above\s+|provided\s+|listed\s+|available\s+|answer\s+|"
    r"five\s+|four\s+|three\s+|two\s+)*(?:options?|choices?|answers?|statements?|above|these|those|them)\b"
    r"(?!\s+(?:except|but|besides|other\s+than))"
    r"|\b(?:is|are|there(?:'s|\s+is))\s+no\s+(?:single\s+|definitive\s+|one\s+)?"
    r"(?:correct|right|valid|suitable|appropriate|definitive|clear)\s+(?:answer|choice|option)"
    r"|\bno\s+(?:correct|right|valid|suitable|appropriate)\s+(?:answer|choice|option)"
    r"|\bno\s+(?:option|choice|answer)\s+(?:is|fits|matches|works|seems|can\s+be)\b"
    r"|\b(?:correct|right)\s+(?:answer|option|choice)\s+is\s+"
    r"(?:missing|absent|not\s+(?:here|there|listed|given))"
    r"|\b(?:not|isn't|aren't)\s+(?:listed|included|given|provided|present|available)?\s*"
    r"(?:among|one\s+of|in)\s+(?:any\s+of\s+)?(?:the|these)\s+(?:\w+\s+)?(?:options|choices|answers)"
    r"|\b(?:answer|choice|it)\s+(?:would\s+|will\s+|really\s+)?depends?\s+on\b"
    r"|\b(?:choice|option|answer)\s+(?:would|will)\s+depend\s+on\b"
    r"|无法(?:确定|回答|判断|得出|作答)|不能确定|没有正确(?:答案|选项)|以上(?:都|均)(?:不|错)|信息不足"
)
_REFUSES_AT_ALL = re.compile(
    rf"{_NO_ANSWER}|\b{_CANNOT}\s+(?:be\s+)?(?:\w+\s+){{0,2}}?{_KNOWING}"
    r"|\b(?:not\s+enough|insufficient|no)\s+(?:\w+\s+)?(?:information|context|data)\b"
    r"|\b(?:missing|lacks?)\s+(?:\w+\s+)?(?:information|data|details?)\b"
    r"|\b(?:information|data|values?|details?)\s+(?:is|are)\s+(?:missing|not\s+\w+)"
    r"|\bI\s+(?:do\s+not|don't)\s+know\b|\bdepends\s+on\b"
    r"|^\W*(?:none|neither|nothing|no\s+answer|no\s+solution|not\s+(?:possible|stated|provided|"
    r"mentioned|specified|clear|certain|given|listed|here|known|"
    r"available|determinable|applicable)|impossible|unknown|unclear|undetermined|indeterminate|"
    r"unanswerable|ambiguous|n/a|null|nan)\b(?!\s*(?:of\s+the\s+other))",
    re.IGNORECASE,
)
_REFUSES = re.compile(_NO_ANSWER, re.IGNORECASE)
_TAKES_BACK = re.compile(
    r"\b(?:(?:wait|no|hmm|oh),?\s+that(?:'s|\s+is)\s+(?:wrong|incorrect|not\s+right)|oops|scratch\s+that|"
    r"on\s+second\s+thoughts?|I\s+made\s+(?:a\s+mistake|an\s+error)|correction\s*:)",
    re.IGNORECASE,
)
# The end of a text that stops in the middle of a sentence or an expression.
_STOPS = re.compile(
    r"(?:[-+*/×÷=(^]|\b(?:of|the|is|are|an?|to|and|for|by|with|that|we|[Ss]o|then|from|as))\s*$"
)
_SENTENCE_END = re.compile(
    r"(?<=[!?])\s+"
    r"|(?<=\.)(?<!\bi\.e\.)(?<!\be\.g\.)(?<!\bvs\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bMrs\.)(?<!\bMs\.)"
    r"(?<!\bSt\.)(?<!\bNo\.)(?<!\bapprox\.)\s+(?=[^\sa-z]|[a-z]\s)"
    r"|(?<=[.!?][\"')*$])\s+(?=[A-Z])|\n+"
)
_OFFER = re.compile(
    r"(?:^|(?<=[.!?\n*])\s*)(?:would\s+you\s+like|do\s+you\s+(?:want|need|have)|is\s+there\s+anything|"
    r"does\s+(?:that|this)\s+(?:help|make\s+sense)|(?:please\s+)?let\s+me\s+know|"
    r"(?:I\s+)?hope\s+(?:this|that|it)\s+\w+|feel\s+free)[^.!?\n]*[.!?]*\s*$",
    re.IGNORECASE,
)
_TAGS = re.compile(r"</?(?:(?:final[ _-]?)?answer|ans|final|result|output|response|solution)\s*>")


class Statement(NamedTuple):
    """A place where a text says what its answer is.

    Attributes:
      text: what it says, up to the end of the line.
      start: position in the text.
      form: "box", "field", "hashes", "stated", "headed" or "refusal".
      denied: it says what the answer is not; the text begins with "not".
    """

    text: str
    start: int
    form: str
    denied: bool = False

    @property
    def whole(self) -> bool:
        """Whether the text is nothing but an answer."""
        return self.form in ("box", "field")

    @property
    def first(self) -> str:
        """The part that may hold the answer: all of a box or field, otherwise one sentence."""
        return self.text if self.whole else (sentences(self.text) or [""])[0]

    @property
    def decides(self) -> bool:
        """Whether it is final even if it gives no possible answer."""
        if self.form in ("box", "field", "hashes", "refusal"):
            return True
        if refuses(self.first):
            return True
        if self.denied or not re.search(r"\w", self.first) or _POINTER.match(self.first):
            return False
        return len(self.first.split()) <= _MOST_WORDS[self.form]


def cleaned(output: str) -> str:
    """A model's text, prepared for the search.

    Full-width signs become ASCII. Hidden thoughts are removed; what follows the beginning of
    thoughts that do not end is no answer either. So are the questions that a base model goes on to
    ask itself after an answer.
    """
    text = _without_thoughts(output.translate(_ASCII)).strip()
    if ended := _END_OF_TURN.search(text, 1):
        text = text[: ended.start()].strip()
    ends = [match.end() for each in _MARKS for match in [each.search(text)] if match]
    following = _NEXT_QUESTION.search(text, min(ends)) if ends else _NEXT_QUESTION.search(text)
    if following and (ends or len(text[: following.start()].split()) <= 8):
        return text[: following.start()].strip()
    return text


def _without_thoughts(text: str) -> str:
    begun = _THOUGHT_BEGINS.search(text)
    *_, ended = [None, *_THOUGHT_ENDS.finditer(text)]
    if ended is not None:
        before = text[: begun.start()] if begun and begun.start() < ended.start() else ""
        text = before + "\n" + text[ended.end() :]
        begun = _THOUGHT_BEGINS.search(text)
    return text[: begun.start()] if begun else text


def decide(text: str, read: Callable[[Statement], str | None]) -> tuple[bool, str | None]:
    """(whether a final statement decides, the answer that it gives).

    Args:
      text: a text without emphasis.
      read: the answer in a statement; "" if it names several without deciding, None if none.
    """
    for statement in statements(text):
        found = read(statement)
        if found is not None:
            return True, found or None
        if statement.decides:
            return True, None
    return False, None


def statements(text: str) -> list[Statement]:
    """The final statements of a text, last first.

    What the text takes back ("no, that's wrong") is none. A refusal is one only after a statement
    in words: a box, a field and hashes stand, whatever doubts follow them.
    """
    found = [*_boxes(text), *_fields(text), *_hashed(text), *_said(text)]
    *_, taken_back = [None, *_TAKES_BACK.finditer(text)]
    if taken_back is not None:
        found = [each for each in found if each.start > taken_back.start()]
    found.sort(key=lambda statement: -statement.start)
    found = found[:_MOST_MARKS]
    if found and found[0].form in _MOST_WORDS:
        first = found[0].first
        begin = max(found[0].start, text.find(first, found[0].start)) + len(first)
        *_, last = [None, *_REFUSES.finditer(text, min(begin, len(text)))]
        if last is not None:
            rest = _rest_of_line(text, last.start())
            found.insert(0, Statement(rest, last.start(), "refusal"))
    return found


def boxed_contents(text: str) -> list[tuple[int, str]]:
    r"""(start, content) of each ``\boxed{content}``, braces matched; unclosed ones run on."""
    found = [(match.start(), match[1]) for match in _BOXED_BARE.finditer(text)]
    for match in list(_BOXED.finditer(text))[-_MOST_MARKS:]:
        if text[match.start()] == "[":
            place = text.index("]]", match.end())
            found.append((match.start(), text[match.end() : place]))
            continue
        depth = 0
        for place in range(match.end(), len(text)):
            if text[place - 1] == "\\" and place > match.end():
                continue
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                break
        else:
            place = len(text)
        found.append((match.start(), text[match.end() + 1 : place]))
    return sorted(found)


def _boxes(text: str) -> Iterator[Statement]:
    for start, content in boxed_contents(text):
        if content.strip():
            yield Statement(content, start, "box")


def _fields(text: str) -> Iterator[Statement]:
    for match in _FIELD.finditer(text):
        content = next(
            match[name] for name in ("tagged", "bracketed", "value") if match[name] is not None
        )
        if match["value"] is not None:
            content = content.strip("\"'").replace("\\\\", "\\").replace('\\"', '"')
            content = re.sub(r"^\[|\]$|[\"']", "", content) if content[:1] == "[" else content
        if not _is_prose(content.strip()):
            yield Statement(content.strip(), match.start(), "field")


def _hashed(text: str) -> Iterator[Statement]:
    matches = list(_HASHED.finditer(text))
    for match in matches[-_MOST_MARKS:]:
        said = match[1]
        if re.match(r"\d+[.):]\s+\S|\d+\s+-\s", said) or not re.match(
            r"[^A-Za-z\s]|[A-Za-z](?:\W|$)|(?i:yes|no|true|false|valid|invalid)\b", said
        ):
            continue
        rest = text[match.end() :].strip()
        # "#### 2024 sales" above a text is a heading.
        if re.search(r"[A-Za-z]{2}", said[2:]) and rest and not rest.startswith("####"):
            continue
        yield Statement(said, match.start(), "hashes")


def _said(text: str) -> Iterator[Statement]:
    """Statements in words, without those that are only assumed, asked or about something else."""
    for match in list(_STATED.finditer(text))[-_MOST_MARKS:]:
        rest = _rest_of_line(text, match.end())
        before = text[max(0, match.start() - 100) : match.start()]
        if not rest or _UNMEANT.search(before) or (sentences(rest) or [""])[0].endswith("?"):
            continue
        denied = any(match[name] is not None for name in ("no", "nor", "nt", "not", "bu"))
        if denied and (instead := _INSTEAD.search((sentences(rest) or [""])[0])):
            yield Statement(rest[instead.end() :].strip(), match.start(), "stated")
        else:
            yield Statement(f"not {rest}" if denied else rest, match.start(), "stated", denied)
    for match in list(_HEADED.finditer(text))[-_MOST_MARKS:]:
        rest = _rest_of_line(text, match.end())
        if rest and not _is_prose(rest):
            yield Statement(rest, match.start(), "headed")


_MARKS = (_BOXED, _STATED, _HEADED, _HASHED, _FIELD)


def bold_spans(text: str) -> list[str]:
    """The bold spans of the last paragraph, last first, without titles ("Step 2", "Total:")."""
    paragraph = last_paragraph(text)
    found = []
    for match in _BOLD.finditer(paragraph):
        line = paragraph[paragraph.rfind("\n", 0, match.start()) + 1 :]
        alone = re.match(r"\W*" + re.escape(match[0]) + r"\W*?\n", line) is not None
        title = alone and re.search(r"[A-Za-z]{2}", match[1]) is not None
        titled = match[2] or match[1].rstrip().endswith(":") or _TITLE.match(match[1])
        if not title and not titled:
            found.append(match[1].strip())
    return found[::-1]


def last_paragraph(text: str) -> str:
    """The text after the last empty line."""
    return re.split(r"\n\s*\n", text.strip())[-1]


def sentences(text: str) -> list[str]:
    """The sentences of a text; the end of a line ends a sentence."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def refuses_firmly(text: str) -> bool:
    """Whether a text says of the answer or the options that there is none or none is right."""
    return _REFUSES.search(text) is not None


def closing_sentences(text: str) -> list[str]:
    """The sentences of the last paragraph, last first; none after a question or if it stops short.

    Offers of more help at the end are no part of the conclusion.
    """
    text = _TAGS.sub("\n", text)
    while offer := _OFFER.search(text):
        text = text[: offer.start()].rstrip()
    found = sentences(last_paragraph(text))[::-1]
    return [] if found and (found[0].endswith("?") or _STOPS.search(text)) else found


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer, or gives none."""
    return refused(text) is not None


def refused(text: str) -> int | None:
    """The position at which a text says that there is no answer; None if it does not."""
    found = _REFUSES_AT_ALL.search(text)
    return None if found is None else found.start()


def without_emphasis(text: str) -> str:
    """A text without Markdown's markers of bold and italic words."""
    text = text.replace("**", "").replace("__", "")
    return re.sub(r"(?<![A-Za-z0-9_])_([^_\n]+)_(?![A-Za-z0-9_])", r"\1", text)


def unwrapped(text: str) -> str:
    r"""A text without LaTeX's fonts and mathematics: "\text{(C) city}" becomes "(C) city"."""
    before = None
    while before != text:
        before, text = text, _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[(\[\])]|\\[ ,;!]|\\quad", " ", text)
    text = text.replace("$", " ").strip()
    braced = re.fullmatch(r"\{+([^{}]*)\}+", text)
    return braced[1].strip() if braced else text


def _rest_of_line(text: str, start: int) -> str:
    """The rest of the line, or the next non-empty line if the rest is empty."""
    for line in text[start : start + _LONGEST_REST].split("\n"):
        line = re.split(r"</[A-Za-z_]+>", line)[0]
        if re.search(r"[\w()\[\]{}<>]", line.replace("\\[", "").replace("\\(", "")):
            return line.strip()
    return ""


def _is_prose(rest: str) -> bool:
    """Whether the text after "Answer:" is an explanation of several sentences, not an answer."""
    parts = sentences(rest)
    return len(parts) > 1 and (len(parts[0].split()) > 6 or _REASONS.match(parts[0]) is not None)
