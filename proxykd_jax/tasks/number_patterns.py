"""Patterns of numbers in figures, and of what stands around them."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_.])
    (?P<sign>-\s?(?=[$€£¥₹]?\s?[\d.])|)
    (?:(?:US)?[$€£¥₹]\s?)?
    (?P<minus>-|)
    (?P<whole>
        \d{1,3}(?:,\d{3})+(?!\d)              # 1,234
      | \d{1,2}(?:,\d{2})+,\d{3}(?!\d)        # 12,34,567
      | \d{1,3}(?:[ ']\d{3})+(?![\d/])        # 1 234
      | \d{1,3}(?:\.\d{3}){2,}(?!\d)          # 1.234.567
      | \d{1,3}(?:\.\d{3})+(?=,\d\d?(?!\d))   # 1.234,50
      | \d+|(?=\.\d)
    )
    (?P<part>\.\d+|(?<![,(\[]\d)(?<![,(\[]\d\d),\d{1,2}(?![\d,])|)
    (?P<dots>\.\.\.|…|)
    (?:[eE](?P<exponent>[-+]?\d+)(?!\w)|\s*[×x*]\s*10\s*(?:\^|\*\*)\s*\{?(?P<power>[-+]?\d+)\}?)?
    (?:\s+(?P<upper>\d+)\s*/\s*(?P<lower>\d+)(?![\d/])|\s*/\s*(?P<below>\d+)(?![\d/]))?
    (?P<ordinal>(?i:st|nd|rd|th)\b|)(?!\d)
    (?:\s+and\s+(?P<and>an?\s+(?:half|quarter|third)|(?:two\s+thirds|three\s+quarters)|\d/\d+))?
    (?:(?P<letter>k|bn|mn|m|b|\s?[KMB])(?![A-Za-z0-9])
      |\s*-?\s*(?P<scale>(?i:hundred|thousand|million|billion|trillion|dozens?))\b)?
    """,
    re.VERBOSE,
)
LETTERS = {"K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}
# Calculator annotations: keep the result after them, or the one inside if none follows.
CALCULATION = re.compile(r"<<([^<>]*)>>(\s*-?[$€£]?-?[\d,.]*\d)?")
FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))"
)
RECURRING = re.compile(
    r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\)|((?:\d\u0305)+))"
)
# "18 cm^2", "5 m³": the power belongs to the unit.
POWER_OF_UNIT = re.compile(r"(?<=[A-Za-z])\s*(?:\^\s*\{?\s*-?\d\s*\}?|[²³])")
MONTHS = (
    r"Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?"
)
# Times and ratios are no numbers: "10:30", "3:1".
CLOCK = re.compile(
    rf"\b(?:{MONTHS})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b|\b\d{{1,2}}\s+(?:{MONTHS}),?\s+\d{{4}}\b|"
    r"\b\d{4}-\d\d?-\d\d?\b|\b\d\d?/\d\d?/\d{2,4}\b|(?<![\d.])\d+(?::\d+)+(?:\s*[ap]\.?m\b\.?)?",
    re.IGNORECASE,
)
ON_THE_HOUR = re.compile(r"(?<![\d:])(\d{1,2}):00(?=\s*[ap]\.?m\b)", re.IGNORECASE)
# "2550 - 5x", "3/4 * n": a formula with letters is no number.
FORMULA = re.compile(
    r"(?:\d\s*)?(?<![A-Za-z])[a-zA-Z]\s*(?:[-+*/×÷^]|\\div)\s*[$(]?\s*\d"
    r"|\d\)?\s*(?:[-+*/×÷]|\\div)\s*[$(]?\s*\d*\s*[a-zA-Z](?![A-Za-z])"
    r"|\d[xyzn]\W*$"
)
# "in 5 days", "for the 3 of them": a number that says when, for whom or out of how many.
ADJUNCT = re.compile(
    rf"(?:\b(?:{MONTHS})|\b(?:day|week|month|year|step|page|question|case|hour|level|number|grade)"
    r"|\b(?:in|after|for|within|over|at|every|per|during|from|by|until|than|among|between|"
    r"(?<!up\s)(?<!ed\s)(?<!left\s)(?<!leaving\s)(?<!remains\s)with|"
    r"out\s+of|of\s+the|of\s+(?:his|her|their|its|these|those)|all|each|each\s+of|when|if|"
    r"(?:after|before|by|when|of)\s+\w+ing)\s+(?:(?:the|an?|original|his|"
    r"her|their|its|these|those|only|just|about|approximately|next|first|last|other|all|another|day)"
    r"\s+)*[$€£]?)\s*$",
    re.IGNORECASE,
)
# "for 5 apples and 6 pears": what is joined to an adjunct is one as well.
JOINED = re.compile(r"\s*[A-Za-z-]+(?:\s+[A-Za-z-]+)?\s*(?:,|,?\s*\band)\s*$")
DENIED = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever|\brather\s+than|\binstead\s+of|\bneither|\bnor)"
    r"(?:\s+(?:be|equal|just|only|exactly|a|the|get|have|simply|=))*\s*[$€£]?\s*$",
    re.IGNORECASE,
)
NUMBERED_TITLE = re.compile(
    r"^\W*(?:(?:step|part|case|stage|phase)\s*\d+\b[\s:.)-]*|\d+[.)]\s+(?=[A-Za-z]))", re.IGNORECASE
)
STANDS_ALONE = re.compile(
    r"[^\w(]*(?:(?:about|approximately|around|roughly|nearly|almost|exactly|only|just|a\s+total\s+of|"
    r"at\s+least|at\s+most|equal\s+to|the\s+number)\s+[^\w(]*)*",
    re.IGNORECASE,
)
OPERATOR = re.compile(
    r"\s*(?:[-+*/×÷^=≈]|\\approx|x\s*[$\d(]|times\b|plus\b|minus\b|divided\b|%?\s*of\s+\d)|\(\d"
)
GOES_ON = re.compile(rf"(?:\s*[A-Za-z]+(?=\s*[-+]))?(?:{OPERATOR.pattern})", re.IGNORECASE)
# "a 90 L tank": the amount says which tank.
ARTICLE = re.compile(r"\b(?:an?|every)\s+[$€£]?$", re.IGNORECASE)
UNIT_AND_NOUN = re.compile(r"(?:[-\s]\s*[A-Za-z]+|%)\s+[a-z]")
CALCULATES = re.compile(r"\d\s*(?:[×^*+]|x\s*\d)")
UNIT_EQUALS = re.compile(r"(?:\s*[A-Za-z³°%/]+){1,3}\s*[=≈]")
RANGE = re.compile(
    r"\b(?:between|from)\s+[^\d]{0,5}[\d.,]+\w*\s*(?:and|to|-)\s*[^\d]{0,3}\d"
    r"|\d[\w%]*\s*(?:\b(?:or|to)\b|±|或|至|到)\s*[$€£]?\d",
    re.IGNORECASE,
)
LIST = re.compile(r"\W*\d[\d.,]*(?:\s*(?:,|,?\s*\band\b|;)\s+[$€£]?\d[\d.,]*)+\W*")
# "not 12 or 36" at the end.
NOT_THESE = re.compile(r"[,;]?\s+(?:and\s+)?not\s.*", re.DOTALL)
# A number above or before its explanation.
EXPLAINED = re.compile(
    r"(\S+)(?:\s*\n\s*\n|[.!]\s+(?=(?:This|That|Because|Explanation|Reason|Here)\b))"
)
HYPHENED = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)(?![\d.]*\s*[=+*/×])")
RESTATED = re.compile(
    r"\b(?:i\.e\.|that\s+is|to\s+be\s+(?:exact|precise|more\s+precise)|(?:more\s+)?(?:precisely|exactly)(?=\s+[$€£]?\d)|in\s+other\s+words|(?:or\s+)?equivalently|"
    r"round(?:s|ed|ing)?(?:\s+(?:up|down|off))?\s+to\s+(?:the\s+nearest\s+[\w\s]+?,?\s*(?:which\s+)?"
    r"(?:is|gives|=)|(?=[$€£]?\d|about)))(?![\s,:]*\d+\s*/\s*\d+\W*$)[\s,:]*",
    re.IGNORECASE,
)
# "- 33" in a list.
BULLET_NUMBER = re.compile(r"(?<=\n)[ \t]*[-•]\s+(?=[$€£]?\d)")
# "5 hours and 30 minutes"
COMPOUND = re.compile(
    r"[$€£]?([\d,.]*\d)\s+([A-Za-z]+)(?:,\s*|\s+)(?:and\s+)?([\d,.]*\d)\s+([A-Za-z]+)"
)
AND_CENTS = re.compile(r"(\$\d[\d,]*)\s+and\s+(\d{1,2})\s+cents?\b")
# "Since 4 x 9 = 36, ": what stands before the main clause.
PREMISE = re.compile(
    r"\W*(?:since|because|as|given\s+that)\b[^,]*=[^,]*,\s+(?:[^,]*\bwhich\b[^,]*,\s+)?",
    re.IGNORECASE,
)
MINUS = re.compile(
    r"((?:^|[:=]|\b(?:is|was|to|be|of|at|get|equals))\s*[$(]?)(?:minus|negative)\s+(?=\d)",
    re.IGNORECASE,
)
# "14 - 10, which is 4"
WHICH_IS = re.compile(
    r"(\d\s*[-+*/×÷]\s*[$€£]?\d[\d.,]*?),?\s+which\s+(?:is|equals|gives|makes)\s+(?=[$€£]?\d)"
)
REASON = re.compile(r"[,;]?\s+(?:because|since|given\s+that)\b", re.IGNORECASE)
# A text that is only an amount, a range or a list: "5 ft 6 in", "3-5", "3, 4 and 5".
AMOUNT = re.compile(
    r"\W*(?:[^\sA-Za-z]*\d\S*\s*(?:(?!(?:of|and|or|to)\b)[A-Za-z]+[.,]?\s*)?(?:(?:and|or|to)\s+)?){1,4}\W*",
    re.IGNORECASE,
)
# Longer ones are not answers, and Python refuses to parse much longer ones.
ENDLESS = re.compile(r"\d{200,}")
# The part after such a word concludes from the part before.
CLAUSE = re.compile(
    r",?\s+for\s+a\s+(?:grand\s+)?(?:total|sum)\s+of\b|[,;]\s+(?:and\s+)?(?:making|giving|totall?ing|so|thus|therefore|hence|which\s+means|meaning|leaving)\b",
    re.IGNORECASE,
)
# The part after such words explains the part before.
EXPLAINS = re.compile(
    r"\s*(?:[,;:]|\s-+|—)?\s+(?:because|since|as\s+(?=\d)|given|which\s+(?:is|was|are|were)\b|"
    r"of\s+which|including|consisting\s+of|namely|if|when|while|compared)\b|:\s+(?=\S*\w)"
    r"|,\s+[$\d.,]+\s+(?:per|each|for\s+each)\b|\s+to\s+"
    r"(?!get\b|make\b|give\b|reach\b|obtain\b|have\b|find\b|yield\b|about\b|be\b)[a-z]{3,}\b|,?\s+whos?e?\b"
    r"|\s*(?:\bis|,)\s+the\s+(?:sum|product|difference|total|average)\s+of\b"
    r"|,?\s+(?:until|before|so\s+that|in\s+order\s+to|not\s+counting|not\s+including|excluding|ignoring|without\s+counting|"
    r"apart\s+from|aside\s+from|even\s+though|although|though|despite|instead\s+of|rather\s+than)\b"
    r"|\s+after\s+(?:the|his|her|their)\b|[,;]\s+(?:and\s+)?the\s+(?:other|rest)\b|(?<=\d)\s*,?\s*(?:with\s+)?(?:an?\s+)?remainder(?:\s+of)?\s+\d"
    r"|,\s+(?:twice|half|double|\w+\s+times)\b|,\s+(?:up|down)\s+(?:by\s+|from\s+)?(?=[$\d])"
    r"|,\s+[$\d.,]+\s+(?:(?:more|fewer|less)\s+than|of\s+(?:them|which|whom|these|those))\b",
    re.IGNORECASE,
)
UNITS: dict[str, tuple[str, Fraction]] = {
    "second": ("time", Fraction(1)), "minute": ("time", Fraction(60)),
    "hour": ("time", Fraction(3600)), "day": ("time", Fraction(86400)),
    "week": ("time", Fraction(604800)), "cent": ("money", Fraction(1)),
    "dollar": ("money", Fraction(100)), "inch": ("length", Fraction(1)),
    "foot": ("length", Fraction(12)), "yard": ("length", Fraction(36)),
    "ounce": ("weight", Fraction(1)), "pound": ("weight", Fraction(16)),
    "gram": ("mass", Fraction(1)), "kilogram": ("mass", Fraction(1000)),
    "centimeter": ("metric", Fraction(1)), "meter": ("metric", Fraction(100)),
    "kilometer": ("metric", Fraction(100000)), "month": ("age", Fraction(1)),
    "year": ("age", Fraction(12)),
}  # fmt: skip
PLURAL = {"feet": "foot", "inches": "inch", "metre": "meter", "kilometre": "kilometer",
           "centimetre": "centimeter", "ft": "foot", "in": "inch", "hr": "hour", "min": "minute",
           "sec": "second", "lb": "pound", "oz": "ounce", "kg": "kilogram", "g": "gram",
           "km": "kilometer", "m": "meter", "cm": "centimeter"}  # fmt: skip
