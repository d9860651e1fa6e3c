"""Texts with the answer that a careful reader takes from them, each written before it was read.

``answers.jsonl`` has one text a line: the item, the text, and the answer; null for none, or a list
where readers may differ.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from proxykd_jax.tasks.extraction import extract, is_right
from proxykd_jax.tasks.items import Item, item_of


def choice(*texts: str, task: str = "mmlu", labels: str = "ABCDEFGHIJ", question: str = "") -> Item:
    return Item(task, "", "1", question, tuple(zip(labels, texts, strict=False)), "", "choice")


def bbh(question: str, target: str) -> Item:
    item = item_of("bbh", {"input": question, "target": target}, "some", "1")
    assert item is not None
    return item


TEN = ["amber", "blue", "cyan", "denim", "emerald", "fuchsia", "green", "hazel", "indigo", "jade"]
DATES = ("04/30/2021", "05/01/2021", "05/02/2021", "05/03/2021")
RAIN = ("It is not raining", "It is raining", "It may rain", "Cannot be determined")
BIRDS = [f"The {bird} is the leftmost" for bird in ("robin", "crow", "owl")]
BRACKETS = "Complete the rest of the sequence. Input: ( { ["
ITEMS = {
    "gsm8k": Item("gsm8k", "", "1", "How many?", (), "18", "number"),
    "city": choice("Madrid", "Oslo", "Cairo", "Lima"),
    "place": choice("bank", "library", "department store", "mall", "museum", task="csqa"),
    "ten": choice(*TEN[:5], "fuchsia gold", *TEN[6:]),
    "two": choice("she paid", "she did not pay", task="bbh"),
    "amount": choice("12", "18", "24", "36", task="agieval"),
    "statements": choice("True, True", "False, False", "True, False", "False, True"),
    "moral": choice("Wrong, Wrong", "Wrong, Not wrong", "Not wrong, Wrong", "Not wrong, Not wrong"),
    "roman": choice("I only", "II only", "I and II", "neither I nor II"),
    "above": choice("iron", "copper", "all of the above", "none of the above"),
    "arc": choice("the sun", "the moon", "a star", "a comet", labels="1234", task="arc"),
    "multi": choice("Madrid", "Oslo", "Cairo", "Lima", task="agieval"),
    "yn": choice("Yes", "No", task="bbh"),
    "adj": choice("terrible old car", "old terrible car", task="bbh"),
    "nested": choice("heat", "heat and light", "light", "sound"),
    "speeds": choice("12 km/h", "1.2 km/h", "120 m/s", "12 m/s"),
    "fracs": choice("1/2", "1/3", "2/3", "3/4", "5/6", task="agieval"),
    "neg": choice(*RAIN),
    "nurse": choice("The nurse was late", "The doctor was late", "Ambiguous", task="bbh"),
    "birds": choice(*BIRDS, task="bbh"),
    "balls": choice("black ball", "pink ball", "blue ball", task="bbh"),
    "aqua": choice("10", "20", "30", "40", "None of these", task="agieval"),
    "degree": choice("0", "1", "-1", "2", "sqrt(2)"),
    "date": choice(*DATES, task="bbh"),
    "yes": bbh("Do you return to the starting point?", "Yes"),
    "valid": bbh("Is the argument deductively valid or invalid?", "valid"),
    "true": bbh("not ( True ) and ( True ) is", "False"),
    "count": bbh("How many fruits do I have?", "7"),
    "brackets": bbh(BRACKETS, "] } )"),
    "words": bbh("Sort the following words alphabetically: List: oak birch elm", "birch elm oak"),
}
# Texts that are still read in another way than their writer meant.
KNOWN = ("at 6 miles per hour.", "3 beads left.", "I changed my mind: D.")


def test_texts_are_read_as_a_careful_reader_reads_them():
    lines = (Path(__file__).parent / "answers.jsonl").read_text("utf-8").splitlines()
    wrong = []
    for name, text, right in map(json.loads, lines):
        allowed = right if isinstance(right, list) else [right]
        if not any(_agrees(name, text, each) for each in allowed) and not text.endswith(KNOWN):
            wrong.append((name, text, right))
    assert len(lines) > 2000 and not wrong


def _agrees(name: str, text: str, right: str | None) -> bool:
    if name == "maths":
        item = Item("agieval", "math", "1", "Solve.", (), right or "0", "maths")
        found = extract(item, text)
        return found is None if right is None else is_right(item, found)
    found = extract(ITEMS[name], text)
    if found is None or right is None or ITEMS[name].kind != "number":
        return found == right
    return Fraction(found) == Fraction(right)


def test_a_sign_tells_a_number_from_a_choice():
    item = choice("0", "1", "2", "3")
    for text in (
        "-1",
        "The answer is -1.",
        r"\boxed{-3}",
        "So x = -2.",
        "It is √2.",
        "**-3**",
        "1/2",
    ):
        assert extract(item, text) is None
    for text, label in (("= 1.", "B"), ("x = 2", "C"), (r"\boxed{3}", "D"), ("2 apples", "C")):
        assert extract(item, text) == label
