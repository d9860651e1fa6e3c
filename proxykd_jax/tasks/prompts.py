"""Zero-shot prompts of benchmark items."""

from __future__ import annotations

import hashlib

from proxykd_jax.tasks.items import Item

# Increase it when an item's prompt changes: answers to two versions are not comparable.
PROMPT_VERSION = 1

_FORMS = {
    "number": "#### N\nwhere N is the number alone.",
    "maths": "The answer is \\boxed{X}.\nwhere X is the result.",
    "true": "The answer is X.\nwhere X is True or False.",
    "yes": "The answer is X.\nwhere X is Yes or No.",
    "valid": "The answer is X.\nwhere X is valid or invalid.",
    "brackets": "The answer is X\nwhere X is the missing brackets, separated by spaces.",
    "words": "The answer is X\nwhere X is the words in order, separated by spaces.",
}
_ONE = "The answer is (X).\nwhere X is the label of the right choice."
_SEVERAL = "The answer is X.\nwhere X is the labels of all right choices, such as A or BD."


def prompt_of(item: Item) -> str:
    """The question, its choices (one per line), and the format: reasoning, then a last line."""
    parts = [item.question.strip()]
    if item.choices and not _lists_choices(item):
        parts.append("\n".join(f"({label}) {text}" for label, text in item.choices))
    form = _FORMS.get(item.kind) or (_SEVERAL if item.several else _ONE)
    parts.append(f"Think step by step, then end with a line of this form:\n{form}")
    return "\n\n".join(parts)


def question_alone(item: Item) -> str:
    """The question without its choices, for the log-likelihoods of their texts."""
    if _lists_choices(item):
        return item.question.rpartition("Options:")[0].strip()
    return item.question.strip()


def prompt_hash(prompt: str) -> str:
    """The key of an answer: 32 hex digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _lists_choices(item: Item) -> bool:
    return "\nOptions:" in item.question
