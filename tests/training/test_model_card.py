"""The model cards of exported folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from proxykd_jax import prepare
from proxykd_jax.artifacts import read_json, write_json
from proxykd_jax.config import Config
from proxykd_jax.training.model_card import model_card, write_cards
from tests.tiny_run import copy_run


@pytest.fixture
def run(finished_run: Config, tmp_path: Path) -> Config:
    return copy_run(finished_run, tmp_path)


def changed(config: Config, **sections: object) -> Config:
    return Config.model_validate(config.model_dump(mode="json") | sections)


def head_of(text: str) -> dict[str, object]:
    begin, head, _ = text.split("---\n", 2)
    assert not begin
    return yaml.safe_load(head)


def test_every_exported_folder_has_a_card(run: Config):
    from transformers import AutoModelForCausalLM

    folders = [each for each in (run.folder / "export").iterdir() if each.is_dir()]
    assert {"student", "proxy_adapter"} <= {each.name for each in folders}
    for folder in folders:
        text = (folder / "README.md").read_text("utf-8")
        head = head_of(text)
        assert head["library_name"] == ("peft" if "adapter" in folder.name else "transformers")
        assert head["pipeline_tag"] == "text-generation"
        # Nobody gave a licence, and models and data are local folders.
        assert not {"license", "base_model", "datasets"} & set(head)
        counts = read_json(run.folder / "corpus" / "manifest.json")["counts"]
        kept = next(iter(counts["sources"].values()))["kept"]
        assert f"| {kept:,} |" in text and "teacher.jsonl" in text
        assert str(run.folder.parent) not in text and "NLL per token" in text
    AutoModelForCausalLM.from_pretrained(run.folder / "export" / "student")


def test_a_card_follows_licences_and_figures(run: Config):
    source = run.corpus.sources[0].model_dump(mode="json") | {"license": "cc-by-4.0"}
    corpus = run.corpus.model_dump(mode="json") | {"sources": [source]}
    export = run.export.model_dump(mode="json") | {"license": "apache-2.0"}
    licensed = changed(run, corpus=corpus, export=export)
    prepare.main(licensed)  # a licence makes no other corpus
    write_cards(licensed)
    text = (run.folder / "export" / "student" / "README.md").read_text("utf-8")
    assert head_of(text)["license"] == "apache-2.0" and "| cc-by-4.0 |" in text
    path = run.folder / "eval" / "summary.json"
    summary = read_json(path)
    summary["models"]["student"]["validation"]["nll"] |= {"token_mean": 1.25, "token_se": 0.5}
    write_json(path, summary)
    assert "| 1.2500 ± 0.9800 |" in model_card(run, "student")
    write_json(path, summary | {"stages": {"student": "of another training"}})
    assert "± 0.9800" not in model_card(run, "student")
    path.unlink()
    assert "NLL per token" not in model_card(run, "student")


def test_commands_and_names_of_the_hub(run: Config):
    student = run.student.model_dump(mode="json") | {"path": "someone/small", "trainable": "lora"}
    student |= {"lora": {"rank": 12}, "license": "mit"}
    source = run.corpus.sources[0].model_dump(mode="json") | {"path": None, "dataset": "some/rows"}
    corpus = run.corpus.model_dump(mode="json") | {"sources": [source]}
    card = model_card(changed(run, student=student, corpus=corpus), "student_adapter")
    head = head_of(card)
    assert head["base_model"] == "someone/small" and head["base_model_relation"] == "adapter"
    assert head["datasets"] == ["some/rows"] and "`someone/small`, licence mit" in card
    assert "vllm serve someone/small --enable-lora --max-lora-rank 16" in card
    assert "convert_lora_to_gguf.py student_adapter --base small" in card
    whole = model_card(run, "student")
    assert "vllm serve student\n" in whole and "PeftModel" not in whole
