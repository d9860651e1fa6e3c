"""The files of a miniature: whole, loadable, disjoint, and the same every time."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.miniature import make as maker
from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.miniature.recipes import STUDENTS
from proxykd_jax.config import load_config
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.exact_teacher import TeacherLogps
from proxykd_jax.models.hf_weights import load_model

SIZES = {"steps_share": 0.002, "num_corpus": 120, "num_test": 30, "num_fresh": 50}


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "STEPS_A_CALL", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("miniature")
    maker.make(out, **SIZES)
    return out


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_are_disjoint(folder: Path) -> None:
    names = ("teacher", "test", "fresh")
    prompts = {name: [row["prompt"] for row in read(folder / f"{name}.jsonl")] for name in names}
    assert [len(prompts[name]) for name in names] == [120, 30, 50]
    together = [prompt for of_one in prompts.values() for prompt in of_one]
    assert len(set(together)) == len(together)
    assert all(set(row) == {"prompt"} for row in read(folder / "fresh.jsonl"))


def test_models_are_ordinary_folders(folder: Path) -> None:
    for name, dim, heads in (("proxy", 64, 4), ("student", 32, 2)):
        config, params = load_model(folder / name)
        assert (config.model_dim, config.num_layers, config.num_heads) == (dim, 2, heads)
        assert (config.head_dim, config.vocab_size) == (16, 46)
        assert config.eos_token_ids == (w.END,)
        assert params["embed"]["embedding"].shape == (46, dim)
        assert (folder / name / "tokenizer.json").read_bytes() == (
            folder / "tokenizer" / "tokenizer.json"
        ).read_bytes()


def test_the_tokenizer_knows_each_symbol_and_marks_the_answer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert len(tokenizer) == w.VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(list(range(46))) == list(w.SYMBOLS)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (w.END, w.UNKNOWN)
    row = read(folder / "test.jsonl")[0]
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    symbols = row["prompt"].split() + row["response"].split() + ["</s>"]
    assert encoded["input_ids"] == [w.SYMBOLS.index(symbol) for symbol in symbols]
    answer = len(row["response"].split()) + 1
    assert encoded["assistant_masks"] == [0] * 5 + [1] * answer
    question = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )
    assert question["input_ids"] == encoded["input_ids"][:5]


def test_the_teacher_folder_holds_the_exact_log_probs_of_the_test_rows(folder: Path) -> None:
    teacher = TeacherLogps(folder / "teacher_logps")
    world = w.make_worlds(0, "fmt").teacher
    rows = read(folder / "test.jsonl")
    assert (len(teacher), teacher.vocab_size) == (30, 46)
    for row in rows:
        prompt, answer = (
            np.array([w.SYMBOLS.index(s) for s in text.split()], np.int32)
            for text in (row["prompt"], row["response"] + " </s>")
        )
        logps = teacher.read(np.concatenate([prompt, answer]), len(prompt))
        probs_TV = w.answer_probs(world, prompt[None], answer[None])[0]
        np.testing.assert_allclose(np.exp(logps), probs_TV, atol=1e-7)


def test_every_recipe_is_a_config(folder: Path) -> None:
    assert sorted(p.stem for p in (folder / "configs").iterdir()) == sorted(STUDENTS)
    configs = {name: load_config(folder / "configs" / f"{name}.yaml") for name in STUDENTS}
    assert all(config.name == name for name, config in configs.items())
    headline = configs["proxy_kd"]
    assert (headline.distill.alpha, headline.preset) == (100, "paper")
    assert configs["black_box_ds"].distill.alpha == configs["black_box_all"].distill.alpha == 0
    assert configs["black_box_all"].distill.data == "all"
    assert configs["proxy_kd_fresh"].corpus.fresh_prompts
    # No other file names the evaluator's folder.
    for config in configs.values():
        rest = config.model_dump_json(exclude={"evaluate"})
        assert "teacher_logps" not in rest
        assert "teacher_logps" in str(config.evaluate.teacher_logps)


def test_made_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    maker.make(tmp_path, **SIZES)
    for name in ("teacher.jsonl", "test.jsonl", "fresh.jsonl", "proxy/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_is_made_once_and_never_mixed(folder: Path) -> None:
    before = (folder / "made.json").stat().st_mtime_ns
    maker.make(folder, **SIZES)
    assert (folder / "made.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="was made with"):
        maker.make(folder, **{**SIZES, "num_test": 31})
    with pytest.raises(UserError, match="none of"):
        maker.make(folder, regime="none", **SIZES)
