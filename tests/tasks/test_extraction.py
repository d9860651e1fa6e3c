"""The final answer in a model's text: phrases, forms of numbers, labels and formulas."""

from __future__ import annotations

import itertools
import json
import os
import time
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.recorded_scores import OTHER, differences, read_samples
from proxykd_jax.tasks.expression import value
from proxykd_jax.tasks.extraction import extract, is_right
from proxykd_jax.tasks.items import Item, item_of
from proxykd_jax.tasks.maths import same_value
from proxykd_jax.tasks.numbers import canonical

ASSETS = Path(os.environ.get("PROXYKD_ASSETS", "../shared/assets"))
real_files = pytest.mark.skipif(
    not (ASSETS / "eval").is_dir(), reason=f"needs the public files in {ASSETS}/eval"
)

PLACES = (
    ("A", "beat"),
    ("B", "direct traffic"),
    ("C", "city"),
    ("D", "street"),
    ("E", "president"),
)
QUESTION = "Where do police officers work?"
GSM8K = Item("gsm8k", "", "1", "How much?", (), "18", "number")
CSQA = Item("csqa", "", "1", QUESTION, PLACES, "C", "choice")


def choice_item(*texts: str, labels: str = "ABCDEFGHIJ", task: str = "mmlu") -> Item:
    return Item(task, "", "1", "Which?", tuple(zip(labels, texts, strict=False)), "A", "choice")


def bbh(question: str, target: str) -> Item:
    item = item_of("bbh", {"input": question, "target": target}, "some", "1")
    assert item is not None
    return item


NUMBERS = {
    "18": "18", "-3": "-3", "1,050": "1050", "$1,234.50": "1234.5", "12,345,678": "12345678",
    "0.5": "0.5", "25%": "25", "-$40": "-40", "$-40": "-40", "€7": "7", "7.00": "7",
    "1/2": "0.5", "1/3": "1/3", ".25": "0.25", "1.5 million": "1500000", "60 km": "60",
}  # fmt: skip
NUMBER_PHRASES = (
    "The answer is {}.",
    "The answer is {}",
    "Adding 3 and 4 takes 2 steps.\nSo the final answer is: {}.",
    "First 5, then 6.\n#### {}",
    "It is 7 at first.\n\nAnswer: {}",
    "**Answer:** {}",
    "**Final answer: {}**",
    "Thus \\boxed{{{}}} is what remains of 99.",
    "So the answer is $\\boxed{{{}}}$.",
    "He has 3 left. Therefore the total is {}.",
    "5 + 4 = 9, so she pays {} in 2 weeks.",
    "They need **{}** in all.",
    "2 * 3 = {}",
    "{}",
    "The answer is {}.\n\nQuestion: Tom has 4 hats. How many in 2 days?\nAnswer: 8",
    "<think>Maybe 3? The answer is 4.</think>The answer is {}.",
    "答案是{}。",
)


@pytest.mark.parametrize("phrase", NUMBER_PHRASES)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_however_they_are_written_and_announced(number: str, phrase: str):
    assert extract(GSM8K, phrase.format(number)) == NUMBERS[number]


@pytest.mark.parametrize(
    "text, number",
    [
        (r"\boxed{\$1{,}234}", "1234"),
        (r"\boxed{1,\!234}", "1234"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{10 \text{ dollars}}", "10"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{x = 12}", "12"),
        (r"\boxed{2 + 3 = 5}", "5"),
        (r"It is \boxed{3} and not 5. Then \boxed{4} more.", "4"),
        (r"\boxed{\text{Sally}} pays: the answer is 7.", "7"),
        (r"Therefore, Bill is on the \boxed{18th} floor.", "18"),
        ("She sells 9 eggs for $2: 9 * 2 = $<<9*2=18>>18 every day.", "18"),
        ("Therefore, they cost $<<694>>694.", "694"),
        ("So she has $65 - $196 = $<<65-196=-131>>-131 left.", "-131"),
        ("So her earnings are $<<460>>.", "460"),
        ("Therefore, Judy makes $7425.00 in 1 week.", "7425"),
        ("So each of the 5 friends gets 8 slices.", "8"),
        ("Out of 20 students, 5 passed.", "5"),
        ("After 3 days, he has 12 left.", "12"),
        ("She will be ready in 5 days.", "5"),
        ("The difference is 10 - 4 = 6 apples.", "6"),
        ("The difference is 3-5 = -2.", "-2"),
        ("The answer is that he needs 7 bags for 20 people.", "7"),
        ("The correct answer would be 12 hours.", "12"),
        ("The answer is twelve.", "12"),
        ("The answer is 10, since 3 + 2 = 5 and 5 * 2 = 10.", "10"),
        ("The answer is 12, because 4 + 5 = 9.", "12"),
        ("The answer is 3 + 2 = 5.", "5"),
        ("The answer is (3 + 2) = 5 apples.", "5"),
        ("Final Answer: The final answer is $18$. I hope it is correct.", "18"),
        ("Answer: 18 dollars\n\nExplanation: 16 - 7 = 9, and 9 * 2 = 18.", "18"),
        ("A: 18", "18"),
        ("9" * 5000, None),
        ("On day 3 it is 4.\n\n### Step 5\nSo it is 8.", "8"),
        ("#### 1. Count the eggs\nThere are 16.\n#### 2. Subtract\n16 - 7 = 9", "9"),
        (
            "Answer: He buys 3 pens for $2 each, which costs 6. He adds 4 more. The total is 10.",
            "10",
        ),
        ("The answer is not 5. The answer is 6.", "6"),
        ("It cannot be 5, so the answer is 6.", "6"),
        ("I'm sorry, but I cannot answer this question.", None),
        ("There is not enough information to find how many of the 5 remain.", None),
        ("The answer cannot be determined from the 3 facts.", None),
        ("Let me think about it.", None),
        ("", None),
        ("   \n", None),
    ],
)
def test_what_a_number_is_taken_from(text: str, number: str | None):
    assert extract(GSM8K, text) == number


def test_a_number_is_right_if_its_value_is():
    for text in ("The answer is 18.00", r"\boxed{\$18}", "#### 18", "36/2"):
        assert is_right(GSM8K, extract(GSM8K, text)), text
    for text in ("#### -18", "18.5", "1,8", "I do not know", ""):
        assert not is_right(GSM8K, extract(GSM8K, text)), text
    negative = item_of("gsm8k", {"question": "q", "answer": "#### -1,050"}, "", "1")
    assert negative is not None and negative.gold == "-1050"
    assert is_right(negative, extract(negative, "So it is -$1,050.00."))
    assert not is_right(negative, extract(negative, "So it is $1,050."))


def test_canonical_numbers_are_their_values():
    for text in ("0.125", "-7", "1/3", "-2.50", "1,000,000"):
        found = canonical(text)
        assert found is not None and canonical(found) == found
        assert Fraction(found) == Fraction(text.replace(",", ""))
    assert canonical("3 or 4") is None and canonical("none") is None


LABEL_PHRASES = (
    "{0}",
    "({0})",
    "{0}.",
    "{0})",
    "{0}. {1}",
    "({0}) {1}",
    "{0}: {1}",
    "The answer is {0}.",
    "The answer is ({0}).",
    "The answer is ({0}) {1}.",
    "The answer is {0}. {1}",
    "The answer is: {0}",
    "The correct answer is **{0}**.",
    "**{0}. {1}**",
    "**Answer:** {0}",
    "Answer: ({0}) {1}",
    "Answer:\n\n{0}",
    "\\boxed{{{0}}}",
    "$\\boxed{{\\text{{{0}}}}}$",
    "So the choice is \\boxed{{({0}) \\text{{{1}}}}}.",
    "The correct option is {0}.",
    "The best choice would be option {0}, {1}.",
    "Option {0} is correct.",
    "({0}) {1} is the correct answer.",
    "I would choose ({0}).",
    "The most likely answer is ({0}) {1}, because it fits.",
    "Many would say (A) or (B).\n\nBased on this, the answer is {0}",
    "(A) is wrong. (B) is wrong too.\n\nIt must be ({0}) {1}.",
    "{0}\n\nExplanation: it fits what officers do.",
    "{0}. {1}\n\nOfficers do this all day. They do.",
    "Let's think step by step. Officers work somewhere. So the answer is ({0}).",
    "#### {0}",
    "It fits.\n{0}",
    "答案：{0}",
    "故选{0}。",
    "因此，正确答案是（{0}）。",
    "The answer is ({0}).\n\nQ: Where do cats sleep?\nOptions: (A) bed\nA: The answer is (A).",
)


@pytest.mark.parametrize("phrase", LABEL_PHRASES)
@pytest.mark.parametrize("label, text", PLACES)
def test_a_label_however_it_is_announced(phrase: str, label: str, text: str):
    assert extract(CSQA, phrase.format(label, text)) == label


TEXT_PHRASES = (
    "{}",
    "{}.",
    "The answer is {}.",
    'The answer is "{}".',
    "Answer: {}",
    "\\boxed{{\\text{{{}}}}}",
    "Officers are everywhere. Therefore, it is most likely the {}.",
    "The correct answer is the {}, as we know.",
)


@pytest.mark.parametrize("phrase", TEXT_PHRASES)
@pytest.mark.parametrize("label, text", PLACES)
def test_the_text_of_a_choice_where_no_label_is_named(phrase: str, label: str, text: str):
    assert extract(CSQA, phrase.format(text)) == label


@pytest.mark.parametrize(
    "text, label",
    [
        ("A police officer works all day for a city.", "C"),
        ("The answer is a city.", "C"),
        ("I think it is the street.", "D"),
        ("b", "B"),
        ("(b)", "B"),
        ("The answer is (b).", "B"),
        ("The answer is c", "C"),
        ("I eliminate (A) and (B).\n\nThat leaves (C).", "C"),
        ("The answer is not (A). The answer is (B).", "B"),
        ("(C) is right since (A) and (B) are wrong.", "C"),
        ("The answer is (A) or (B).", None),
        ("The answer is either B or C.", None),
        (r"\boxed{(A) beat or (C) city}", None),
        (r"\boxed{(A) beat, (C) city}", "AC"),
        (r"The answer is \boxed{\text{None of the above}}.", None),
        ("None of the options fits.", None),
        ("The answer would be (C) in a town. It is impossible to determine the answer.", None),
        ("I'm sorry, I can't help with that.", None),
        ("This eliminates options (A) and (C).", None),
        ("First, officers serve a town, so choice (C) is correct.", "C"),
        ("So none of the choices (A) to (E) is correct.\n\nIt may help to ask an officer.", None),
        ("(A) bites, (B) shines, (D) rolls", None),
        ("A. beat\nB. direct traffic\nC. city\nD. street\nE. president", None),
        ("What do you think he does?", None),
        ("", None),
        ("The city and the street are both fine.", None),
        ("I'd say B.", "B"),
        ("Choice: C", "C"),
        ("The correct answer is not (A) but something else.", None),
        ("综上，C正确。", "C"),
        ("F", None),
        ("(F) moon", None),
    ],
)
def test_which_label_counts(text: str, label: str | None):
    assert extract(CSQA, text) == label


@pytest.mark.parametrize(
    "text, label",
    [
        ("3", "3"), ("(3)", "3"), ("The answer is 3.", "3"), ("Option 2 is correct.", "2"),
        ("The answer is (4) rock.", "4"), ("The answer is C.", "3"), (r"\boxed{1}", "1"),
        ("There are 2 reasons, 3 of them good. The answer is water.", "2"), ("5", None),
        ("It takes 3 days.", None),
    ],
)  # fmt: skip
def test_numbered_choices(text: str, label: str | None):
    item = choice_item("ice", "water", "steam", "rock", labels="1234", task="arc")
    assert extract(item, text) == label


@pytest.mark.parametrize(
    "text, labels",
    [
        ("The answer is ACD.", "ACD"), ("A, C, D", "ACD"), ("(A)(C)(D)", "ACD"),
        ("The correct options are A, C and D.", "ACD"), ("答案：A、C、D", "ACD"), ("ACD", "ACD"),
        ("Answer: D, A", "AD"), ("正确答案为ABD", "ABD"), (r"\boxed{\text{AC}}", "AC"),
        ("The answer is A, B is wrong.", "A"), ("The answer is (B) and not (C).", "B"),
        ("综上所述，应选BD。", "BD"), ("Both A and C are correct. The answers are A and C.", "AC"),
    ],
)  # fmt: skip
def test_several_right_choices(text: str, labels: str):
    item = choice_item("one", "two", "three", "four", task="agieval")
    assert extract(item, text) == labels


@pytest.mark.parametrize(
    "text, label",
    [
        (r"\boxed{\frac12}", "A"), (r"The answer is $\dfrac{1}{2}$.", "A"), ("So $x = 0.5$.", "A"),
        (r"\boxed{2\sqrt{3}}", "B"), (r"Hence $x = \sqrt{12}$.", "B"), ("#### 5", "C"),
        ("The result is 5 in all.", "C"), (r"\boxed{\{1, 2\}}", "D"), (r"\boxed{7}", None),
    ],
)  # fmt: skip
def test_choices_that_are_formulas(text: str, label: str | None):
    item = choice_item(r"$\frac{1}{2}$", r"$2\sqrt{3}$", "5", r"$\{1,2\}$", task="agieval")
    assert extract(item, text) == label


@pytest.mark.parametrize(
    "target, text, answer",
    [
        ("False", "not True = False. So the answer is False.", "false"),
        ("True", "**True**", "true"),
        ("True", "True", "true"),
        ("True", "Z = not not True = True", "true"),
        ("True", "= not not False = not not False = not", None),
        ("no", "The answer is no.", "no"),
        ("no", "No, he plays baseball.", "no"),
        ("yes", "The sentence is plausible.", "yes"),
        ("no", "So the sentence is not plausible.", "no"),
        ("no", "It is implausible, so the answer is no.", "no"),
        ("Yes", "Going back, we are at the start. The answer is Yes.", "yes"),
        ("invalid", "The argument is deductively invalid.", "invalid"),
        ("invalid", "Hence the argument is not deductively valid.", "invalid"),
        ("valid", "Answer: valid", "valid"),
        ("valid", "I cannot tell.", None),
        ("24", "(46) - (22) = 24. So the answer is 24.", "24"),
        ("-50", "The answer is -50.", "-50"),
        ("-11520", "(-288) * (40) = -11,520", "-11520"),
        ("9", "There are nine. The answer is nine.", "9"),
        ("] }", 'So, we need "]", "}". So the answer is ] }.', "] }"),
        ("] }", "The answer is `] }`", "] }"),
        ("] }", "[ { ( ) } ]}", "[ { ( ) } ] }"),
        ("] }", "]}", "] }"),
        ("] }", "The answer is { [ ( ) ] }.", "] }"),
        ("] }", "3: ( ; stack: { [ (\n4: ) ; stack: {", None),
        ("ant bee cat", "The answer is ant bee cat.", "ant bee cat"),
        ("ant bee cat", "ant, bee, cat", "ant bee cat"),
        ("ant bee cat", "The sorted list is: Ant, bee, cat.", "ant bee cat"),
        ("ant bee cat", "Sorted order:\n1. ant\n2. bee\n3. cat", "ant bee cat"),
        ("ant bee cat", "Step 1: cat comes last.\n\nant\nbee\ncat", "ant bee cat"),
        ("ant bee cat", "a < b < c. So the answer is ant < bee < cat", "ant bee cat"),
        ("ant bee cat", "The answer is ant dog bee cat.", "ant dog bee cat"),
        ("ant bee cat", "I cannot sort.", None),
    ],
)
def test_the_kinds_of_bbh(target: str, text: str, answer: str | None):
    questions = {
        "] }": "Complete the rest. Input: { [ ( )",
        "ant bee cat": "Sort the following words alphabetically: List: cat ant bee",
    }
    item = bbh(questions.get(target, "A question?"), target)
    assert extract(item, text) == answer
    assert is_right(item, answer) == (answer == target.lower())


def test_bbh_choices_and_targets_without_a_letter():
    question = "Which edit is humorous?\nOptions:\n(A) earth, wind\n(B) dearth, wind, & fire\n(C) x"
    for target in ("(B)", "B", "dearth, wind, & fire"):
        item = bbh(question, target)
        assert (item.kind, item.gold, len(item.choices)) == ("choice", "B", 3)
        assert is_right(item, extract(item, "So the answer is (B)."))
        assert is_right(item, extract(item, "It is dearth, wind, & fire."))
        assert not is_right(item, extract(item, "So the answer is (A)."))
    article = bbh("What is it?\nOptions:\n(A) line\n(B) kite\n(I) sector", "(I)")
    assert extract(article, "I think it is a kite.") == "B"
    assert extract(article, "The answer is I.") == "I"


MATHS = Item("agieval", "math", "1", "What is $x$?", (), "1", "maths")


@pytest.mark.parametrize(
    "text, result",
    [
        (r"Thus $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"The answer is \(2\sqrt{3}\).", r"2\sqrt{3}"),
        (r"So $x = 2 + 3 = 5$.", "5"),
        (r"Therefore, the value of $a$ is $7$.", "7"),
        ("It is 12.", "12"),
        (r"\boxed{(3, 4]}", "(3,4]"),
        (r"\boxed{\text{even}}", "even"),
        ("**Answer: 7**", "7"),
        ("答案为 $\\sqrt{2}$。", r"\sqrt 2"),
        ("#### 42", "42"),
    ],
)
def test_results_in_mathematics(text: str, result: str):
    found = extract(MATHS, text)
    assert found is not None and same_value(found, result)


def test_no_result_in_mathematics():
    for text in ("I don't know.", "", "The answer cannot be determined."):
        assert extract(MATHS, text) is None


def test_as_many_results_as_blanks():
    item = MATHS._replace(question=r"$a=(\quad)$, $b=(\quad)$", gold="$5$;$10$")
    for text in (
        r"So $a=\boxed{5}$ and $b=\boxed{10}$.",
        r"\boxed{5;10}",
        r"The answers are $5$ and $10$.",
        r"The answer is 5; 10",
    ):
        assert is_right(item, extract(item, text)), text
    assert not is_right(item, extract(item, r"So $a=\boxed{10}$ and $b=\boxed{5}$."))


EQUAL = (
    (r"\frac{1}{2}", r"\dfrac12", "1/2", "0.5", r"\frac{2}{4}", "$0.5$", r"x=\frac{1}{2}"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", r"\frac{3}{2\sqrt3}", r"\frac12\sqrt{3}"),
    (r"30^\circ", "30", r"30^{\circ}", "30°", r"30\text{ degrees}"),
    (r"1{,}000", "1000", "1,000", r"1,\!000", r"\$1000", "1000.0", r"1000\text{ cm}^2"),
    (r"25\%", "25", "25%"),
    (r"\left(3, \frac{1}{2}\right)", "(3,0.5)", r"(3,\,1/2)"),
    (r"\{1, 2, 3\}", "3, 1, 2", r"\{3,2,1\}", "1, 2 and 3"),
    (r"(-\infty, -7) \cup (1, 2)", r"(1,2)\cup(-\infty,-7)"),
    ("2x(x-1)", "2x^2 - 2x", r"-2x + 2x^{2}", "2*x*(x-1)"),
    (r"2 \tan x", r"2\tan(x)"),
    (r"\text{Even}", "even", r"\text{even}"),
    ("2x + y + 1 = 0", "y = -2x - 1", "-4x-2y-2=0"),
    (r"\begin{pmatrix} 2/5 \\ -1 \end{pmatrix}", r"\begin{pmatrix}\frac25\\-1\end{pmatrix}"),
    (r"1 \pm \sqrt{2}", r"\pm\sqrt2+1"),
    (r"3\frac{1}{2}", "3.5", r"\frac72"),
    (r"1-5\mathrm{i}", "-5i+1"),
    (r"\frac{\pi}{3}", r"\pi/3"),
    (r"\textcircled{1}\textcircled{3}", "①③"),
    ("3:1", "3 : 1"),
)
DIFFERENT = (
    ("1/2", "2"), ("0.33", r"\frac13"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(3,4]", "(3,4)"),
    ("x^2", "x^3"), ("1, 2", "1, 2, 3"), ("1", "1, 1"), (r"\sqrt{2}", "1.41"), ("2x", "2y"),
    ("x = 1", "x = 2"), ("y = 2x", "y = 2x + 1"), (r"\text{even}", r"\text{odd}"), ("7", ""),
    (r"1 \pm \sqrt 2", r"1 + \sqrt 2"), ("-5", "5"), ("5;10", "10;5"), ("(1,2)", "1"),
)  # fmt: skip


@pytest.mark.parametrize("forms", EQUAL, ids=lambda forms: forms[0])
def test_equal_results(forms: tuple[str, ...]):
    for one, other in itertools.permutations(forms, 2):
        assert same_value(one, other), (one, other)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_different_results(one: str, other: str):
    assert not same_value(one, other) and not same_value(other, one)


@pytest.mark.parametrize(
    "text", ["", "+", "((1)", "1/0", "9^9^9^9", "1000!", "x" * 500, "__import__('os')", "\\frac{1}"]
)
def test_what_is_no_formula_has_no_value(text: str):
    assert value(text, {"x": 1j}) is None


def test_any_text_is_read():
    """Damaged output raises no error."""
    items = (GSM8K, CSQA, MATHS, bbh("Input: (", ")"), bbh("List: b a", "a b"), bbh("?", "yes"))
    texts = ("\\boxed{", "####", "answer is", "**", "$", "(", "\x00", "é" * 50, "答案", "A" * 3000)
    for item, text in itertools.product(items, texts):
        found = extract(item, text)
        assert found is None or isinstance(found, str)


def test_long_texts_are_read_at_once():
    items = (GSM8K, CSQA, MATHS, bbh("Input: (", ")"), bbh("List: b a", "a b"), bbh("?", "yes"))
    pieces = ("answer ", "( ", "= ", "**", "\\boxed{", "1 ", "A, ", "the answer is ", "is A or ")
    begun = time.process_time()
    for item, piece in itertools.product(items, pieces):
        extract(item, piece * 500)
    assert time.process_time() - begun < 20


@real_files
def test_recorded_scores_are_reproduced():
    """Each public file agrees within one point, and each difference has a known cause."""
    for path in sorted((ASSETS / "eval" / "model_outputs").iterdir()):
        for way, samples in read_samples(path).items():
            found = differences(samples)
            change = sum(int(each.right) - int(each.sample.right) for each in found)
            assert abs(change) <= 0.01 * len(samples), (path.name, way)
            assert not [each for each in found if each.cause == OTHER], (path.name, way)


@real_files
def test_the_solutions_of_the_benchmarks_themselves():
    """The printed solutions of GSM8K and AGIEval give their own gold answers."""
    rows = [
        *_rows("gsm8k", "gsm8k/test.jsonl", lambda record: record["answer"]),
        *_rows("agieval", "agieval/math.jsonl", lambda record: record["other"]["solution"]),
    ]
    wrong = [item.id for item, text in rows if not is_right(item, extract(item, text))]
    assert len(rows) == 1660 and not wrong


def _rows(task, name, text_of):
    for number, line in enumerate((ASSETS / "eval" / name).read_text().splitlines()):
        record = json.loads(line)
        item = item_of(task, record, "", f"{name}-{number}")
        assert item is not None
        yield item, text_of(record)
