"""Benchmarks through EleutherAI's harness: its requests, and its scores compared with ours."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import evaluate
from proxykd_jax.artifacts import read_manifest, write_manifest
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.candidates import Candidate, named_candidate
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.tasks import benchmark, harness
from proxykd_jax.tasks.answering import load_chat_model, renderer_of
from proxykd_jax.tasks.benchmark import run_benchmarks
from proxykd_jax.tasks.extraction import extract, is_right
from proxykd_jax.tasks.harness import run_task, task_config
from proxykd_jax.tasks.harness_model import ChatText, Respondent, generation_options, harness_model
from proxykd_jax.tasks.items import TASKS, Item, read_items
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import load_tokenizer
from tests.generation.fake_server import FakeServer, Reply
from tests.tasks.files import config_of, write
from tests.texts.conftest import MARKED, save_bpe, save_llama

STORY = "Once upon a time there was a little cat. She liked to play with a red ball in the park."
FOLDERS = ("generated", "real")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    """A download by the harness is an error; the servers of the tests are on this machine."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(scope="module")
def respondent_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], Respondent]:
    made: dict[Path, Respondent] = {}

    def make(folder: Path) -> Respondent:
        if folder not in made:
            config = config_of(tmp_path_factory.mktemp("run"), {"gsm8k": "none"}, folder)
            _, who = named_candidate(config, str(folder))
            assert isinstance(who, Candidate)
            loaded = load_chat_model(config, who, make_mesh(config.mesh.of("evaluate")))
            made[folder] = Respondent(
                renderer_of(config, who.tokenizer), lambda: loaded, batch_size=4, seed=0
            )
        return made[folder]

    return make


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, byte_model: Path) -> Path:
    if request.param == "generated":
        return byte_model
    return request.getfixturevalue("assets") / "models" / "stories260K"


# --- a model as the harness asks it ---------------------------------------------------------------


class Reference:
    """The same model in PyTorch by transformers, in float64."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.torch = torch
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.length = self.model.config.max_position_embeddings

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def loglik(self, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        torch = self.torch
        ids = torch.tensor([[*before, *after]])
        with torch.no_grad():
            logps = self.model(ids[:, :-1]).logits[0].log_softmax(-1)[-len(after) :]
        labels = ids[0, -len(after) :]
        return (
            float(logps.gather(-1, labels[:, None]).sum()),
            bool((logps.argmax(-1) == labels).all()),
        )


def test_log_likelihoods_equal_transformers(folder: Path, respondent_of: Any):
    reference, respondent = Reference(folder), respondent_of(folder)
    # The greedy output counts as greedy, another letter does not. (Random bytes are seldom text.)
    beginnings = [STORY[:n] for n in range(20, 80, 4) if STORY[n - 1] != " "]
    answers = respondent.generate([(text, {"max_gen_toks": 1}) for text in beginnings])
    begun, said = next(
        pair for pair in zip(beginnings, answers, strict=True) if pair[1].strip().isalpha()
        and pair[1].isascii()
    )  # fmt: skip
    requests = [
        (STORY, " Then"), (STORY + " ", "Then"), (STORY + "\n\n", "Then she"), ("The", " end"),
        (begun, said), (begun, f" {said}"), (begun, "q"), (begun, "z"),
    ]  # fmt: skip
    found = respondent.logliks(requests)
    for (context, after), (loglik, greedy) in zip(requests, found, strict=True):
        whole, before = reference.ids(context + after), reference.ids(context.rstrip())
        wanted = reference.loglik(whole[: len(before)], whole[len(before) :])
        assert (loglik, greedy) == (pytest.approx(wanted[0], abs=1e-3), wanted[1]), (context, after)
    assert {greedy for _, greedy in found} == {True, False}
    assert found[0] == pytest.approx(found[1], abs=1e-5)

    # Without context a text follows BOS, or the end token if there is no BOS.
    ids = respondent.renderer.tokenizer.encode("A cat").tolist()
    prefix = respondent.renderer.tokenizer.bos_id
    prefix = respondent.renderer.end_token_ids[0] if prefix is None else prefix
    ((loglik, _), nothing) = respondent.logliks([("", "A cat"), ("A cat", "")])
    assert loglik == pytest.approx(reference.loglik([prefix], ids)[0], abs=1e-3)
    assert nothing == (0.0, True)


def test_long_contexts_are_cut_from_the_left(folder: Path, respondent_of: Any):
    reference, respondent = Reference(folder), respondent_of(folder)
    context = STORY * 20
    whole, before = reference.ids(context + " ball"), reference.ids(context)
    assert len(before) > reference.length
    after = whole[len(before) :]
    kept = whole[-(reference.length + 1) : -len(after)]
    ((loglik, _),) = respondent.logliks([(context, " ball")])
    assert loglik == pytest.approx(reference.loglik(kept, after)[0], abs=1e-3)
    with pytest.raises(UserError, match=f"longer than the model's context of {reference.length}"):
        respondent.logliks([("A", context)])
    # Half of the context is left free for an answer, or the requested number of tokens.
    model, length = respondent._load().model, reference.length
    for tokens, wanted, begin, budget in (
        (length + 10, 5, 15, 5),
        (length - 7, 5, -2, 5),
        (length + 10, 9999, 10 + length // 2, length // 2),
        (length - 8, 9999, 0, 8),
        (length - 8, 5, 0, 5),
    ):
        kept, found = respondent._with_room(np.arange(tokens), wanted, model)
        assert (kept[0], kept[-1], found) == (max(0, begin), tokens - 1, budget)
    kept, _ = respondent._with_room(respondent.encode([context])[0], 1, model)
    with reference.torch.no_grad():
        logits = reference.model(reference.torch.tensor(kept[None])).logits[0, -1]
    tokenizer = respondent.renderer.tokenizer
    first = tokenizer.decode([int(logits[: tokenizer.vocab_size].argmax())], skip_special=True)
    assert respondent.generate([(context, {"max_gen_toks": 1})]) == [first]


def test_rolling_log_likelihoods_predict_each_token_once(folder: Path, respondent_of: Any):
    reference, respondent = Reference(folder), respondent_of(folder)
    text = STORY * 20
    tokens = respondent.renderer.tokenizer.encode(text).tolist()
    length = reference.length
    assert length < len(tokens)
    prefix = respondent.renderer.tokenizer.bos_id
    prefix = respondent.renderer.end_token_ids[0] if prefix is None else prefix
    read = [prefix, *tokens]
    wanted = 0.0
    for start in range(0, len(tokens), length):
        after = tokens[start : start + length]
        # Position n of ``read`` predicts token n; the last piece reads as much as fits.
        end = start + len(after)
        before = read[max(0, end - length) : start + 1]
        wanted += reference.loglik(before, after)[0]
    long, empty, short = respondent.rolling_logliks([(text,), ("",), (STORY,)])
    assert long == pytest.approx(wanted, rel=1e-5) and empty == 0.0
    ids = respondent.renderer.tokenizer.encode(STORY).tolist()
    assert short == pytest.approx(reference.loglik([prefix], ids)[0], rel=1e-5)


def test_generation_is_greedy_and_cut_at_stop_strings(folder: Path, respondent_of: Any):
    reference, respondent = Reference(folder), respondent_of(folder)
    ids = reference.ids(STORY)
    drawn: list[int] = []
    for _ in range(12):
        with reference.torch.no_grad():
            logits = reference.model(reference.torch.tensor([[*ids, *drawn]])).logits[0, -1]
        drawn.append(int(logits[: respondent.renderer.tokenizer.vocab_size].argmax()))
        if drawn[-1] in respondent.renderer.end_token_ids:
            break
    ended = drawn[-1] in respondent.renderer.end_token_ids
    decode = respondent.renderer.tokenizer.decode
    whole = decode(drawn[:-1] if ended else drawn, skip_special=True)
    stop, later = whole[3:5], whole[7:9]
    requests = [
        (STORY, {"max_gen_toks": 12, "until": until, "do_sample": False, "temperature": 0.0})
        for until in ([], ["never", later, stop], stop, [""])
    ]
    found = respondent.generate(requests)
    assert found == [whole, whole[: whole.find(stop)], whole[: whole.find(stop)], whole]


def test_sampling_is_the_sampler_s_and_the_rest_is_refused(byte_model: Path, respondent_of: Any):
    shared = respondent_of(byte_model)

    def fresh() -> Respondent:
        return Respondent(shared.renderer, shared._load, batch_size=4, seed=0)

    greedy, hot = {"max_gen_toks": 16}, {"max_gen_toks": 16, "do_sample": True, "temperature": 2.0}
    requests = [(STORY, hot), (STORY, greedy), (STORY, hot)]
    found = fresh().generate(requests)
    assert found == fresh().generate(requests)
    assert len(set(found)) == 3 and found[1] == fresh().generate([(STORY, greedy)])[0]
    assert generation_options({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert generation_options({"temperature": 0.7}).temperature == 0.7
    assert generation_options({"do_sample": True}).temperature == 1.0
    assert generation_options({"top_p": 0.5, "top_k": 9, "num_beams": 1}) == ((), 256, 0.0, 1.0)
    assert generation_options({"max_new_tokens": 3, "max_gen_toks": 5}).max_new_tokens == 5
    with pytest.raises(UserError, match="sets num_beams: 4 in generation_kwargs"):
        generation_options({"num_beams": 4})


def _renderers(tmp_path: Path) -> list[Renderer]:
    bpe, marked = save_bpe(tmp_path / "bpe"), save_bpe(tmp_path / "marked", MARKED)
    llama = load_tokenizer(save_llama(tmp_path / "llama"))
    no_bos = tmp_path / "no_bos.jinja"
    no_bos.write_text("{% for m in messages %}{{ m['content'] + ' => ' }}{% endfor %}")
    return [
        *(Renderer(load_tokenizer(folder)) for folder in (bpe, marked)),
        *(Renderer(llama, template) for template in ("plain", "alpaca", "llama2", str(no_bos))),
    ]


@pytest.mark.parametrize("source", FOLDERS)
def test_chat_prompts_have_the_renderer_s_tokens(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
):
    if source == "generated":
        renderers = _renderers(tmp_path)
    else:
        places = request.getfixturevalue("assets") / "tokenizers"
        renderers = [
            Renderer(load_tokenizer(places / "smollm2")),
            Renderer(load_tokenizer(places / "llama2"), "llama2"),
            Renderer(load_tokenizer(places.parent / "models" / "stories260K"), "plain"),
        ]
    contents = ["What is 2 + 2?\n\n(A) 4 ", "é 日本 🙂", "Do </s> and <|im_end|> end a turn?"]
    for renderer in renderers:
        respondent = Respondent(renderer, pytest.fail, batch_size=1, seed=0)
        for content in contents:
            text = respondent.conversation([{"role": "user", "content": content}], open_turn=True)
            assert isinstance(text, ChatText) and content.strip() in text
            row = TextRow((Message("user", content),), None, "here")
            (wanted,) = renderer.encode_batch([row], prompts_only=True)
            (tokens,) = respondent.encode([text])
            assert np.array_equal(tokens, wanted.tokens)
            if not any(token in content for token in ("</s>", "<|im_end|>")):
                plain = renderer.tokenizer.encode(str(text))
                assert np.array_equal(tokens, plain)
            # A continuation is the assistant's answer, without what the template adds after it.
            answered = TextRow((*row.messages, Message("assistant", "Four.")), None, "here")
            (whole,) = renderer.encode_batch([answered])
            found, start = respondent._continued(text, "Four.")
            assert start == whole.prompt_length
            assert np.array_equal(found[:start], whole.tokens[:start])
            assert renderer.tokenizer.decode(found[start:]).strip() == "Four."
            assert renderer.end_token_ids[0] not in found[start:]
            begun = respondent.conversation(
                [{"role": m.role, "content": m.content} for m in answered.messages],
                open_turn=False,
            )
            assert begun.endswith("Four.") and begun.startswith(str(text).rstrip())


def test_smollm2_s_chat_text_is_transformers_(assets: Path):
    from transformers import AutoTokenizer

    place = assets / "tokenizers" / "smollm2"
    theirs = AutoTokenizer.from_pretrained(place)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    respondent = Respondent(Renderer(load_tokenizer(place)), pytest.fail, batch_size=1, seed=0)
    text = respondent.conversation(messages, open_turn=True)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert text == theirs.apply_chat_template(messages, **options)
    assert respondent.encode([text])[0].tolist() == theirs(text)["input_ids"]
    begun = [*messages, {"role": "assistant", "content": "Hel"}]
    options = {"tokenize": False, "continue_final_message": True}
    assert respondent.conversation(begun, open_turn=False) == theirs.apply_chat_template(
        begun, **options
    )


def test_a_bos_is_written_once(tmp_path: Path):
    tokenizer = load_tokenizer(save_llama(tmp_path))
    respondent = Respondent(Renderer(tokenizer, "plain"), pytest.fail, batch_size=1, seed=0)
    found = respondent.encode(["The cat", "<s>The cat", ""])
    assert [tokens.tolist().count(1) for tokens in found] == [1, 1, 1]
    bare = Respondent(
        Renderer(load_tokenizer(save_bpe(tmp_path / "bpe")), "plain"),
        pytest.fail, batch_size=1, seed=0,
    )  # fmt: skip
    assert bare.encode([""])[0].tolist() == []


# --- the harness reads and scores by itself -------------------------------------------------------


class Scripted(Respondent):
    """A model that gives the answers of the test."""

    def __init__(self, renderer: Renderer, outputs: Sequence[str]) -> None:
        super().__init__(renderer, pytest.fail, batch_size=1, seed=0)
        self.outputs = iter(outputs)

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        return [next(self.outputs) for _ in requests]


def in_form(item: Item, gold: str) -> str:
    """A text with the last line that the prompt asks for."""
    if item.kind == "number":
        return f"Let us see.\n#### {gold}"
    if item.kind == "maths":
        return f"Let us see. The answer is \\boxed{{{gold}}}."
    if item.kind == "choice":
        return f"No. The answer is {gold if item.several else f'({gold})'}."
    end = "" if item.kind in ("brackets", "words") else "."
    return f"It isn't hard.\nThe answer is {gold}{end}"


CHOICES = (("A", "ice"), ("B", "fog"), ("C", "rain"))
LISTED = "Which?\nOptions:\n(A) ice\n(B) fog\n(C) rain"
GENERATED: dict[str, list[tuple[Item, str]]] = {
    "gsm8k": [(Item("gsm8k", "", "1", "How many?", (), "1050", "number"), "1051")],
    "arc": [(Item("arc", "", "1", "Which?", CHOICES, "B", "choice"), "A")],
    "csqa": [(Item("csqa", "", "1", "Which?", CHOICES, "C", "choice"), "A")],
    "mmlu": [(Item("mmlu", "x", "1", "Which?", CHOICES, "A", "choice"), "C")],
    "agieval": [
        (Item("agieval", "x", "1", "Which?", CHOICES, "B", "choice"), "C"),
        (Item("agieval", "y", "2", "Which?", CHOICES, "AC", "choice", several=True), "AB"),
        (Item("agieval", "z", "3", "What?", (), r"\frac{\sqrt{3}}{2}", "maths"), r"\frac{1}{2}"),
    ],
    "bbh": [
        (Item("bbh", "a", "1", LISTED, CHOICES, "B", "choice"), "C"),
        (Item("bbh", "b", "2", "How many?", (), "-7", "number"), "7"),
        (Item("bbh", "c", "3", "Is it?", (), "yes", "yes"), "no"),
        (Item("bbh", "d", "4", "Complete: [ (", (), ") ]", "brackets"), "] )"),
        (Item("bbh", "e", "5", "Sort: pear fig", (), "fig pear", "words"), "pear fig"),
    ],
}


def scores(items: Sequence[Item], outputs: Sequence[str], renderer: Renderer) -> list[int]:
    model = harness_model()(Scripted(renderer, outputs))
    config = task_config("task", items, compared=False, max_new_tokens=9)
    found = run_task(model, config)
    each = [int(sample["exact_match"]) for sample in found["samples"]["task"]]
    assert found["results"]["task"]["exact_match,last"] == pytest.approx(np.mean(each))
    return each


@pytest.mark.parametrize("task", TASKS)
def test_answers_in_the_form_asked_for_score_as_here(task: str, byte_model: Path):
    renderer = Renderer(load_tokenizer(byte_model), "plain")
    items = [item for item, _ in GENERATED[task]]
    right = [in_form(item, item.gold) for item in items]
    wrong = [in_form(item, other) for item, other in GENERATED[task]]
    for outputs, wanted in ((right, 1), (wrong, 0), (["I do not know."] * len(items), 0)):
        assert scores(items, outputs, renderer) == [wanted] * len(items)
        ours = [
            is_right(item, extract(item, out)) for item, out in zip(items, outputs, strict=True)
        ]
        assert ours == [bool(wanted)] * len(items)


def test_golds_of_the_real_files_score_as_here(assets: Path, byte_model: Path):
    renderer = Renderer(load_tokenizer(byte_model), "plain")
    names = {"arc": "arc_challenge", "mmlu": "mmlu/dev"}
    for task in TASKS:
        items = read_items(task, str(assets / "eval" / names.get(task, task)), limit=5).items
        outputs = [in_form(item, item.gold) for item in items]
        assert scores(items, outputs, renderer) == [1] * len(items), task


def test_the_harness_knows_the_forms_alone(byte_model: Path):
    """The difference between the two: other forms are read here and count as wrong there."""
    renderer = Renderer(load_tokenizer(byte_model), "plain")
    (item, _), (choice, _) = GENERATED["gsm8k"][0], GENERATED["arc"][0]
    assert scores([item, item], ["So it is $1,050.00.", "#### 1,050"], renderer) == [0, 1]
    assert is_right(item, extract(item, "So it is $1,050.00."))
    assert scores([choice], ["It must be fog."], renderer) == [0]
    # In both the last answer counts.
    assert scores([choice], ["The answer is (A). Wait: the answer is (B)."], renderer) == [1]


# --- on the command line --------------------------------------------------------------------------


def test_a_model_checked_by_the_harness(
    tmp_path: Path,
    benchmarks: dict[str, str],
    byte_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    # The texts have different lengths, so that sums and means choose different ones.
    rng = np.random.default_rng(0)
    files = dict(benchmarks)
    for task, letters in (("csqa", "abcdefgh"), ("arc", "abcd雨雪é")):
        rows = []
        for n in range(12):
            choices = [
                {"text": "".join(rng.choice(list(letters), rng.integers(1, 12))), "label": label}
                for label in "ABC"
            ]
            question = {"stem": f"What is {n}?", "question_concept": "x", "choices": choices}
            if task == "arc":
                del question["question_concept"]
            rows.append({"id": f"q{n}", "answerKey": "ABC"[n % 3], "question": question})
        files[task] = write(tmp_path / f"{task}_choices.jsonl", rows)
    keys = {"mode": "both", "max_new_tokens": 8, "items_per_part": 3, "batch_size": 8}
    config = config_of(tmp_path, {**files, **keys, "harness": True}, byte_model)
    loads: list[Any] = []
    load = load_chat_model
    monkeypatch.setattr(benchmark, "load_chat_model", lambda *of: loads.append(of) or load(*of))
    summary = run_benchmarks(config, [f"tiny={byte_model}"])
    assert len(loads) == 1
    found = summary["harness"]["tiny"]
    compared = {"csqa_loglikelihood", "arc_loglikelihood"}
    assert set(found) == {"gsm8k", "csqa", "bbh", "arc"} | compared
    for task, of in found.items():
        assert of["same_outputs"] == of["n"] and of["other_outputs"] == []
        for metric, scored in of["metrics"].items():
            if task == "arc_loglikelihood" and metric == "acc_norm":
                continue  # the harness counts characters, and we count bytes
            assert scored["same_scores"] == of["n"] and scored["other_scores"] == []
            assert scored["accuracy"] == pytest.approx(scored["ours"]["accuracy"]), (task, metric)
            assert scored["se"] == pytest.approx(scored["ours"]["se"])
    folder = config.folder / "eval" / "benchmarks"
    assert json.loads((folder / "summary.json").read_text()) == summary
    lines = (folder / "tiny/gsm8k_harness.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {
        "id", "prompt_hash", "output", "extracted", "exact_match", "our_score", "same_output",
    }  # fmt: skip
    for task, pair in (("csqa", ("acc", "acc_norm")), ("arc", ("acc_bytes", "acc_norm"))):
        text = (folder / f"tiny/{task}_loglikelihood_harness.jsonl").read_text()
        samples = [json.loads(line) for line in text.splitlines()]
        assert [sample[pair[0]] for sample in samples] != [sample[pair[1]] for sample in samples]
    said = capsys.readouterr().out
    assert "csqa_loglikelihood harness acc_norm: " in said and "of 12 the same: 12 scores" in said

    # Stored answers are not asked again, but a missing part is.
    monkeypatch.setattr(benchmark, "load_chat_model", pytest.fail)
    assert run_benchmarks(config, [f"tiny={byte_model}"]) == summary
    part = folder / "tiny/bbh_harness"
    write_manifest(part, {**read_manifest(part), "status": "running"})
    (part / "part_00001.jsonl").unlink()
    monkeypatch.setattr(benchmark, "load_chat_model", load)
    assert run_benchmarks(config, [f"tiny={byte_model}"]) == summary


def test_where_the_scores_differ_is_said():
    ours = [
        {"id": str(n), "subtask": "", "score": int(n < 3), "extracted": "1", "finished": True}
        for n in range(40)
    ]
    samples = [
        {"id": str(n), "exact_match": 0, "our_score": int(n < 3), "same_output": n != 7}
        for n in range(40)
    ]
    results = {"exact_match,last": 0.0, "exact_match_stderr,last": "N/A"}
    found = harness._summary(results, samples, ours, compared=False)
    assert (found["n"], found["same_outputs"], found["other_outputs"]) == (40, 39, ["7"])
    of = found["metrics"]["exact_match"]
    assert (of["se"], of["same_scores"], of["other_scores"]) == (None, 37, ["0", "1", "2"])
    assert of["ours"]["accuracy"] == pytest.approx(3 / 40)
    (line,) = harness.described_checks({"tiny": {"gsm8k": found}})
    assert "harness exact_match: 0.00, here 7.50" in line and "37 scores, 39 outputs" in line


def test_outputs_and_servers_are_not_asked(
    tmp_path: Path, benchmarks: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"], "harness": True})
    rows = [
        {"id": item.id, "output": "1"} for item in read_items("gsm8k", benchmarks["gsm8k"]).items
    ]
    message = {"message": {"role": "assistant", "content": "1"}, "finish_reason": "stop"}
    with FakeServer(
        lambda body: Reply(), other=lambda path, body: Reply(200, {"choices": [message]})
    ) as server:
        models = [write(tmp_path / "some.jsonl", rows), f"{server.url}#far"]
        assert run_benchmarks(config, models)["harness"] == {}
    said = capsys.readouterr().err
    for name in ("some", "far"):
        assert f"{name} is not a model on this machine; the harness does not ask it" in said


def test_without_the_extra(
    tmp_path: Path,
    benchmarks: dict[str, str],
    byte_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    import yaml

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"]}, byte_model)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    argv = [
        *("--config", str(file), "--set", "evaluate.benchmarks.harness=true"),
        *("--model", str(byte_model)),
    ]
    assert evaluate.command(argv) == 2
    said = capsys.readouterr().err
    assert "evaluate.benchmarks.harness: install lm-eval first: pip install 'proxykd" in said
    assert "Traceback" not in said and not (config.folder / "eval").exists()
    assert harness.main() == 2
    assert capsys.readouterr().err.startswith("error: install lm-eval first")


def test_real_files_and_a_real_model(
    tmp_path: Path, assets: Path, capsys: pytest.CaptureFixture[str]
):
    """GSM8K and ARC on stories260K: outputs and scores agree for all prompts that fit."""
    import yaml

    files = {
        "gsm8k": str(assets / "eval/gsm8k/test.jsonl"),
        "arc": str(assets / "eval/arc_challenge/ARC-Challenge-Dev.jsonl"),
    }
    keys = {"models": ["student:before"], "limit": 2, "max_new_tokens": 16, "mode": "both"}
    stories = assets / "models" / "stories260K"
    config = config_of(tmp_path, {**files, **keys, "harness": True}, stories)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    argv = ["--config", str(file), "--benchmarks", "gsm8k,arc"]
    assert evaluate.command(argv) == 0
    folder = config.folder / "eval" / "benchmarks"
    found = json.loads((folder / "summary.json").read_text())["harness"]["student_before"]
    assert set(found) == {"gsm8k", "arc", "arc_loglikelihood"}
    for of in found.values():
        assert of["same_outputs"] == of["n"] == 2
        for scored in of["metrics"].values():
            assert scored["same_scores"] == of["n"]
            assert scored["accuracy"] == pytest.approx(scored["ours"]["accuracy"])
    assert "harness exact_match: " in capsys.readouterr().out


def test_any_other_task_by_the_harness_s_command_line(
    tmp_path: Path,
    benchmarks: dict[str, str],
    byte_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    import yaml
    from lm_eval.tasks import TaskManager

    # Most of the time goes into reading the 14,000 tasks of lm-eval.
    only_named = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", only_named)
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"]}, byte_model)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    data = write(
        tmp_path / "sums.jsonl", [{"q": f"{n} + {n} =", "a": str(2 * n)} for n in range(3)]
    )
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = f"config={run},model={byte_model}"
    argv = ["run", "--model", "proxykd_jax", "--tasks", str(tmp_path / "sums.yaml")]
    monkeypatch.setattr(sys, "argv", ["harness", *argv, "--model_args", arguments])
    assert harness.main() == 0
    assert "exact_match" in capsys.readouterr().out
    for wrong, sentence in (
        (f"config={run},model=nothing", "nothing is none of these"),
        ("model=student", "takes config=run.yaml"),
        (f"config={run},pretrained=x", "takes config=run.yaml"),
        (f"config={tmp_path}/no.yaml", "no.yaml"),
    ):
        with pytest.raises(UserError, match=sentence):
            harness_model().create_from_arg_string(wrong)
