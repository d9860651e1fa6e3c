"""Answers from a server: requests, how replies become tokens, and how failures end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.miniature.pretrain import write_tokenizer
from proxykd_jax.config.schema import SamplingServer
from proxykd_jax.errors import UserError
from proxykd_jax.generation import server as server_module
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import (
    KEPT,
    NOT_REENCODABLE,
    LengthBudget,
    SampleStore,
    sample_round,
)
from proxykd_jax.generation.server import ServerClient, UnansweredError
from proxykd_jax.generation.server_answers import make_served_draw, spell
from proxykd_jax.random_keys import request_seed
from proxykd_jax.texts.tokenizer import Tokenizer, load_tokenizer
from tests.generation.fake_server import Body, FakeServer, Reply, completion
from tests.generation.test_samples import Rows, row_id_of

END, OTHER_END = 44, 45
PROMPTS = [np.array(p, np.int32) for p in ([5, 6], [7], [8, 9, 3], [4, 4])]
IDS = [row_id_of(prompt, len(prompt)) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(server_module, "_LONGEST_WAIT_S", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of words: a number is its own id, and 44 is </s>."""
    folder = tmp_path_factory.mktemp("tokenizer") / "words"
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def echo() -> Iterator[FakeServer]:
    """A server that answers with the ids of the prompt, as ids and as text."""

    def answer(body: Body) -> Reply:
        ids = body["prompt"]
        return completion(" ".join(map(str, ids)), token_ids=ids, prompt_tokens=len(ids))

    with FakeServer(answer) as server:
        yield server


def client_of(fake: FakeServer, **keys: Any) -> ServerClient:
    keys = {"api": "vllm", "timeout_s": 20.0, "retries": 2, **keys}
    return ServerClient(SamplingServer(url=fake.url, **keys), "base")


def drawing(fake: FakeServer, tokenizer: Tokenizer, *, ends=(END,), round_index=1, **keys: Any):
    return make_served_draw(
        client_of(fake, **keys),
        "name",
        tokenizer,
        DrawSettings(0.7, 0.9, 1, tuple(ends)),
        seed=3,
        round_index=round_index,
    )


def one(tokenizer: Tokenizer, reply: Reply, *, budget=5, ends=(END,), **keys: Any) -> Sample:
    """The answer to one prompt from a server that gives this reply."""
    with FakeServer(lambda body: reply) as fake:
        (sample,) = drawing(fake, tokenizer, ends=ends, **keys)(PROMPTS[:1], IDS[:1], [budget])
    return sample


TEXT = {"api": "transformers", "serves": "merged", "prompt_as": "text"}


# --- what is asked --------------------------------------------------------------------------------


def test_each_row_is_asked_for_alone_and_answers_keep_the_rows_order(tokenizer):
    started = threading.Barrier(len(PROMPTS), timeout=20)

    def answer(body: Body) -> Reply:
        started.wait()  # passes only if all requests run at the same time
        time.sleep(0.1 / len(body["prompt"]))  # so the first rows are not answered first
        return completion("x", token_ids=body["prompt"])

    with FakeServer(answer) as fake:
        samples = drawing(fake, tokenizer, concurrency=4)(PROMPTS, IDS, [9, 8, 7, 6])
        bodies = fake.bodies()
    for sample, prompt in zip(samples, PROMPTS, strict=True):
        np.testing.assert_array_equal(sample.tokens, [*prompt, END])
        assert sample.finished and sample.tokens.dtype == np.int32
        assert np.isnan(sample.logps).all() and sample.logps.shape == sample.tokens.shape
    asked = {tuple(body["prompt"]): body for body in bodies}
    assert [asked[tuple(p)]["max_tokens"] for p in PROMPTS] == [9, 8, 7, 6]
    assert {(b["model"], b["temperature"], b["top_p"]) for b in bodies} == {("name", 0.7, 0.9)}


def test_no_more_requests_are_under_way_than_allowed(tokenizer):
    lock, under_way, most = threading.Lock(), 0, 0

    def answer(body: Body) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return completion("x", token_ids=[1])

    with FakeServer(answer) as fake:
        drawing(fake, tokenizer, concurrency=2)(PROMPTS * 3, IDS * 3, [9] * 12)
    assert most == 2


def test_a_seed_belongs_to_seed_round_and_row(echo, tokenizer):
    for round_index in (1, 1, 2):
        drawing(echo, tokenizer, round_index=round_index)(PROMPTS, IDS, [9] * 4)
    seeds = [
        {tuple(body["prompt"]): body["seed"] for body in echo.bodies()[start : start + 4]}
        for start in (0, 4, 8)
    ]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0].values(), *seeds[2].values()}) == 8
    assert seeds[0][tuple(PROMPTS[0])] == request_seed(3, 1, IDS[0]) != request_seed(4, 1, IDS[0])
    assert all(0 <= seed < 2**31 for seed in seeds[0].values())


def test_a_row_without_budget_is_not_asked_for(echo, tokenizer):
    samples = drawing(echo, tokenizer)(PROMPTS[:2], IDS[:2], [0, 4])
    assert [len(s.tokens) for s in samples] == [0, 2]
    assert samples[0].spelled and not samples[0].finished and len(echo.bodies()) == 1


def test_each_server_is_told_to_draw_from_the_whole_softmax_and_where_to_end(echo, tokenizer):
    ends = (END, OTHER_END)
    for api in ("vllm", "sglang"):
        drawing(echo, tokenizer, ends=ends, api=api)(PROMPTS[:1], IDS[:1], [4])
    vllm, sglang = echo.bodies()
    for body in (vllm, sglang):
        assert body["prompt"] == [5, 6] and body["stop_token_ids"] == [END, OTHER_END]
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
        assert body["return_token_ids"] is True and body["skip_special_tokens"] is False
    assert vllm["ignore_eos"] is True
    assert "ignore_eos" not in sglang
    assert (sglang["model"], sglang["lora_path"]) == ("base", "name")
    with FakeServer(lambda body: completion("5")) as fake:
        drawing(fake, tokenizer, ends=ends, **TEXT)(PROMPTS[:1], IDS[:1], [4])
        (body,) = fake.bodies()
    # This is the whole list of fields: transformers serve refuses unknown ones.
    assert body.keys() == {
        *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "generation_config")
    }
    assert body["prompt"] == "5 6" and body["model"] == "name"
    told = json.loads(body["generation_config"])
    assert told["do_sample"] is True and told["top_k"] == 0 and told["eos_token_id"] == [*ends]


def test_a_prompt_that_no_text_stands_for_is_not_sent(tokenizer):
    """Every unknown word becomes <unk>, so no text gives back these ids."""
    words = np.array([tokenizer.token_id("<unk>"), 5], np.int32)
    text = tokenizer.decode(words).replace("<unk>", "nothing")
    assert tokenizer.encode(text)[0] == words[0]  # the text is ambiguous, the ids are not
    beyond = np.array([5, tokenizer.vocab_size + 3], np.int32)
    with FakeServer(lambda body: completion("5")) as fake:
        samples = drawing(fake, tokenizer, **TEXT)([PROMPTS[0], beyond], IDS[:2], [4, 4])
        assert len(fake.bodies()) == 1
    assert [s.spelled for s in samples] == [True, False]


def test_text_prompts_of_real_tokenizers_come_out_as_the_same_ids(assets):
    """BOS is sent if the server does not add it, and left out if it does."""
    stories = load_tokenizer(assets / "models" / "stories260K")
    ids = stories.backend.encode("Once upon a time, Lily").ids
    assert ids[0] == stories.bos_id
    prompt = np.array(ids, np.int32)
    for api, serves in (("transformers", "merged"), ("sglang", "adapter"), ("vllm", "adapter")):
        keys = {"api": api, "serves": serves, "prompt_as": "text"}
        with FakeServer(lambda body: completion(" was", prompt_tokens=len(ids))) as fake:
            drawing(fake, stories, **keys)([prompt], IDS[:1], [9])
            (body,) = fake.bodies()
        adds = body.get("add_special_tokens", True)
        assert stories.backend.encode(body["prompt"], add_special_tokens=adds).ids == ids, api
    # A prompt without BOS needs a server that can be told to add none.
    for api, spelled in (("sglang", False), ("vllm", True)):
        with FakeServer(lambda body: completion(" was")) as fake:
            keys = {"api": api, "prompt_as": "text"}
            (sample,) = drawing(fake, stories, **keys)([prompt[1:]], IDS[:1], [9])
            assert sample.spelled is spelled
            assert [body["add_special_tokens"] for body in fake.bodies()] == [False] * spelled


# --- what becomes of a reply ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, reason, tokens",
    [
        ({"token_ids": [5, 6]}, "stop", [5, 6, END]),  # without the end token
        ({"token_ids": [5, 6, END]}, "stop", [5, 6, END]),
        ({"token_ids": [5, 6, OTHER_END]}, "stop", [5, 6, OTHER_END]),  # another end token of ours
        ({"token_ids": [5, 6], "stop_reason": OTHER_END}, "stop", [5, 6, OTHER_END]),
        ({"token_ids": [5, 6, 1], "matched_stop": 1}, "stop", [5, 6, END]),  # not our end token
        ({"token_ids": [5, 6]}, "length", [5, 6]),
        ({"token_ids": [5, 6, END]}, "length", [5, 6, END]),  # at the last place
        ({"token_ids": [END]}, "stop", [END]),
        ({"token_ids": []}, "stop", [END]),
        ({}, "stop", [5, 6, END]),
        ({"matched_stop": OTHER_END}, "stop", [5, 6, OTHER_END]),
        ({}, "length", [5, 6]),
    ],
)  # fmt: skip
def test_stop_ends_an_answer_and_length_does_not(tokenizer, choice, reason, tokens):
    sample = one(tokenizer, completion("5 6", reason, **choice), ends=(END, OTHER_END))
    np.testing.assert_array_equal(sample.tokens, tokens)
    assert sample.spelled and sample.finished == (tokens[-1:] in ([END], [OTHER_END]))


@pytest.mark.parametrize(
    "reply, budget",
    [
        (completion("5 nothing 6"), 9),  # a word outside the vocabulary
        (completion("5  6"), 9),  # two spaces, which tokens do not keep
        (completion("5 \ufffd"), 9),  # half a character
        (completion("5 6 7"), 3),  # one token more than allowed, with the end token
        (completion("5 6 7 8", "length"), 3),
        (completion("x", token_ids=[5, 46]), 9),  # an id that has an embedding row but no token
        (completion("x", token_ids=[5, 6, 7, 8]), 3),
    ],
)
def test_what_our_tokens_do_not_spell_within_the_budget_is_left_out(tokenizer, reply, budget):
    sample = one(tokenizer, reply, budget=budget)
    assert not sample.spelled and len(sample.tokens) == 0 and not sample.finished


def test_it_fits_the_budget_with_its_end_token(tokenizer):
    assert len(one(tokenizer, completion("5 6 7"), budget=4).tokens) == 4
    assert len(one(tokenizer, completion("5 6 7", "length"), budget=3).tokens) == 3


def test_a_leading_space_belongs_to_the_first_word(assets):
    """For a tokenizer that marks words by a leading space.

    A text in its context has the space, a text alone has lost it, and the rest of a word has none.
    """
    stories = load_tokenizer(assets / "models" / "stories260K")
    prompt = stories.encode("Once upon a time, Li")
    drawn = stories.encode("Once upon a time, Li was big")[len(prompt) :]
    assert stories.decode(drawn) == "was big"
    np.testing.assert_array_equal(spell("was big", prompt, stories, alone=True), drawn)
    np.testing.assert_array_equal(spell(" was big", prompt, stories, alone=False), drawn)
    whole = stories.encode("Once upon a time, Lixx was")
    np.testing.assert_array_equal(whole[: len(prompt)], prompt)
    found = spell("xx was", prompt, stories, alone=False)
    np.testing.assert_array_equal(found, whole[len(prompt) :])
    assert not np.array_equal(found, stories.encode("xx was"))


def test_dropped_answers_are_counted_and_stored_ones_have_no_log_probs(tokenizer, tmp_path):
    """The store is as with any sampler, with one more reason and without reference log-probs."""
    split = Rows(6)

    def answer(body: Body) -> Reply:
        return completion("nothing" if sum(body["prompt"]) % 2 else "1 2 3 4 5 6")

    store = SampleStore(tmp_path / "round_01")
    store.begin({}, {})
    with FakeServer(answer) as fake:
        sample_round(
            store, split, range(6), sample_fn=drawing(fake, tokenizer), against_teacher=True,
            rows_per_part=4, budget=LengthBudget(30), end_token_ids=[END],
        )  # fmt: skip
    odd = np.array([sum(row.prompt.tolist()) % 2 for row in split.read(range(6))], bool)
    assert 0 < odd.sum() < 6
    np.testing.assert_array_equal(store.drops, np.where(odd, NOT_REENCODABLE, KEPT))
    store.append_references(
        0, np.arange(6, dtype=np.int32), -np.ones(6, np.float32), -np.ones(6, np.float32)
    )
    store.complete()
    counts = json.loads((tmp_path / "round_01" / "manifest.json").read_text())["counts"]
    assert counts["dropped_not_reencodable"] == odd.sum() and counts["kept"] == 6 - odd.sum()
    assert counts["dropped_empty"] == counts["dropped_equals_chosen"] == 0
    assert "reference_gap" not in counts
    assert all(np.isnan(row.loglik) for row in store.read(np.flatnonzero(~odd)))


# --- failures -------------------------------------------------------------------------------------

BUSY = Reply(503, {"error": "busy"})
PASSING = {
    "busy": BUSY,
    "too many": Reply(429, {}, {"Retry-After": "0.01"}),
    "date": Reply(429, {}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "cut": Reply(0),
    "html": Reply(200, b"<html>"),
    "torn": Reply(200, b'{"choices": [{"text": "5'),
    "no choice": Reply(200, {"choices": []}),
    "null": Reply(200, {"choices": [{"text": None, "finish_reason": "stop"}]}),
    "aborted": completion("5", "abort"),
    "no object": Reply(200, [1]),
    "half a body": Reply(200, {"a": 1}, {"Content-Length": "500"}),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again_and_not_for_ever(name, echo, tokenizer):
    echo.script = [PASSING[name]] * 2
    (sample,) = drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])
    np.testing.assert_array_equal(sample.tokens, [5, 6, END])
    assert len(echo.bodies()) == 3
    echo.script = [PASSING[name]] * 9
    with pytest.raises(UnansweredError, match="was asked 3 times") as caught:
        drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])
    assert len(echo.bodies()) == 6 and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_final(status, echo, tokenizer, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret-key")
    reply = Reply(status, {"error": "no,\nsecret-key is not it"}, {"Location": "/v1/models"})
    echo.script = [reply]
    with pytest.raises(UserError, match=f"refused POST /v1/completions: status {status}") as caught:
        drawing(echo, tokenizer, api_key_env="SERVER_KEY")(PROMPTS[:1], IDS[:1], [4])
    assert "is not it" in str(caught.value) and "secret-key" not in str(caught.value)
    assert len(echo.requests) == 1 and "\n" not in str(caught.value)


def test_a_reply_is_not_waited_for_for_ever(echo, tokenizer):
    echo.script = [Reply(after_s=30)] * 9
    start = time.monotonic()
    with pytest.raises(UnansweredError, match="was asked 2 times"):
        drawing(echo, tokenizer, timeout_s=0.2, retries=1)(PROMPTS[:1], IDS[:1], [4])
    assert time.monotonic() - start < 10


def test_a_failure_ends_the_other_requests(tokenizer):
    """The first refusal stops requests that wait for another try, and those not yet started."""

    def answer(body: Body) -> Reply:
        return Reply(400, {}, after_s=0.2) if body["prompt"] == [7] else BUSY

    with FakeServer(answer) as fake:
        with pytest.raises(UserError, match="refused"):
            drawing(fake, tokenizer, concurrency=2, retries=10_000)(PROMPTS * 9, IDS * 9, [4] * 36)
        done = len(fake.requests)
        time.sleep(0.1)
        assert len(fake.requests) == done
        assert sum(body["prompt"] != [5, 6] for body in fake.bodies()) <= 3  # of 27


def test_nothing_listens():
    client = ServerClient(SamplingServer(url="http://127.0.0.1:9", api="vllm", retries=1), "base")
    with pytest.raises(UnansweredError, match="check that the server is running there"):
        client.check()


def test_another_model_is_refused(echo, tokenizer):
    client_of(echo).check()
    client_of(echo, model="base").check()
    # This server loads a model when it is first asked for it.
    client_of(echo, model="big", **TEXT).check()
    with pytest.raises(UserError, match="serves base, not big; start it"):
        client_of(echo, model="big").check()
    echo.script = [completion("5", model="base")]
    with pytest.raises(UserError, match="answered with the model base, not name"):
        drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])
    echo.script = [completion("5", model="name@main")]  # transformers serve names models like this
    drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])


def test_a_server_with_another_tokenizer_is_refused(echo, tokenizer):
    echo.script = [completion("5", prompt_tokens=3)]
    with pytest.raises(UserError, match="a prompt of 2 tokens was read as 3"):
        drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])


def test_the_key_goes_along_and_must_be_there(echo, tokenizer, monkeypatch):
    drawing(echo, tokenizer)(PROMPTS[:1], IDS[:1], [4])
    monkeypatch.setenv("SERVER_KEY", "secret-key")
    drawing(echo, tokenizer, api_key_env="SERVER_KEY")(PROMPTS[:1], IDS[:1], [4])
    sent = [headers.get("Authorization") for _, _, headers in echo.requests]
    assert sent == [None, "Bearer secret-key"]
    monkeypatch.delenv("SERVER_KEY")
    with pytest.raises(UserError, match="SERVER_KEY is not set"):
        client_of(echo, api_key_env="SERVER_KEY")


@pytest.mark.parametrize(
    "keys, calls",
    [
        ({"api": "vllm"}, ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]),
        ({"api": "sglang"}, ["/load_lora_adapter", "/unload_lora_adapter"]),
        ({"api": "sglang", "serves": "merged"}, ["/update_weights_from_disk"]),
        (TEXT, ["/reset"]),
    ],
)
def test_weights_come_and_go_as_each_server_has_it(echo, keys, calls, tmp_path):
    client = client_of(echo, **keys)
    client.load("name", tmp_path)
    client.unload("name")
    assert [path for path, _, _ in echo.requests] == calls
    told = echo.requests[0][1]
    if "lora" in calls[0]:
        assert told == {"lora_name": "name", "lora_path": str(tmp_path)}
        assert echo.requests[1][1] == {"lora_name": "name"}
    elif calls[0] == "/update_weights_from_disk":
        assert told == {"model_path": str(tmp_path)}


def test_weights_that_a_server_refuses(tmp_path):
    refusal = Reply(400, {"message": "rank 64 is more than 16"})
    with FakeServer(lambda body: Reply(), other=lambda path, body: refusal) as fake:
        with pytest.raises(UserError, match="rank 64 is more than 16"):
            client_of(fake).load("name", tmp_path)
        client_of(fake).unload("name")  # unloading an absent adapter is no error


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"api": "transformers"}, "transformers loads no adapter"),
        ({"api": "transformers", "serves": "merged"}, "prompt_as: text"),
        ({"api": "vllm", "serves": "merged"}, "cannot change its model"),
        ({"api": "vllm", "url": "127.0.0.1:8000"}, "url"),
        ({"api": "vllm", "url": "http://user:word@host"}, "url"),
        ({"api": "vllm", "url": "http://host?key=1"}, "url"),
    ],
)
def test_settings_that_cannot_work_are_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        SamplingServer(**{"url": "http://127.0.0.1:8000", **keys})


def test_a_failure_keeps_finished_parts_and_a_rerun_asks_for_the_others_alone(
    tokenizer, tmp_path: Path
):
    split = Rows(11)

    def make(fake: FakeServer) -> SampleStore:
        store = SampleStore(tmp_path / "round_01")
        store.begin({}, {})
        sample_round(
            store, split, range(11), sample_fn=drawing(fake, tokenizer), against_teacher=True,
            rows_per_part=3, budget=LengthBudget(30), end_token_ids=[END],
        )  # fmt: skip
        return store

    answered = 0

    def breaks(body: Body) -> Reply:
        nonlocal answered
        answered += 1
        return completion("1 2", token_ids=[1, 2]) if answered <= 5 else BUSY

    with FakeServer(breaks) as fake, pytest.raises(UnansweredError):
        make(fake)
    assert len(SampleStore(tmp_path / "round_01")) == 3
    with FakeServer(lambda body: completion("1 2", token_ids=[1, 2])) as fake:
        store = make(fake)
        assert len(store) == 11 and len(fake.bodies()) == 8
        make(fake)
        assert len(fake.bodies()) == 8
