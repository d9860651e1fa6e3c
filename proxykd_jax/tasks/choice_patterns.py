"""Patterns of labels, and of the words that choose, deny or consider a choice."""

from __future__ import annotations

import re

# A label, perhaps in brackets.
LETTER = r"[(\[]?([A-Z])[)\]]?"

LEAD = re.compile(
    r"[\s:;,.\-—>\"'`*#<|]*(?:(?:the|letter|option|choice|answer|statement|number|alternative|"
    r"most\s+likely|yes|okay|probably|likely|definitely|clearly|therefore|thus|so|hence|either|both|options|choices|"
    r"statements|answers|I\s+(?:think|believe|say|guess)|maybe|perhaps|I'd\s+say|it\s+(?:is|must\s+be|should\s+be)|it's|that|this|"
    r"is|an?\s+combination\s+of|labell?ed|选项|选|为|是)(?![A-Za-z])[\s:,\"'`*]*)*",
    re.IGNORECASE,
)
LEAD_CHINESE = re.compile(r"[选项为是\s:【]*")
JOINED = re.compile(r"\s*(?:,|、|;|/|&|\+)?\s*(?:\b(?:and|or)\b|和|及|与|或)?\s*", re.IGNORECASE)
NAMED = re.compile(
    r"(?:(?:the|option|choice|answer|statement|letter|maybe|perhaps|possibly|even)\s+)*",
    re.IGNORECASE,
)
OR_VALUE = re.compile(r"\d\W*\sor\s\W*\d")
OR = re.compile(r"\bor\b|或|/", re.IGNORECASE)
BRACKETED = re.compile(r"[(\[]\s*([A-Za-z0-9])\s*(?:[)\]]|$)")
BARE = re.compile(r"(?<![A-Za-z0-9_\\])([A-Z0-9])(?![A-Za-z0-9_]|'[a-z])")
LOWER = re.compile(r"([a-z])\s*[).:]?\s*$|([a-z])\)|([a-z])[.:]\s")
RUN = re.compile(r"(?<![A-Za-z0-9_])[A-Z]{2,}(?![A-Za-z0-9_])")
RIGHT = (
    r"(?:preferable|more\s+(?:accurate|precise|plausible|specific|appropriate|suitable|likely)|(?:most\s+)?(?:correct|right|best|better|appropriate|accurate|answer|true|valid|suitable|"
    r"plausible)|most\s+likely)\b(?=\s*(?:[.,;:!)\"'—]|$|(?:answer|choice|option|one|fit|match|candidate|bet|statement|"
    r"response|explanation|description|because|since|as|than|and|for|here|in|to|based|so|due)\b))"
)
CALLED_RIGHT = re.compile(
    r"(?:(?:[(\[]([A-Za-z0-9])[)\]]|(?i:\b(?:option|choice|answer|statement)\s+)([A-Z0-9]|[a-z](?=\)))\)?(?!\w))"
    r"(?:[.:,]?\s+[^.\n]{1,80}?)?|(?<!\w)([A-Z0-9]))\s+(?:is|are|seems|must\s+be)\s+"
    r"(?:indeed\s+|therefore\s+|clearly\s+|thus\s+)?(?:(?:the|my)\s+)?(?:only\s+|final\s+)?"
    rf"{RIGHT}"
    rf"|\b[Oo]nly\s+(?:option\s+)?{LETTER}\s+(?:can|[a-z]+s)\b(?!\s+(?:\w+\s+)?(?:wrong|incorrect|false|eliminated|excluded))"
    rf"|(?<!\w){LETTER}(?:[.:]?\s+[^.\n,]{{1,60}}?)?\s+is\s+the\s+only\s+\w+(?:\s+\w+)?\s+(?:that|which|who|to|in|with|where)\b"
    r"(?![^.]*\b(?:wrong|incorrect|false|eliminated|excluded|fails?)\b)"
    rf"|\b(?:makes?|making)\s+{LETTER}\s+the\s+(?:\w+\s+)?(?:answer|choice|option)\b"
    rf"|(?:^|\b(?:option|choice|so|but|and)\s+|,\s+){LETTER}\s+(?:fits|works|matches|wins|remains|is\s+left|stands\s+out|makes\s+(?:the\s+)?(?:most\s+)?sense)\b"
    r"|(?<![A-Za-z])([A-Z])\s*(?:选项|项)?\s*(?:是)?(?:正确|符合|说法正确)"
    r"|只有\s*([A-Z])(?![A-Za-z])"
)
OPTION = re.compile(
    r"(?i:\b(?:option|choice|answer|选项)\s*)[(\[]?([A-Z0-9]|[a-z](?=[)\]]))[)\]]?(?![A-Za-z0-9_])"
)
ORDINAL = re.compile(
    r"\b(first|second|third|fourth|fifth|sixth)\s+(?:option|choice|answer|alternative|one)\b",
    re.IGNORECASE,
)
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
EXCLUDES = re.compile(
    r"\b(?:eliminat\w*|incorrect|wrong|false|rule[sd]?\s+out|ruling\s+out|neither|nor|unlikely|"
    r"exclud\w*|irrelevant|not|except|cannot|never|rather\s+than|instead\s+of|unlike|"
    r"result(?:s|ed)?\s+(?:from|of)|errors?|不|错误|排除)\b|n't\b|排除|错误|不(?:选|对|正确|符合|是)",
    re.IGNORECASE,
)
NEGATES = re.compile(r"\b(?:not|except|cannot|none|never)\b|n't\b", re.IGNORECASE)
# A finite verb ends the reach of a denial before it: "what he does not like is (A)".
VERB = re.compile(
    r"\b(?:is|are|was|were|must\s+be|would\s+be)\b(?!\s*(?:not|n't))|是", re.IGNORECASE
)
CLAUSE = re.compile(
    r"[,;:]|\s-+\s|—|\b(?:but|so|therefore|thus|hence|while|whereas|because|since|although|though|"
    r"however|and\s+(?:not|so|therefore|thus)\b)",
    re.IGNORECASE,
)
# What denies a choice that stands before it: "(A) is not", "(B) city can be eliminated".
DOUBTS = re.compile(r"(?:\bnot|n't)\s+(?:think|believe|say)\b|\bdoubt\b", re.IGNORECASE)
_IS_WRONG = (
    r"(?:(?:is|are|was|were|do|does|did|can|could|would|should|must|may|has|have|"
    r"seems?|appears?)\b\s*(?:be\s+)?(?:(?:\w+ly|also|thus|a|an|the)\s+)*|\b(?=cannot|isn't|aren't|"
    r"doesn't|don't|can't|won't|wouldn't))(?:not\b|n't\b|cannot|\w+n't|wrong|incorrect|false|eliminated|excluded|ruled\s+out|"
    r"unlikely|irrelevant|out\b)"
)
_IS_WRONG_CHINESE = r"(?:选项|项)?\s*(?:不|错)"
IS_WRONG = re.compile(
    rf"[\"'\s)*]*(?:\w+\s+){{0,3}}?{_IS_WRONG}|\W*{_IS_WRONG_CHINESE}", re.IGNORECASE
)
IS_WRONG_NOW = re.compile(rf"[\"'\s)*]*{_IS_WRONG}|\s*{_IS_WRONG_CHINESE}", re.IGNORECASE)
# "A isn't right; B is."
IS_INSTEAD = re.compile(
    rf"(?:\bnot\b|n't\b|\bwrong\b|\bincorrect\b).*(?:[;,.]\s*|\bbut\s+|\boption\s+){LETTER}\s+(?:is|does|fits)\W*$"
)
# A verb behind a list of labels.
FINITE = (
    r"(?:is|are|was|were|do|does|can|could|has|have|would|should|must|may|might|seems?|fails?|fits?"
    r"|works?)"
)
DENIED_AFTER = re.compile(
    r"\b(?:not|cannot|wrong|incorrect|false|eliminated|excluded|out|unlikely|irrelevant|fail)\b|n't\b"
)
LEAVES = re.compile(
    r"\b(?:(?:none|nothing|no|all|every\w*|each)\b[^.,;]*?\bexcept(?:\s+for)?|leav(?:es|ing)|left\s+with|remaining\s+(?:option|choice|answer)\s+is)"
    r"(?:\s+(?:us|me|only|just|with))*\s+(?:the\s+)?",
    re.IGNORECASE,
)
# What follows a bare label at the start of a sentence that is an answer: "B, I think".
ENDS_ANSWER = re.compile(r"\s*(?:[.,;!)]|$|(?:because|since|as|not|but|though|it\s+is)\b)")
ENDS_IN_LABEL = re.compile(
    r"(?<!nything\s)\b(?i:so|it's|thus|therefore|hence|leaves|leaving|choose|pick|select|go\s+with|only|is|be|but|towards?|supports?|favou?rs?|points?\s+to|indicates?|suggests?|corresponds\s+to|corresponding\s+to|matches|likely|probably|definitely|clearly|surely|"
    r"(?:reflection|balance|instead|actually|rather|finally|ultimately|overall|had\s+to|in\s+the\s+end)(?=,)),?\s+"
    r"(?i:it(?:'s|\s+is|\s+must\s+be)\s+|option\s+|choice\s+|with\s+)*([B-Z0-9]|A(?=\W*$))\W*$"
    r"|\b(?i:is\s+it|answer|option|choice|conclusion)\s*:\s+([A-Z0-9])\W*$"
)
INSTEAD = re.compile(
    r"\bnot\b[^.]*?\b(?:but|rather)\s+(?:it\s+is\s+)?|不是[^,]*,\s*而?是", re.IGNORECASE
)
PREFERS = re.compile(
    r"\b(?:most\s+likely|more\s+likely|probably|likely|preferably|but|leaning\s+towards?|"
    r"(?:I|we)(?:'d|'ll|\s+\w+)?\s+(?:say|choose|pick|go\s+with|prefer|lean\s+towards?))\b",
    re.IGNORECASE,
)
SO_NOT = re.compile(r"\W*(?:no|not|wrong|out|it(?:'s|\s+is)\s+(?:not|out|wrong))\W*", re.IGNORECASE)
SO = re.compile(r"[,;.]\s+(?:and\s+)?(?:so|thus|therefore|hence)\b", re.IGNORECASE)
# What points to one of several choices: "the one in Africa is ..", "only ..".
POINTS_LAST = re.compile(
    r"(?<!\bnor\s)(?<!\bso\s)\b(?:is|be|are)(?:\s+(?:the|an?|in|at|called))?\W+$", re.IGNORECASE
)
POINTS_FIRST = re.compile(
    r"\W*[,;-]?\s*(?:since|because|as|not|rather|and\s+not|but\s+not|which|i\.e|that\s+is)\b",
    re.IGNORECASE,
)
POINTS = re.compile(r"(?<!\bnot\s)\bonly\s+(?:the\s+|an?\s+)?\W*$", re.IGNORECASE)
# A sentence that considers a choice, or goes through them, does not choose it.
CONSIDERS = re.compile(
    r"\W*(?:if|suppose|assume|let's|let\s+us|let\s+me|consider|looking\s+at|"
    r"(?:next|now|first(?:ly)?|second(?:ly)?|then)\b(?!.*\b(?:so|thus|therefore|hence)\b)|we\s+(?:need|have|must|should|can)\s+(?:to\s+)?(?:look|consider|check|find|determine|"
    r"see|decide)|(?:we|I)(?:'ll|\s+(?:will|can|now|must|should))*\s+(?:check|consider|look|examine|"
    r"analy[sz]e|evaluate|begin|start)|whether|maybe|perhaps)\b|.*\?\W*$",
    re.IGNORECASE | re.DOTALL,
)
CONCLUDES = re.compile(
    r"\b(?:so|thus|therefore|hence|conclu\w+|must|likely|best|correct|right|answer|choose|would|should|"
    r"only|leav\w+|means|summary|overall|finally|based\s+on)\b|^\W*(?:it|this|that)(?:'s|\s+is)\b|所以|因此|故",
    re.IGNORECASE,
)
# "B is what I would choose": all of a text.
SUBJECT = re.compile(
    rf"(?:[Oo]ption\s+)?{LETTER}\s+(?:is|was|would|must|has\s+to|looks?|seems?|appears?|stands|works|fits)\b"
)
CHOSEN = re.compile(r"\bI(?:'d|'ll|\s+would|\s+will)\s+\w+(?:\s+\w+)?\s+[(\[]?([A-Z])[)\]]?\W*$")
# "B over A", "A, not B": the choice that is not meant, at the end.
PASSED_OVER = re.compile(
    r"[,\s]+(?:over|rather\s+than|instead\s+of|(?:and\s+|but\s+)?not)\s+(?:option\s+)?[(\[]?[A-Z][)\]]?\W*$"
)
ALL_RIGHT = re.compile(
    r"((?:[A-Z]\s*[、,和及与]\s*)+[A-Z])\s*(?:项|选项)?\s*(?:均|都|是|说法)*\s*正确"
)
SPACED = re.compile(r"[A-Z](?: [A-Z])+(?![\w'])")
ONE_LABEL = re.compile(r"[\s(\[]*(?:\d+[.):]\s*)?[(\[]?([A-Z])[\s.)\]]*")
ONLY_LABELS = re.compile(r"[A-Z]{2,}[.)]?|(?:[(\[]?[A-Z0-9][)\]]?[\s,、;/&]*(?:and\s+)?){2,}[.]?")
# What may follow a bare "A" or "I" that is a label and not a word.
AFTER_LABEL = re.compile(
    r"\s*(?:$|[^\w\s]|(?:because|since|as|is|are|and|or|for|due|with|which|here|over|then|instead|"
    r"rather|not|but|it\s+is)\b)"
)
ORNAMENTS = "|\"'`*_<> →⇒∴=>✅✓✔☑-"
_YES = r"(?P<yes>yes|true|correct|right|✓|✔|✅|☑|对|正确)"
_NO = r"(?:no|not\s+(?:true|correct|right)|false|incorrect|wrong|✗|✘|❌|×|错误?|不正确)"
LABEL_FIRST = re.compile(r"(?:(?:^|\n)\W*|(?<![A-Za-z0-9]))([A-Z0-9])(?![A-Za-z0-9])")
# A verdict on a choice, after its label and text or at the end of its line.
JUDGED = re.compile(
    rf"[\s).:?\]|*—-]{{0,6}}(?:(?:is|are)\s+)?(?:{_YES}|{_NO})(?![A-Za-z])", re.IGNORECASE
)
JUDGED_LAST = re.compile(rf"[\s,.:;(]+(?:{_NO}|{_YES})[^\w\n]*$", re.IGNORECASE)
ALL = re.compile(r"\ball\s+of\s+(?:the\s+)?(?:above|these|them|options|choices)\b", re.IGNORECASE)
# Verdicts on two things in turn: "the first is true, but the second is not".
VERDICT = re.compile(
    r"(?P<denied>\b(?:not|isn't|aren't|doesn't|nothing|cannot\s+be)\s+(?:\w+ly\s+)*(?:a\s+|be\s+)?)?"
    r"\b(?:(?P<right>true|correct|right|hold|holds|acceptable|fine|okay|ok)"
    r"|(?:wrong|false|incorrect|untrue|does\s+not\s+hold|immoral))\b",
    re.IGNORECASE,
)
IS_NOT = re.compile(
    r"\W*(?:\w+\W+){0,4}?(?:(?:is|does|do|are|was)\s+not|\w+n't)\W*$", re.IGNORECASE
)
IS_TOO = re.compile(r"\W*(?:is|does|do|are|was)(?:\s+(?:too|also))?\W*$", re.IGNORECASE)
AS_WELL = re.compile(r"\b(?:so|nor|neither)\s+(?:is|does|are|was)\s*$", re.IGNORECASE)
DENIES = re.compile(r"\bnot\b|n't\b", re.IGNORECASE)
BOTH = re.compile(r"\b(?:both|neither)\b(?!\s+(?:of\s+)?(?:the\s+)?options)", re.IGNORECASE)
_THING = r"(?:statement|scenario|claim|case|action)"
FIRST_OR_SECOND = re.compile(
    rf"\b(?:{_THING}\s*(?:1|one|i|a)|the\s+(?:first|former)(?:\s+(?:one|{_THING}))?)\b"
    rf"|(?P<second>\b(?:{_THING}\s*(?:2|two|ii|b)|the\s+(?:second|latter|other)(?:\s+(?:one|{_THING}))?)\b)",
    re.IGNORECASE,
)
TURNS = re.compile(r"[,.;\n|]|\b(?:and|but|while|whereas)\b", re.IGNORECASE)
