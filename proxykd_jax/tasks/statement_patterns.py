"""Patterns of final statements, of refusals, and of what is none of both."""

from __future__ import annotations

import re

ASCII: dict[int, int | str | None] = {
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

BEST = (
    r"(?:correct|right|best|final|appropriate|likely|logical|suitable|accurate|probable|plausible|"
    r"reasonable|obvious|only|possible|valid|sensible|fitting|natural)"
)
SUBJECT = (
    r"(?<!\w)(?:(?<!wrong\s)(?<!incorrect\s)(?<!false\s)(?<!other\s)answers?(?:\s+(?:choice|option))?"
    rf"|{BEST}\s+(?:answer\s+)?(?:choices?|options?|ones?|statements?|responses?|results?|match|fit|candidates?|closing"
    r"|order|sequence|list)"
    r"|(?:final|correct|right)\s+(?:value|total|number|amount|solution|verdict|conclusion|letter)"
    r"|the\s+choice|my\s+(?:final\s+)?(?:choice|pick|guess|selection|response))"
)
ABOUT = (
    r"(?:\s+(?:to|for|in|of|here|that|which|choice|option|then|therefore|(?:I|we|you)\s+\w+)\b[^.:=\n]{0,80}?"
    r"|\s*,[^,.:=\n]{1,40},)?"
)
VERB = (
    r"(?:\s*\b(?:is|are|was|were)(?P<no>n't\b)?"
    r"|'s\b"
    r"|\s+(?:would|will|should|must|could|may|might|can)(?P<nor>n't|\s*not)?(?:\s+(?:therefore|thus|then|hence|surely|clearly|indeed))?\s+be\b"
    r"|\s+(?:can't|won't)(?P<nt>)\s+be\b"
    r"|\s+(?:has|have|needs|appears?|seems?|turns\s+out|works\s+out|would\s+have)\s+to\s+be\b"
    r"|\s+(?:equals|comes\s+(?:out\s+)?to)\b)"
    r"(?P<not>(?:\s+(?:\w+ly\s+)?(?:not|never)\b)+)?"
)
SOFTLY = (
    r"(?:[\s:,]*\b(?:therefore|thus|then|hence|so|likely|probably|clearly|actually|indeed|simply|"
    r"just|definitely|surely|perhaps|maybe|really|also|going\s+to\s+be|(?:clear|obvious)(?=\s*:)|"
    r"I\s+(?:think|believe)|of\s+course|most\s+likely|that|as\s+follows)\b)*[\s:,]*"
)
LETTER_NEXT = r"(?=[\"'(\[]*(?-i:[A-Z])(?!\w))"
CHOOSE = (
    r"(?<!\w)(?:I|we)(?:\s+would|\s+will|\s+must|\s+should|\s+do|'d|'ll)?(?:\s+have\s+to)?\s+"
    r"(?:choose|select|pick|say|go\s+(?:with|for)|opt\s+for|settle\s+on|vote\s+for|answer\s+with)"
    r"\s+(?:that\s+)?"
    r"|(?<!\w)I(?:'ve|\s+have)\s+(?:chosen|selected|picked)\s+"
    r"|(?<!\w)I(?:'m|\s+am)\s+(?:going\s+(?:with|for)|choosing|picking|selecting)\s+"
    r"|(?<!\w)(?:I|we)(?:'d|'ll|\s+would|\s+will|'m|\s+am)?\s+(?:answer|prefer|favou?r|guess|lean(?:ing)?\s+towards?|bet\s+on)\s+"
    rf"{LETTER_NEXT}"
    r"|\blet's\s+(?:go\s+with|choose|pick|select|say)\s+"
)
LABEL_NEXT = r"(?=[\"'(\[]*[A-Z]+(?![A-Za-z]))"
CHINESE = (
    r"(?:答案|选项)\s*(?:应该|应当|应|就|只能)?\s*(?:(?P<bu>不)(?:是|为|应是)|是|为|选择?|】|\])"
    r"\s*:?\s*"
    rf"|(?:答案?|解答)\s*[:】\]]\s*|答案\s*(?=[(\[]*[A-Z0-9](?![A-Za-z]))"
    r"|(?<!不)(?<!不能)(?<!不应)(?<!不该)(?<!不会)(?<!不可)(?<!如果)(?<!若)选择?\s*:?\s*"
    rf"(?:的?是\s*)?{LABEL_NEXT}"
    r"|(?:故|因此|所以|综上|综上所述|应|应当|应该)\s*[,:]?\s*(?:应?该?是|为|只有)?\s*"
    r"(?=[A-Z](?:[A-Z、,和]*[A-Z])?\s*(?:项|选项)?\s*(?:[.;!]|$|正确|符合|对))"
    r"|(?:正确|错误|符合题意|符合要求|不当|有误|恰当)的?\s*(?:一项|选项|说法|结论)?\s*(?:的?是|为|有)"
    rf"\s*:?\s*{LABEL_NEXT}"
)
ELSEWHERE = (
    r"(?<!\w)(?:r[ée]ponse|antwort|lösung|respuesta|risposta|resposta|antwoord|odpowiedź|cevap|"
    r"yanıt|ответ|відповідь|đáp\s+án|jawaban|svar(?:et)?|vastaus)"
    r"(?:\s+(?:correct[ae]?|final[ea]?|exacte|corretta|certa|juste|đúng))?"
    r"\s*(?::|(?:est|ist|lautet|es|è|é|is|adalah|là|är|er|это|—)\s)\s*:?\s*"
    rf"(?:(?:(?:l[ae]|el|a|o|der|die|das|het|de)\s+)?(?:(?:lettre|letra|lettera|opción|opção|opzione|option|"
    rf"optie|buchstabe|вариант)\s+)?{LETTER_NEXT})?"
    r"|(?:答え|正解|解答|回答)\s*(?:は|:)\s*:?、?\s*|(?:정답|답)\s*(?:은|는|:)\s*:?\s*"
)
STATED = re.compile(
    rf"{SUBJECT}{ABOUT}{VERB}{SOFTLY}|{CHOOSE}|{CHINESE}|{ELSEWHERE}", re.IGNORECASE
)
HEADED = re.compile(
    rf"(?:{SUBJECT}|(?<!\w)ans\.?)\s*(?::|=|-+>?|→|—)\s*|-->\s*"
    r"|^Q\s*:[^\n]*\n+A\s*:\s*|^[^\w\n]*(?:choice|option|conclusion|verdict|final|decision|selection|correct|pick)\s*:\s*"
    r"|^[^\w\n]*(?:\d+[.)]\s*)?(?:the\s+)?(?:final\s+|correct\s+|my\s+)*answer\W*$",
    re.IGNORECASE | re.MULTILINE,
)
HASHED = re.compile(r"^[ \t]*\#{4}(?!\#)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
FIELD = re.compile(
    r"<(?P<tag>(?:final[ _-]?)?answer|ans|final|choice|option|result|solution)>"
    r"(?P<tagged>.*?)(?:</(?P=tag)\s*>|\n\s*\n|\Z)"
    r"|\[(?P<mark>(?:final[ _-]?)?answer)\](?P<bracketed>[^\[]*?)\[/(?P=mark)\]"
    r"|[\"'](?:(?:final|correct|my|the)?[ _-]?answer|"
    r"answer[ _-]?(?:choice|label|letter|key|option|text)|choice|"
    r"predict(?:ed|ion)[ _-]?\w*|(?:selected|correct)?[ _-]?option)[\"']\s*:\s*"
    r"(?P<value>\"(?:[^\"\\]|\\.)*\"|'[^'\n]*'|\[[^\]]*\]|[^\s,}\]]+)",
    re.IGNORECASE | re.DOTALL,
)
BOXED = re.compile(
    r"(?:\\f|(?:\\|\x08|(?<![A-Za-z\\]))(?:b?oxed|fbox))\s*(?=\{)|\[\[(?=[^\[\]\n]{1,80}\]\])"
)
BOXED_BARE = re.compile(r"\\boxed\s*([A-Za-z0-9.]+)(?![A-Za-z{])")
# A text that repeats itself up to its budget has thousands of marks; only the last ones count.
MOST_MARKS = 32
# A list's mark before an answer that stands alone on a line.
BULLET = re.compile(r"[-*•+]\s+(?=\S)")
# Characters after a mark that are searched.
LONGEST_REST = 4000
# A statement with more words may explain, so it decides only if it gives an answer.
MOST_WORDS = {"stated": 15, "headed": 5}
BOLD = re.compile(r"\*\*(.+?)\*\*(\s*:)?", re.DOTALL)
TITLE = re.compile(
    r"\W*(?:step|part|note|case|question|problem|explanation|reason(?:ing)?|solution|analysis|"
    r"summary|check|verification|scenario|given|calculation)s?\b|\W*\d+[.)]\s+[A-Za-z]",
    re.IGNORECASE,
)
WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf)?|math(?:bf|rm|it|sf)|mbox|boldsymbol|bf)\s*\{([^{}]*)\}"
)
NEXT_QUESTION = re.compile(
    r"\n\s*(?:#+\s*)?(?:Q|Question|Problem|User|Human|Instruction|问题?)\s*\d*\s*:", re.IGNORECASE
)
HTML = re.compile(r"</?(?:p|em|i|u|span|div)(?:\s[^<>]*)?>", re.IGNORECASE)
HTML_BOLD = re.compile(r"</?(?:b|strong)>", re.IGNORECASE)
END_OF_TURN = re.compile(r"<\|(?:im_end|im_start|eot_id|endoftext|end)\|>|</s>")
NAMES_OF_THOUGHT = r"(?:think(?:ing)?|thoughts?|reasoning)"
THOUGHT_BEGINS = re.compile(
    rf"<{NAMES_OF_THOUGHT}>|\[{NAMES_OF_THOUGHT}\]|<\|begin_of_thought\|>|◁think▷", re.IGNORECASE
)
THOUGHT_ENDS = re.compile(
    rf"</{NAMES_OF_THOUGHT}>|\[/{NAMES_OF_THOUGHT}\]|<\|end_of_thought\|>|◁/think▷"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
# What precedes a mark that says what is not meant: "if the answer is", "some would say the answer
# is".
UNMEANT = re.compile(
    r"(?:\b(?:if|whether|unless|suppose|supposing|assume|thought)"
    r"|\b(?:one|some|many|people|they|you|others|someone)\s+(?:people\s+)?"
    r"(?:might|may|could|would|will)\s+(?:\w+\s+)?(?:think|say|guess|expect|argue|assume))"
    r"\b[^,.;:!?\n]{0,40}$",
    re.IGNORECASE,
)
# The start of a text that speaks about an answer without giving one: "correct", "the one that ..".
POINTER = re.compile(
    r"\W*(?:(?:in)?correct|final|right|wrong|true|false|clear|obvious|simple|easy|found|given|obtained|"
    r"based|determined|supported|consistent|shown|explained|discussed|derived|calculated|computed|"
    r"reached|above|below|as|because|since|if|when|that|which|what|on|by|to|from|using|let|here|"
    r"first|next|we|I\s+\w{2,}|step|sum|product|(?:the\s+)?(?:one|ones|same|option|choice|answer|statement|"
    r"sum|product|difference|number|total|value|result|following|above)\b)(?:\b|$)"
    r"|\W*(?:不?正确|错误|对|不对|如下)",
    re.IGNORECASE,
)
REASONS = re.compile(r"\W*(?:let|first|next|we|to|step|since|because|given|here)\b", re.IGNORECASE)
INSTEAD = re.compile(
    r"(?:\b(?:but|rather|instead)\b[\s,:]*(?:it(?:'s|\s+is)\s+)?|[,;]\s*(?:(?:so|thus|therefore|hence)\s+)?it(?:'s|\s+is)\s+"
    r"|而?是\s*)(?!not\b)",
    re.IGNORECASE,
)
KNOWING = (
    r"(?:determin\w*|answer\w*|say(?:ing)?|tell(?:ing)?|conclude|provide|give|assist|help|choose|select|pick|decide|"
    r"comply|know(?:ing)?|solve|find|identify|calculat\w*|comput\w*|infer|deduce|estimate)"
)
CANNOT = (
    r"(?:can\s?not|can't|could\s+not|couldn't|unable\s+to|not\s+able\s+to|impossible\s+to|"
    r"not\s+possible\s+to|difficult\s+to|hard\s+to)"
)
# A text that says that the question has no answer, or that it does not give one.
NO_ANSWER = (
    r"\b(?:answer|question|problem|it|this)\s+(?:to\s+this\s+question\s+)?"
    r"(?:can\s?not|can't|could\s+not|couldn't)\s+be\s+(?:\w+ly\s+)?"
    r"(?:determined|answered|known|given|found|calculated|inferred|concluded|solved|decided)"
    rf"|\bno\s+(?:\w+\s+)?way\s+(?:to|of)\s+{KNOWING}\b|\bthere\s+is\s+no\s+(?:telling|knowing)\b"
    rf"|\b{CANNOT}\s+(?:\w+\s+){{0,2}}?{KNOWING}\s+(?:(?:the|a|an|one|any|this|that|your|which)\s+)?"
    r"(?:\w+\s+){0,2}?(?:answer|question|choice|option|request|is\s+(?:right|correct))\b"
    r"|\bI(?:'m|\s+am)?\s+(?:can\s?not|can't|unable\s+to|not\s+able\s+to)\s+"
    r"(?:help|assist|comply|choose|answer|decide)\b"
    r"|\bnone\s+of\s+(?:the\s+)?(?:given\s+|above\s+|provided\s+|listed\s+|available\s+|answer\s+|"
    r"five\s+|four\s+|three\s+|two\s+)*(?:options?|choices?|answers?|statements?|above|these|those|them)\b"
    r"(?![^.,;]{0,20}\s(?:except|but|besides|other\s+than)\b)"
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
REFUSES_AT_ALL = re.compile(
    rf"{NO_ANSWER}|\b{CANNOT}\s+(?:be\s+)?(?:\w+\s+){{0,2}}?{KNOWING}"
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
REFUSES = re.compile(NO_ANSWER, re.IGNORECASE)
TAKES_BACK = re.compile(
    r"\b(?:(?:wait|no|hmm|oh),?\s+that(?:'s|\s+is)\s+(?:wrong|incorrect|not\s+right)|oops|scratch\s+that|"
    r"on\s+second\s+thoughts?|I\s+made\s+(?:a\s+mistake|an\s+error)|correction\s*:)",
    re.IGNORECASE,
)
# A sentence that begins anew after a statement; it takes the statement back if it concludes.
CORRECTS = re.compile(
    r"(?:^|(?<=[.!?…\n])|—|\s-+|,(?=\s*I\s+mean))[\s*]*(?:but\s+|oh,?\s+|hmm[,.]*\s+)*"
    r"(?:wait|hold\s+on|hmm|actually|sorry(?=,)|no(?=,|\s+wait)(?:,?\s+wait)?|I\s+mean|(?:I|I've|I\s+have)\s+changed\s+my\s+mind|"
    r"on\s+(?:reflection|(?:closer|second|further|more\s+careful)\s+(?:look|thought|inspection|reflection)s?)|let\s+me\s+(?:correct|redo|fix|rethink|reconsider|recompute|recalculate))\b(?:[,:]?\s*no(?=[,:]))?",
    re.IGNORECASE,
)
# A correction with no more words is an answer itself.
MOST_WORDS_ANEW = 3
CONCLUDES_ANEW = re.compile(
    r"\b(?:so|thus|therefore|hence|should\s+be|must\s+be|it(?:'s|\s+is)|instead|mak(?:es|ing)|gives?)\b|=|→"
    r"|所以|因此|应",
    re.IGNORECASE,
)
# A check of the result at the end of a text.
CHECKS = re.compile(
    r"(?:^|(?<=[.!?\n])\s*)[\s*#(]*(?:(?:we|you|I)\s+can\s+(?:also\s+)?(?:verify|check|confirm)|"
    r"(?:as\s+a\s+)?(?:quick\s+)?(?:check|verification|verifying|checking)\b|to\s+(?:double[\s-]*)?(?:verify|check|confirm)\b|"
    r"let(?:'s|\s+us|\s+me)\s+(?:\w+\s+)?(?:double[\s-]*)?(?:verify|check)\b|double[\s-]*check|验证|检验)",
    re.IGNORECASE,
)
# A note at the end of a text, or a sentence in brackets.
NOTES = re.compile(
    r"(?:^|(?<=[.!?\n])\s*)[\s*#(_]*(?:please\s+)?(?:note\b|"
    r"key\s+(?:takeaways?|formulas?|concepts?|points?|facts?|ideas?)\b)"
    r"|(?<=[.!?])\s*\([A-Z][^()]{15,}\)\W*$",
    re.IGNORECASE,
)
# A conclusion inside a check or a note.
AGAIN = re.compile(
    r"\b(?:so|thus|therefore|hence|actually|wait|instead|wrong|mistake)\b|所以|因此", re.IGNORECASE
)
# The end of a text that stops in the middle of a sentence or an expression.
STOPS = re.compile(
    r"(?:[-+*/×÷=(^]|\b(?:of|the|is|are|an?|to|and|for|by|with|that|we|[Ss]o|then|from|as))\s*$"
)
SENTENCE_END = re.compile(
    r"(?<=[!?])\s+"
    r"|(?<=\.)(?<!\bi\.e\.)(?<!\be\.g\.)(?<!\bvs\.)(?<!\bMr\.)(?<!\bDr\.)(?<!\bMrs\.)(?<!\bMs\.)"
    r"(?<!\bSt\.)(?<!\bNo\.)(?<!\bapprox\.)(?<!\bRs\.)(?<!\bca\.)(?<!\bcf\.)(?<!\bEq\.)(?<!\bFig\.)\s+(?=[^\sa-z]|[a-z]\s)"
    r"|(?<=[.!?][\"')*$])\s+(?=[A-Z])|\n+"
)
OFFER = re.compile(
    r"(?:^|(?<=[.!?\n*])\s*)(?:would\s+you\s+like|do\s+you\s+(?:want|need|have)|is\s+there\s+anything|"
    r"does\s+(?:that|this)\s+(?:help|make\s+sense)|(?:please\s+)?let\s+me\s+know|"
    r"(?:I\s+)?hope\s+(?:this|that|it)\s+\w+|feel\s+free)[^.!?\n]*[.!?]*\s*$",
    re.IGNORECASE,
)
TAGS = re.compile(r"</?(?:(?:final[ _-]?)?answer|ans|final|result|output|response|solution)\s*>")
