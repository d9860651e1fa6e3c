"""Benchmarks from questions to a summary: which models answer, what is stored and refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import evaluate
from proxykd_jax.artifacts import read_manifest, write_manifest
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.candidates import Candidate, Collected, Server, named_candidate
from proxykd_jax.tasks.accuracies import accuracy, macro_average, paired_difference
from proxykd_jax.tasks.benchmark import run_benchmarks
from proxykd_jax.tasks.items import TASKS, Item, read_items
from proxykd_jax.tasks.prompts import PROMPT_VERSION, prompt_hash, prompt_of, question_alone
from tests.generation.fake_server import Body, FakeServer, Reply
from tests.tasks.files import config_of, write


def right_outputs(benchmarks: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"task": task, "id": item.id, "output": f"Let us see. The answer is ({item.gold})."}
        for task, path in benchmarks.items()
        for item in read_items(task, path).items
    ]


def test_collected_outputs(tmp_path: Path, benchmarks: dict[str, str]):
    right = right_outputs(benchmarks)
    # The second file is matched by its prompts. One answer of CSQA is wrong, and one is a refusal.
    prompts = [
        prompt_hash(prompt_of(item))
        for task, path in benchmarks.items()
        for item in read_items(task, path).items
    ]
    other = [
        {"prompt_hash": hashed, "output": row["output"], "finished": False}
        for hashed, row in zip(prompts, right, strict=True)
        if row["task"] != "csqa"
    ]
    outputs = ["The answer is B.", "I cannot say.", "A"]
    other += [{"id": f"c{n}", "output": output} for n, output in enumerate(outputs)]
    good = write(tmp_path / "good.jsonl", right)
    config = config_of(tmp_path, {**benchmarks, "items_per_part": 2})
    summary = run_benchmarks(config, [good, f"bad={write(tmp_path / 'x.jsonl', other)}"])
    found = summary["models"]["good"]["generate"]
    assert {task: entry["accuracy"] for task, entry in found["tasks"].items()} == {
        "gsm8k": 1.0, "csqa": 1.0, "bbh": 1.0,
    }  # fmt: skip
    assert found["macro_average"] == {"accuracy": 1.0, "se": 0.0, "tasks": 3}
    assert set(found["tasks"]["bbh"]["subtasks"]) == {"navigate", "counting"}
    bad = summary["models"]["bad"]["generate"]["tasks"]
    assert bad["csqa"]["accuracy"] == pytest.approx(1 / 3)
    assert bad["csqa"]["answered"] == pytest.approx(2 / 3)
    assert (bad["csqa"]["finished"], bad["gsm8k"]["finished"]) == (1.0, 0.0)
    gap = summary["differences"]["good - bad"]["tasks"]["csqa"]
    assert gap["difference"] == pytest.approx(2 / 3) and gap["n"] == 3
    assert summary["files"]["csqa"] == {"items": 3, "unusable": [], "unreachable": {}}
    folder = config.folder / "eval" / "benchmarks"
    assert summary == json.loads((folder / "summary.json").read_text())
    samples = [json.loads(line) for line in (folder / "bad/csqa.jsonl").read_text().splitlines()]
    assert [sample["extracted"] for sample in samples] == ["B", None, "A"]
    assert [sample["score"] for sample in samples] == [0, 0, 1]
    assert {*samples[0]} == {
        *("task", "subtask", "id", "prompt_hash"),
        *("output", "extracted", "gold", "score", "finished"),
    }


def test_outputs_that_do_not_fit(tmp_path: Path, benchmarks: dict[str, str]):
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"]})
    some = write(tmp_path / "some.jsonl", right_outputs({"gsm8k": benchmarks["gsm8k"]})[:3])
    with pytest.raises(UserError, match="has no output for 2 of 5 items of gsm8k"):
        run_benchmarks(config, [some])
    keyless = write(tmp_path / "keyless.jsonl", [{"id": "x", "text": "y"}])
    with pytest.raises(UserError, match="needs output"):
        run_benchmarks(config, [keyless])
    # Nothing was made yet, so the repaired file counts.
    write(tmp_path / "some.jsonl", right_outputs({"gsm8k": benchmarks["gsm8k"]}))
    run_benchmarks(config, [some])
    write(tmp_path / "some.jsonl", [])
    (tmp_path / "some.jsonl").write_text('{"id": "other", "output": "1"}\n')
    with pytest.raises(UserError, match="was made with other settings"):
        run_benchmarks(config, [some])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    def chat(path: str, body: Body) -> Reply:
        (message,) = body["messages"]
        number = message["content"].split()[2]
        text = f"#### {2 * int(number)}"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return Reply(200, {"choices": [choice], "path": path})

    with FakeServer(lambda body: Reply(), other=chat) as fake:
        yield fake


def test_a_server_is_asked_for_what_is_missing(
    tmp_path: Path, benchmarks: dict[str, str], server: FakeServer
):
    keys = {"items_per_part": 2, "max_new_tokens": 77, "endpoint": {"retries": 0}}
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"], **keys})
    model = f"{server.url}#gpt"
    run_benchmarks(config, [model])
    asked = [(path, body) for path, body, _ in server.requests]
    assert len(asked) == 5 and {path for path, _ in asked} == {"/v1/chat/completions"}
    body = asked[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt", 0, 77)
    folder = config.folder / "eval" / "benchmarks" / "gpt"
    whole = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # The state after a kill: one part is missing, the next is half-written under another name.
    write_manifest(folder / "gsm8k", {**read_manifest(folder / "gsm8k"), "status": "running"})
    (folder / "gsm8k" / "part_00001.jsonl").unlink()
    (folder / "gsm8k" / ".part_00001.jsonl.tmp").write_text("{")
    (folder / "gsm8k.jsonl").unlink()
    summary = run_benchmarks(config, [model])
    assert len(server.requests) == 7
    again = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert again == whole
    assert summary["models"]["gpt"]["generate"]["tasks"]["gsm8k"]["accuracy"] == 1.0
    run_benchmarks(config, [model])
    assert len(server.requests) == 7


def test_a_server_that_fails_is_a_sentence(tmp_path: Path, benchmarks: dict[str, str]):
    config = config_of(
        tmp_path, {"gsm8k": benchmarks["gsm8k"], "endpoint": {"retries": 0, "timeout_s": 2}}
    )
    with (
        FakeServer(lambda body: Reply(), other=lambda path, body: Reply(400)) as fake,
        pytest.raises(UserError, match=r"evaluate.benchmarks.endpoint: .* refused POST"),
    ):
        run_benchmarks(config, [f"{fake.url}#gpt"])


def test_the_command_says_what_is_wrong(
    tmp_path: Path, benchmarks: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    import yaml

    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"]})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    good = write(tmp_path / "good.jsonl", right_outputs({"gsm8k": benchmarks["gsm8k"]}))

    def command(*options: str) -> tuple[int, str]:
        argv = ["--config", str(file), *options]
        code = evaluate.command(argv)
        out, err = capsys.readouterr()
        return code, out + err

    code, said = command("--model", good, "--benchmarks", "gsm8k")
    assert code == 0 and "gsm8k          generate: 100.00 +- 0.00, n 5" in said
    for options, sentence in (
        (("--model", "nothing"), "nothing is none of these: student"),
        (("--model", "student"), "has not trained this model"),
        (("--model", "student:middle"), "student:middle is none of these"),
        (("--model", "http://127.0.0.1:1"), "names no model"),
        (("--model", f"{good},x.jsonl"), "x.jsonl does not exist"),
        (("--model", good, "--model", good), "two models are called good"),
        (("--model", good, "--benchmarks", "arc"), "no files of arc are named"),
    ):
        code, said = command(*options)
        assert code == 2 and sentence in said and "Traceback" not in said, (options, said)


def test_without_benchmarks_in_the_config(tmp_path: Path, benchmarks: dict[str, str]):
    config = config_of(tmp_path, {"gsm8k": benchmarks["gsm8k"]})
    none = config.evaluate.model_copy(update={"benchmarks": None})
    with pytest.raises(UserError, match="names no benchmark"):
        run_benchmarks(config.model_copy(update={"evaluate": none}), ["student"])
    with pytest.raises(UserError, match="at least one benchmark"):
        config_of(tmp_path, {"limit": 3})


def test_who_is_named(tmp_path: Path, benchmarks: dict[str, str]):
    config = config_of(tmp_path, benchmarks)
    outputs = write(tmp_path / "some outputs.jsonl", [])
    assert named_candidate(config, outputs) == ("some_outputs", Collected(Path(outputs)))
    url = "http://localhost:8000"
    assert named_candidate(config, f"a={url}#org/gpt-4") == ("a", Server(url, "org/gpt-4"))
    assert named_candidate(config, f"{url}#org/gpt-4")[0] == "org_gpt-4"


def test_states_of_a_run(tmp_path: Path, benchmarks: dict[str, str]):
    """best, last and the phases are steps in the stage's manifest, and are not confused."""
    config = config_of(tmp_path, benchmarks)
    results = [
        {"phase": name, "step": n} for n, name in ((0, "raw"), (2, "warmup"), (5, "round_01"))
    ]
    for role in ("student", "proxy"):
        manifest = {"status": "complete", "best_step": 5, "last_step": 8, "results": results}
        (config.folder / role).mkdir(parents=True)
        (config.folder / role / "manifest.json").write_text(json.dumps(manifest))
    steps = {}
    for text in ("student", "student:last", "proxy", "proxy:last", "proxy:warmup", "proxy:round_1"):
        name, who = named_candidate(config, text)
        assert isinstance(who, Candidate)
        steps[name] = who.identity["step"]
    assert steps == {
        "student": 5, "student_last": 8, "proxy": 5, "proxy_last": 8, "proxy_warmup": 2,
        "proxy_round_1": 5,
    }  # fmt: skip
    with pytest.raises(UserError, match="no phase round_2; it has raw, warmup, round_01"):
        named_candidate(config, "proxy:round_2")
    with pytest.raises(UserError, match=r"no config.json"):
        named_candidate(config, "student:exported")


def test_prompts_ask_for_a_form_that_is_read():
    """The prompt of each kind asks for a last line; answers to another version do not count."""
    choices = (("A", "ice"), ("B", "fog"))
    listed = "Which?\nOptions:\n(A) ice\n(B) fog"
    items = {
        "plain": Item("arc", "", "1", "Which?", choices, "A", "choice"),
        "listed": Item("bbh", "x", "1", listed, choices, "A", "choice"),
        "several": Item("agieval", "x", "1", "Which?", choices, "AB", "choice", several=True),
        "number": Item("gsm8k", "", "1", "How many?", (), "3", "number"),
    }
    prompts = {name: prompt_of(item) for name, item in items.items()}
    assert prompts["plain"] == (
        "Which?\n\n(A) ice\n(B) fog\n\nThink step by step, then end with a line of this form:\n"
        "The answer is (X).\nwhere X is the label of the right choice."
    )
    assert prompts["listed"].count("(A) ice") == 1 and prompts["listed"].startswith(listed)
    assert "labels of all right choices" in prompts["several"]
    assert "#### N" in prompts["number"]
    assert question_alone(items["listed"]) == question_alone(items["plain"]) == "Which?"
    assert PROMPT_VERSION == 1
    assert prompt_hash(prompts["plain"]) == "fdb2a119c703d01b2bcd7008cc116b49"


def test_accuracies_and_differences():
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 2, (2, 40))
    samples = [
        [
            {
                "id": str(n),
                "subtask": "ab"[n % 2],
                "score": int(s),
                "extracted": None,
                "finished": 1,
            }
            for n, s in enumerate(scores)
        ]
        for scores in (one, two)
    ]
    found = accuracy(samples[0])
    assert found["accuracy"] == pytest.approx(one.mean()) and found["n"] == 40
    assert found["se"] == pytest.approx(one.std(ddof=1) / math.sqrt(40))
    assert found["subtasks"]["a"]["accuracy"] == pytest.approx(one[::2].mean())
    gap = paired_difference(samples[0], samples[1][::-1])
    assert gap is not None and gap["difference"] == pytest.approx((one - two).mean())
    assert gap["se"] == pytest.approx((one - two).std(ddof=1) / math.sqrt(40))
    assert paired_difference(samples[0], []) is None
    tasks = {"x": {"accuracy": 0.5, "se": 0.3}, "y": {"accuracy": 1.0, "se": 0.4}}
    average = macro_average(tasks)
    assert average == {"accuracy": 0.75, "se": pytest.approx(0.25), "tasks": 2}
    assert macro_average({"x": {"accuracy": 0.5, "se": None}})["se"] is None


def test_a_model_generates_and_compares(
    tmp_path: Path, benchmarks: dict[str, str], byte_model: Path
):
    """Greedy outputs are the model's argmax; log-likelihoods are sums over each choice's tokens."""
    import jax

    from proxykd_jax.models.decoder import forward
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.texts.records import Message, TextRow
    from proxykd_jax.texts.template import Renderer
    from proxykd_jax.texts.tokenizer import load_tokenizer

    keys = {"mode": "both", "limit": 2, "max_new_tokens": 3, "items_per_part": 1, "batch_size": 8}
    config = config_of(tmp_path, {"csqa": benchmarks["csqa"], **keys}, byte_model)
    summary = run_benchmarks(config, [f"tiny={byte_model}", "student:before"])
    assert summary["differences"]["tiny - student_before"]["tasks"]["csqa"]["difference"] == 0
    assert set(summary["models"]["tiny"]["loglikelihood"]) == {"raw", "length_normalised"}
    folder = config.folder / "eval" / "benchmarks" / "tiny"
    sample = json.loads((folder / "csqa.jsonl").read_text().splitlines()[0])
    compared = json.loads((folder / "csqa_loglikelihood.jsonl").read_text().splitlines()[0])

    _, who = named_candidate(config, str(byte_model))
    assert isinstance(who, Candidate)
    model = who.load(make_mesh(config.mesh.of("evaluate")))
    tokenizer = load_tokenizer(byte_model)
    renderer = Renderer(tokenizer, "plain")
    compiled = jax.jit(
        lambda tokens: jax.nn.log_softmax(
            forward(model.params, None, tokens, config=model.config), axis=-1
        )
    )

    def logps(tokens: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, 384), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(compiled(padded)[0])

    (item, *_) = read_items("csqa", benchmarks["csqa"]).items
    tokens, _ = renderer.encode(TextRow((Message("user", prompt_of(item)),), None, "here"))
    drawn: list[int] = []
    while len(drawn) < 3 and 0 not in drawn:
        row = np.append(tokens, drawn).astype(np.int32)
        drawn.append(int(logps(row)[len(row) - 1].argmax()))
    assert sample["output"] == tokenizer.decode([token for token in drawn if token])
    assert sample["finished"] == (0 in drawn)
    for (_, text), loglik in zip(item.choices, compared["logliks"], strict=True):
        messages = (Message("user", question_alone(item)), Message("assistant", text))
        tokens, place = renderer.encode(TextRow(messages, None, "here"))
        steps = logps(tokens)[place - 1 :]
        # The end token does not belong to a choice.
        wanted = sum(float(steps[n][token]) for n, token in enumerate(tokens[place:-1]))
        assert loglik == pytest.approx(wanted, abs=1e-3)


def test_all_tasks_are_in_the_config():
    from proxykd_jax.config.schema import BenchmarksConfig

    named = BenchmarksConfig(**dict.fromkeys(TASKS, "somewhere"))
    assert tuple(named.paths) == TASKS
