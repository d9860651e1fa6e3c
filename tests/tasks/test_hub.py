"""Benchmarks from datasets in the form of the hub, in local folders, without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.tasks.items import hub_place, read_items

CHOICES = {"text": ["ice", "fog"], "label": ["A", "B"]}
# task -> (rows in the form of the hub, the expected gold answer and choices)
ROWS: dict[str, tuple[dict[str, Any], str, int]] = {
    "gsm8k": ({"question": "2 + 2?", "answer": "It is 4.\n#### 4"}, "4", 0),
    "arc": ({"id": "M_1", "question": "Cold?", "choices": CHOICES, "answerKey": "A"}, "A", 2),
    "csqa": (
        {
            **{"id": "c1", "question": "Cold?", "question_concept": "cold"},
            **{"choices": CHOICES, "answerKey": "B"},
        },
        "B",
        2,
    ),
    "mmlu": (
        {"question": "Cold?", "subject": "weather", "choices": list("wxyz"), "answer": 3},
        "D",
        4,
    ),
}


@pytest.mark.parametrize("task", ROWS)
def test_a_dataset_gives_the_items_of_its_files(tmp_path: Path, task: str) -> None:
    import datasets

    row, gold, choices = ROWS[task]
    stored = datasets.DatasetDict({"test": datasets.Dataset.from_list([row, row])})
    stored.save_to_disk(str(tmp_path / "stored"))
    items = read_items(task, f"hub:{tmp_path / 'stored'}#test").items
    assert [item.gold for item in items] == [gold, gold]
    assert len(items[0].choices) == choices and len({item.id for item in items}) == 2
    assert items[0].subtask == ("weather" if task == "mmlu" else "")
    with pytest.raises(UserError, match="has no split 'train'"):
        read_items(task, f"hub:{tmp_path / 'stored'}#train")


def test_all_subsets_are_sub_tasks(tmp_path: Path) -> None:
    import datasets

    lines = ["---", "configs:"]
    for name, target in (("navigate", "Yes"), ("counting", "3")):
        (tmp_path / name).mkdir()
        rows = [{"input": f"{name} {n}?", "target": target} for n in range(3)]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / name / "test.parquet"))
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += ["  - split: test", f"    path: {name}/test.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    items = read_items("bbh", f"hub:{tmp_path}#*/test", limit=2).items
    assert [(item.subtask, item.gold) for item in items] == [
        *[("counting", "3")] * 2,
        *[("navigate", "yes")] * 2,
    ]
    assert len({item.id for item in items}) == 4
    only = read_items("bbh", f"hub:{tmp_path}#navigate/test").items
    assert [item.question for item in only] == [f"navigate {n}?" for n in range(3)]


def test_what_names_a_dataset() -> None:
    assert hub_place("hub:openai/gsm8k#main/test") == ("openai/gsm8k", "main", "test")
    assert hub_place("hub:tau/commonsense_qa#validation") == (
        "tau/commonsense_qa",
        None,
        "validation",
    )
    assert hub_place("data/gsm8k.jsonl") is None
    for wrong in ("hub:openai/gsm8k", "hub:#test", "hub:a#b/c/d"):
        with pytest.raises(UserError, match="must be hub:NAME#SPLIT"):
            hub_place(wrong)
