"""Collecting a teacher's answers: every reply gets its right end, and no kill pays or loses one."""

from __future__ import annotations

import email.utils
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax import collect
from proxykd_jax.collecting import collector
from proxykd_jax.collecting.batch import MOST
from proxykd_jax.collecting.exchange import MOST_REPLY_BYTES
from proxykd_jax.collecting.ledger import FILES, INDEX
from proxykd_jax.collecting.limits import Rate
from proxykd_jax.collecting.replies import compiled, is_refusal
from proxykd_jax.config import SourceConfig, load_collect
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops
from tests.collect_server import Body, CollectServer, Reply, chat, http, prompt_of

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "sk-loopback-0123456789"
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(collector, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes the section ``collect`` for prompts, a server and more keys."""

    def made(prompts: list[Any], url: str, **keys: Any) -> Any:
        rows = [{"prompt": prompt} for prompt in prompts]
        path = tmp_path / "collect.yaml"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "prompts.jsonl").write_text(lines)
        section = {
            "prompts": [{"path": str(tmp_path / "prompts.jsonl")}],
            "folder": str(tmp_path / "out"),
            "url": url,
            "model": "teacher",
            "retries": 2,
            "timeout_s": 0.4,
            **keys,
        }
        path.write_text(json.dumps({"collect": section}))
        return load_collect(path)

    return made


def rows(folder: str | Path, kind: str) -> list[Body]:
    """The rows of one of the files."""
    return [json.loads(line) for line in (Path(folder) / FILES[kind]).read_text().splitlines()]


def asked(row: Body) -> str:
    """The prompt of a row of any file."""
    messages = row.get("asked") or row["messages"][:-1]
    text: str = messages[-1]["content"]
    return text


# --- what becomes of a reply ----------------------------------------------------------------------

FINE = chat("fine")
BROKEN = http(200, b'{"choices": [{"mess', billed=True)


def _error(status: int, message: str = "no", **more: Any) -> Reply:
    headers = more.pop("headers", None)
    return http(status, {"error": {"message": message, **more}}, headers=headers)


def _cut(content: bytes = b'{"choices"', close: str = "close") -> Reply:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"
    return Reply([head + content, close], billed=True)


def _soon() -> str:
    return email.utils.format_datetime(
        email.utils.localtime().fromtimestamp(time.time() + 0.3).astimezone(), usegmt=False
    )


DRIP = [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", *[b" ", 0.1] * 20]
SLOW_HEAD = [b"HTTP/1.1 200 OK\r\n", *[b"X: 1\r\n", 0.1] * 20]
HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MOST_REPLY_BYTES + 10)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FINE_BODY = FINE.steps[1].split(b"\r\n\r\n")[1]
SURROGATE = http(200, FINE_BODY.replace(b'"fine"', b'"\\ud800"'), billed=True)

# Once this reply, then a fine one: it is asked again and answered.
PASSES = {
    "408": _error(408),
    "409": _error(409),
    "425": _error(425),
    "429": _error(429, type="rate_limit_exceeded"),
    "429, Retry-After": _error(429, headers={"Retry-After": "0.2"}),
    "429, a date": _error(429, headers={"Retry-After": _soon()}),
    "429, milliseconds": _error(429, headers={"retry-after-ms": "50"}),
    "429, nonsense": _error(429, headers={"Retry-After": "nan"}),
    "429, negative": _error(429, headers={"Retry-After": "-5"}),
    "500": _error(500),
    "502, HTML": http(502, b"<html>Bad Gateway</html>"),
    "503, Retry-After": _error(503, headers={"Retry-After": "0.1"}),
    "504": http(504, b""),
    "529": _error(529, type="overloaded_error"),
    "599, no body": Reply([b"HTTP/1.1 599 ?\r\nContent-Length: 0\r\n\r\n"]),
    "no reply": Reply([1.0, "close"]),
    "drips": Reply([*DRIP, "close"]),
    "drips headers": Reply([*SLOW_HEAD, "close"]),
    "reset": Reply(["reset"]),
    "closed": Reply(["close"]),
    "cut": _cut(),
    "cut, reset": _cut(close="reset"),
    "cut chunk": Reply([CHUNKED + b"50\r\n{", "close"]),
    "no such protocol": Reply([b"SSH-2.0-OpenSSH\r\n\r\n", "close"]),
    "HTML": http(200, b"<html>log in</html>", headers={"Content-Type": "text/html"}),
    "no content": http(200, b""),
    "broken JSON": BROKEN,
    "a list": http(200, []),
    "not UTF-8": http(200, b'{"choices": "\xff"}'),
    "nested too deep": http(200, b"[" * 100_000),
    "no choices": http(200, {"choices": []}),
    "null choices": http(200, {"choices": None}),
    "two choices": http(200, {"choices": [{}, {}]}),
    "no message": http(200, {"choices": [{"finish_reason": "stop"}]}),
    "error under 200": http(200, {"error": {"message": "overloaded", "code": "busy"}}),
    "429 under 200": http(200, {"error": {"message": "slow down", "code": 429}}),
    "content of a wrong type": chat({"text": "x"}),
    "a stream": http(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    "202": http(202, {}),
    "204": Reply([b"HTTP/1.1 204 No Content\r\n\r\n"]),
    "too long": Reply([HUGE, b" " * (MOST_REPLY_BYTES + 10)]),
}
# A complete answer of another kind: it is paid, kept apart, and not asked again.
KEPT_APART = {
    "null": (chat(None), "empty"),
    "nothing": (chat(""), "empty"),
    "blank": (chat(" \n"), "empty"),
    "length": (chat("It begi", "length"), "cut"),
    "filter": (chat("It", "content_filter"), "filtered"),
    "filtered prompt": (_error(400, code="content_filter"), "filtered"),
    "moderated": (_error(403, metadata={"reasons": ["violence"]}), "filtered"),
    "refusal": (chat(None, message={"refusal": "I will not."}), "refused"),
    "refusal as text": (chat("I\u2019m sorry, but I can\u2019t assist with that."), "refused"),
    "refusal as reason": (chat("", "refusal"), "refused"),
    "tool": (chat(None, "tool_calls", message={"tool_calls": [{}]}), "unusable"),
    "no reason": (chat("It", None), "unusable"),
    "NUL": (chat("a\0b"), "unusable"),
    "half a character": (SURROGATE, "unusable"),
}
# Never asked again, and other requests go on.
REFUSED = {
    "400": _error(400, "too long", code="context_length_exceeded"),
    "413": http(413, b"too large"),
    "422": _error(422),
}
# Oddities of an answer that is fine.
FINE_STILL = {
    "parts": chat([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]),
    "no usage": chat("fine", usage="many"),
    "gzip": http(200, gzip.compress(FINE_BODY), headers={"Content-Encoding": "gzip"}),
    "NaN": http(200, FINE_BODY.replace(b"7", b"NaN"), billed=True),
    "infinite": http(200, FINE_BODY.replace(b"7", b"1e999"), billed=True),
    "closes": Reply([FINE.steps[1].replace(b"\r\n", b"\r\nConnection: close\r\n", 1), "close"]),
    "continue": Reply([b"HTTP/1.1 100 Continue\r\n\r\n" + FINE.steps[1]]),
}


def test_every_misbehaviour_has_its_end(make):
    def answer(body: Body, count: int) -> Reply:
        kind = prompt_of(body)
        if kind in PASSES:
            return FINE if count else PASSES[kind]
        kept = {name: reply for name, (reply, _) in KEPT_APART.items()}
        return {**kept, **REFUSED, **FINE_STILL}[kind]

    prompts = [*PASSES, *KEPT_APART, *REFUSED, *FINE_STILL]
    with CollectServer(answer, remembers=False) as server:
        config = make(prompts, server.url, concurrency=8)
        result = collect.main(config)
        hits = {prompt: server.count(prompt) for prompt in prompts}
    assert hits == {prompt: 2 if prompt in PASSES else 1 for prompt in prompts}
    answers = {asked(row): row for row in rows(config.folder, "answers")}
    assert set(answers) == PASSES.keys() | FINE_STILL.keys()
    assert {row["messages"][-1]["content"] for row in answers.values()} == {"fine"}
    apart = {asked(row): row["outcome"] for row in rows(config.folder, "set_aside")}
    assert apart == {kind: outcome for kind, (_, outcome) in KEPT_APART.items()}
    failed = {asked(row): row for row in rows(config.folder, "failed")}
    assert failed.keys() == REFUSED.keys() and all(row["final"] for row in failed.values())
    assert "too long" in failed["400"]["reason"]
    # Nothing is asked again, and the corpus is the answers alone.
    with CollectServer(answer) as server:
        again = collect.main(make(prompts, server.url))
        assert not server.requests and again.requests == result.requests
    drops = Drops()
    found = read_source(SourceConfig(path=config.folder), prompts_only=False, drops=drops)
    assert len(list(found)) == len(answers) and not drops.total


@pytest.mark.parametrize("kind", ["set_aside", "failed"])
def test_what_is_kept_apart_is_no_corpus(make, kind):
    replies = {"a": chat("It begi", "length"), "b": _error(400)}
    with CollectServer(lambda body, count: replies[prompt_of(body)]) as server:
        config = make(["a", "b"], server.url)
        collect.main(config)
    source = SourceConfig(path=str(Path(config.folder) / FILES[kind]))
    with pytest.raises(UserError, match="no known format"):
        list(read_source(source, prompts_only=False, drops=Drops()))


@pytest.mark.parametrize(
    "reply, said",
    [
        (_error(401, f"Incorrect API key: {KEY}"), "status 401"),
        (_error(402), "status 402"),
        (_error(403), "status 403"),
        (_error(404, "no such model"), "no such model"),
        (_error(429, type="insufficient_quota"), "quota is exhausted"),
        (http(200, {"error": {"message": "no", "code": "insufficient_quota"}}), "quota"),
        (_error(429, headers={"Retry-After": "86400"}), "86400 s"),
        (http(307, b"", headers={"Location": "http://127.0.0.2/v1"}), "redirects"),
    ],
)
def test_what_no_waiting_mends_ends_the_run(make, monkeypatch, capfd, reply, said):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    wrong = True
    with CollectServer(lambda body, count: reply if wrong else FINE) as server:
        config = make(["a", "b", "c"], server.url, concurrency=1, api_key_env="TEACHER_KEY")
        with pytest.raises(UserError, match=said) as caught:
            collect.main(config)
        assert len(server.requests) == 1 and KEY not in str(caught.value)
        wrong = False
        collect.main(config)
        assert len(server.requests) == 4
        assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert len(rows(config.folder, "answers")) == 3
    assert KEY not in "".join(capfd.readouterr())
    assert not [
        path for path in Path(config.folder).rglob("*") if KEY.encode() in path.read_bytes()
    ]


def test_a_reply_that_repeats_the_key_leaves_no_trace(make, monkeypatch, capfd):
    monkeypatch.setenv("TEACHER_KEY", KEY + "\r\n")
    replies = {
        "a": chat(f"your key is {KEY}"),
        "b": _error(400, KEY),
        "c": chat(KEY, "length", model=KEY),
    }
    with CollectServer(lambda body, count: replies[prompt_of(body)]) as server:
        config = make(["a", "b", "c"], server.url, api_key_env="TEACHER_KEY")
        collect.main(config)
    assert not [
        path for path in Path(config.folder).rglob("*") if KEY.encode() in path.read_bytes()
    ]
    assert KEY not in "".join(capfd.readouterr())
    assert rows(config.folder, "answers")[0]["messages"][-1]["content"] == "your key is ***"


@pytest.mark.parametrize("key", ["", "sk-\u00fc-0123456789", "sk-012345\n6789"])
def test_a_key_that_cannot_be_sent_is_not_shown(make, monkeypatch, key):
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(UserError, match="TEACHER_KEY") as caught:
        collect.main(make(["a"], "http://127.0.0.1:9", api_key_env="TEACHER_KEY"))
    assert "0123" not in str(caught.value) and "6789" not in str(caught.value)


@pytest.mark.parametrize(
    "replies, same",
    [
        ([_cut(), FINE], True),  # perhaps paid and on its way: the server may still have it
        ([Reply(["reset"]), FINE], True),
        ([_error(429), FINE], True),
        ([_error(409), FINE], True),
        ([_error(500), FINE], False),  # a server that keeps errors would repeat this one
        ([BROKEN, FINE], False),
        ([_cut(), _error(500), FINE], True),
    ],
)
def test_when_a_request_keeps_its_idempotency_key(make, replies, same):
    left = list(replies)
    with CollectServer(lambda body, count: left.pop(0), remembers=False) as server:
        collect.main(make(["a"], server.url))
        keys = [headers["Idempotency-Key"] for _, headers in server.requests]
    assert len(keys) == len(replies) and (len(set(keys)) == 1) is same


def test_what_never_passes_is_given_up_with_reasons_and_tried_by_the_next_run(make):
    broken = True
    with CollectServer(lambda body, count: BROKEN if broken else FINE, remembers=False) as server:
        config = make(["a"], server.url)
        with pytest.raises(UserError, match="1 requests failed in ways that may pass"):
            collect.main(config)
        (row,) = rows(config.folder, "failed")
        assert not row["final"] and row["attempts"] == 3 and len(row["before"]) == 2
        assert "not a JSON object" in row["reason"]
        broken = False
        collect.main(config)
        assert server.count("a") == 4
    assert len(rows(config.folder, "answers")) == 1


def test_a_refused_request_is_asked_again_only_on_demand(make):
    with CollectServer(lambda body, count: FINE if count else _error(400)) as server:
        config = make(["a"], server.url)
        collect.main(config)
        assert collect.main(config).seen == {"refused before": 1}
        assert collect.main(config, retry_failed=True).seen == {"answered": 1}


def test_a_server_that_is_gone_ends_the_run(make):
    with CollectServer() as server:
        gone = server.url
    config = make([f"q{i}" for i in range(200)], gone)
    with pytest.raises(UserError, match=r"requests in a row had no answer.*refused"):
        collect.main(config)
    with CollectServer() as server:
        collect.main(make([f"q{i}" for i in range(200)], server.url))
    assert len(rows(config.folder, "answers")) == 200


def test_parameters_that_every_request_fails_by_end_the_run(make):
    with CollectServer(lambda body, count: _error(400, "no such parameter")) as server:
        with pytest.raises(UserError, match=r"in a row had no answer.*no such parameter"):
            collect.main(make([f"q{i}" for i in range(200)], server.url))
        assert len(server.requests) < 50


def test_many_refusals_after_an_answer_do_not_end_the_run(make):
    def answer(body: Body, count: int) -> Reply:
        return FINE if prompt_of(body) in ("first", "last") else _error(400, "too long")

    with CollectServer(answer) as server:
        prompts = ["first", *(f"q{i}" for i in range(30)), "last"]
        seen = collect.main(make(prompts, server.url, concurrency=1)).seen
    assert seen == {"answered": 2, "refused by the server": 30}


@pytest.mark.parametrize(
    "text, refused",
    [
        ("I'm sorry, but I can't assist with that request.", True),
        ("Sorry, I cannot help with that.", True),
        ("I cannot comply with this request. It is illegal.", True),
        ("As an AI language model, I can't assist with that.", True),
        ("Unfortunately, I am unable to view images.", True),
        ("I'm sorry to hear that you can't sleep. Try to read.", False),
        ("I can't help but smile at this story.", False),
        ("The answer is 4.", False),
        ("I'm sorry, but I can't assist with that. " + "However, " * 60, False),
    ],
)
def test_refusals_as_text(make, text, refused):
    patterns = compiled(make(["a"], "http://127.0.0.1:9").refusals)
    assert is_refusal(text, patterns) is refused


# --- what is sent ---------------------------------------------------------------------------------


def test_a_request_is_the_config_and_the_row_its_source(make):
    parameters = {"temperature": 0.5, "max_tokens": 9, "seed": 5}
    with CollectServer() as server:
        config = make(
            ["a", "a", "b"], server.url + "/", parameters=parameters, samples=2, top_logprobs=3
        )
        result = collect.main(config)
        bodies = sorted(
            (body for body, _ in server.requests), key=lambda b: (prompt_of(b), b["seed"])
        )
    assert result.seen == {"answered": 4, "repeated": 2}
    assert bodies[0] == {
        "model": "teacher",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 5,
        "logprobs": True,
        "top_logprobs": 3,
    }
    assert [body["seed"] for body in bodies] == [5, 6, 5, 6]
    row = min(rows(config.folder, "answers"), key=lambda row: (asked(row), row["sample"]))
    assert (row["model"], row["served_model"]) == ("teacher", "teacher-2026")
    assert row["parameters"] == parameters and row["finish_reason"] == "stop"
    assert row["usage"] == {"prompt_tokens": 7, "completion_tokens": 3}
    assert row["origin"].endswith("prompts.jsonl:1") and row["attempts"] == 1


def test_logprobs_are_kept_where_the_server_gives_them(make):
    given = [{"token": "x", "logprob": -0.1, "top_logprobs": [{"token": "y", "logprob": -2.0}]}]
    with_them = chat("x", choice={"logprobs": {"content": given}})
    replies = {"a": with_them, "b": FINE}
    with CollectServer(lambda body, count: replies[prompt_of(body)]) as server:
        config = make(["a", "b"], server.url, top_logprobs=1)
        collect.main(config)
    found = {asked(row): row.get("logprobs") for row in rows(config.folder, "answers")}
    assert found == {"a": given, "b": None}


def test_any_format_of_a_corpus_is_a_list_of_prompts(make, tmp_path):
    (tmp_path / "p").mkdir()
    chats = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "not the teacher's"},
        {"role": "user", "content": "u2"},
    ]
    for name, row in {
        "a": {"messages": chats},
        "b": {"instruction": "Add.", "input": "1 2", "output": "3"},
        "c": {"text": "Once upon a time"},
        "d": {"question": "1+1?", "answer": "#### 2"},
    }.items():
        (tmp_path / "p" / f"{name}.jsonl").write_text(json.dumps(row))
    with CollectServer() as server:
        make([], server.url)
        where = [{"path": str(tmp_path / "p"), "turns": "last"}]
        config = load_collect(tmp_path / "collect.yaml", [f"collect.prompts={json.dumps(where)}"])
        collect.main(config)
        sent = {prompt_of(body): body["messages"] for body, _ in server.requests}
    assert sent.keys() == {"u2", "Add.\n\n1 2", "Once upon a time", "1+1?"}
    assert sent["u2"] == chats
    # What the prompt quotes is context in the corpus, not an answer of the teacher.
    source = SourceConfig(path=config.folder)
    found = list(read_source(source, prompts_only=False, drops=Drops()))
    assert sorted(row.messages[-1].content for row in found) == sorted(f"re: {x}" for x in sent)
    assert sorted(len(row.messages) for row in found) == [2, 2, 2, 5]


def test_damaged_prompts_lose_no_reply(make, tmp_path):
    with CollectServer(work_s=0.1) as server:
        config = make(["a", "b"], server.url)
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write("{no JSON}\n")
        with pytest.raises(UserError, match=r"prompts.jsonl:3 is not JSON"):
            collect.main(config)
        assert len(rows(config.folder, "answers")) == len(server.requests) == 2


def test_what_a_server_says_cannot_harm_a_terminal(make):
    said = http(401, b'{"error": {"message": "\\u001b[2J\\ud800 no"}}')
    wanted = pytest.raises(UserError, match=r"status 401, \?\[2J\? no")
    with CollectServer(lambda body, count: said) as server, wanted:
        collect.main(make(["a"], server.url))


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"parameters": {"n": 4}}, "samples"),
        ({"parameters": {"stream": True}}, "never streamed"),
        ({"parameters": {"seed": "x"}}, "seed is an integer"),
        ({"refusals": ["("]}, "no pattern"),
        ({"url": "127.0.0.1:80"}, "must match"),
        ({"api_key": KEY}, "unknown key"),
    ],
)
def test_a_wrong_config_is_a_sentence(make, keys, said):
    with pytest.raises(UserError, match=said):
        make(["a"], **{"url": "http://127.0.0.1:9", **keys})


# --- limits ---------------------------------------------------------------------------------------


def test_a_rate_never_exceeds_its_limit_in_any_minute():
    for per_minute in (1, 7, 60, 1000):
        rate, now, sent = Rate(per_minute, 0.0), 0.0, []
        while now < 200 and len(sent) < 3000:
            wait_s = rate.wait_s(1, now)
            if wait_s > 0:
                now += wait_s + 1e-9
                continue
            rate.take(1)
            sent.append(now)
        most = max(sum(start <= at < start + 60 for at in sent) for start in sent[:50])
        assert most <= per_minute and most >= 0.95 * per_minute - 1


def test_requests_and_tokens_keep_their_rates(make):
    with CollectServer() as server:
        begun = time.monotonic()
        collect.main(make([f"q{i}" for i in range(20)], server.url, requests_per_minute=600))
        assert time.monotonic() - begun > 1
    usage = {"prompt_tokens": 500, "completion_tokens": 500}
    with CollectServer(lambda body, count: chat("x", usage=usage)) as server:
        begun = time.monotonic()
        config = make(["a", "b", "c"], server.url, tokens_per_minute=60_000, concurrency=1)
        collect.main(config)
        assert time.monotonic() - begun > 1


def test_pause_of_a_429_holds_for_all(make):
    times: list[float] = []

    def answer(body: Body, count: int) -> Reply:
        times.append(time.monotonic())
        return _error(429, headers={"Retry-After": "0.5"}) if len(times) == 1 else FINE

    with CollectServer(answer) as server:
        collect.main(make([f"q{i}" for i in range(10)], server.url, concurrency=1))
    assert times[1] - times[0] > 0.49 and len(times) == 11


def test_a_run_stops_before_the_request_that_is_too_many(make):
    with CollectServer() as server:
        config = make([f"q{i}" for i in range(30)], server.url)
        with pytest.raises(UserError, match="--max-requests 12 is reached"):
            collect.main(config, max_requests=12)
        assert len(server.requests) == 12 and len(rows(config.folder, "answers")) == 12
        with pytest.raises(UserError, match="12 were sent"):
            collect.main(config, max_requests=12)
        assert len(server.requests) == 12
        collect.main(config, max_requests=30)
    assert len(rows(config.folder, "answers")) == 30


@pytest.fixture
def priced(make, tmp_path):
    """Like ``make``, with prices: a prompt token costs 1, a token of an answer 10."""
    prices = tmp_path / "prices.yaml"
    prices.write_text("teacher: {input: 1.0e6, output: 1.0e7, batch: 0.5}\n")

    def made(prompts: list[str], url: str, **keys: Any) -> Any:
        known = {"parameters": {"max_tokens": 5}, "prices": str(prices), **keys}
        return make(prompts, url, **known)

    return made


def test_a_run_never_costs_more_than_it_may(priced):
    spent = 0.0

    def answer(body: Body, count: int) -> Reply:
        nonlocal spent
        if count == 0 and prompt_of(body).endswith("3"):
            return BROKEN  # paid, without a word of how much
        spent += 7 + 30
        return chat("fine")

    with CollectServer(answer, remembers=False) as server:
        config = priced([f"q{i:02}" for i in range(40)], server.url, concurrency=4)
        with pytest.raises(UserError, match="--max-cost 1000 is reached"):
            collect.main(config, max_cost=1000)
        assert 600 < spent <= 1000
        result = collect.main(config)
    assert result.spent >= spent and len(rows(config.folder, "answers")) == 40
    assert rows(config.folder, "answers")[0]["cost"] == 37


def test_a_limit_of_cost_needs_prices_and_a_bound(make, priced):
    for config in (
        make(["a"], "http://127.0.0.1:9"),
        priced(["a"], "http://127.0.0.1:9", parameters={}),
    ):
        with pytest.raises(UserError, match="--max-cost needs to know"):
            collect.main(config, max_cost=1)
    with pytest.raises(UserError, match="no price for the model 'other'"):
        collect.main(priced(["a"], "http://127.0.0.1:9", model="other"))


def test_an_estimate_sends_nothing(priced, capsys, tmp_path):
    with CollectServer() as server:
        config = priced(["four", "four", "eightfold"], server.url)
        collect.main(priced(["four"], server.url))
        priced(["four", "four", "eightfold"], server.url)
        capsys.readouterr()
        assert collect.command(["--config", str(tmp_path / "collect.yaml"), "--estimate"]) == 0
        assert len(server.requests) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "requests to send: 1 (1 more have an end or lie in a batch file, 1 are repeated)" in said
    assert "about 6, at four bytes a token" in said and "at most 5" in said
    assert "about 56.0000 if every" in said and "in batch files 28.0000" in said
    assert config.prices is not None


# --- stops and starts -----------------------------------------------------------------------------


def test_the_command_ends_with_sentences(make, tmp_path, capsys):
    with CollectServer() as server:
        make(["a"], server.url)
        arguments = ["--config", str(tmp_path / "collect.yaml")]
        assert collect.command([*arguments, "--max-requests", "0"]) == 2
        assert "error: stopped: --max-requests 0 is reached" in capsys.readouterr().err
        assert collect.command(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "answers.jsonl")
    assert collect.command(["--config", str(tmp_path / "no.yaml")]) == 2
    assert collect.command([*arguments, "--set", "collect.model=other"]) == 2
    assert "collect.model was" not in capsys.readouterr().out


def test_other_parameters_need_another_folder(make):
    with CollectServer() as server:
        collect.main(make(["a"], server.url))
        with pytest.raises(UserError, match=r'parameters was {} and is now {"top_p": 0.5}'):
            collect.main(make(["a"], server.url, parameters={"top_p": 0.5}))
        assert len(server.requests) == 1


def test_more_prompts_and_more_samples_go_on_in_the_folder(make):
    with CollectServer() as server:
        collect.main(make(["a"], server.url))
        collect.main(make(["b", "a"], server.url, samples=2))
        assert len(server.requests) == 4


def test_a_torn_line_is_removed_and_asked_again(make):
    with CollectServer() as server:
        config = make(["a", "b", "c"], server.url, concurrency=1)
        collect.main(config)
        path = Path(config.folder) / FILES["answers"]
        whole = path.read_bytes()
        (Path(config.folder) / INDEX).unlink()  # made again from the files
        path.write_bytes(whole[:-20])
        collect.main(config)
        assert len(server.requests) == 4 and server.billed["c"] == 1
        assert len(rows(config.folder, "answers")) == 3
        path.write_bytes(whole[:50])
        with pytest.raises(UserError, match="shorter than when it was written"):
            collect.main(config)
        (Path(config.folder) / INDEX).unlink()
        path.write_bytes(b"\0\0\0\n")
        with pytest.raises(UserError, match="damaged line"):
            collect.main(config)


def test_a_damaged_index_is_a_sentence(make):
    with CollectServer() as server:
        config = make(["a"], server.url)
        collect.main(config)
        for path in Path(config.folder).glob(f"{INDEX}*"):
            path.write_bytes(b"nothing of the kind" * 1000)
        with pytest.raises(UserError, match="Remove it"):
            collect.main(config)


def test_one_process_at_a_time(make):
    with CollectServer() as server:
        config = make(["a"], server.url)
        ledger = collect.open_ledger(config)
        with pytest.raises(UserError, match="in use by another"):
            collect.main(config)
        ledger.close()
        collect.main(config)


def test_a_stop_waits_for_what_is_under_way(make, monkeypatch):
    with CollectServer(work_s=0.1) as server:
        config = make([f"q{i}" for i in range(100)], server.url, concurrency=4)
        monkeypatch.setattr(collector.peers, "stop_wanted", lambda: len(server.requests) >= 8)
        with pytest.raises(Stopped):
            collect.main(config)
        monkeypatch.undo()
        kept = len(rows(config.folder, "answers"))
        assert kept == len(server.requests) < 20
        ledger = collect.open_ledger(config)
        assert not ledger.in_doubt and ledger.requests == kept
        ledger.close()


# --- batch files ----------------------------------------------------------------------------------


def _openai_result(key: str, reply: Any, status: int = 200) -> Body:
    response = {"status_code": status, "request_id": "r", "body": reply}
    return {"id": "batch_req_1", "custom_id": key, "response": response, "error": None}


def _chat_body(text: str, reason: str = "stop") -> Body:
    body: Body = json.loads(chat(text, reason).steps[1].split(b"\r\n\r\n")[1])
    return body


def _write_lines(path: Path, lines: list[Body]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_openais_batch_files(priced, tmp_path, capsys):
    with CollectServer() as server:
        config = priced(["a", "b", "c", "d", "e", "f"], server.url, samples=1)
        run = ["--config", str(tmp_path / "collect.yaml")]
        batch = tmp_path / "batches" / "b.jsonl"
        assert collect.command([*run, "--write-batch", str(batch), "--max-requests", "5"]) == 0
        said = capsys.readouterr()
        assert said.out.split() == [str(batch)] and "ends early: --max-requests 5" in said.err
        lines = [json.loads(line) for line in batch.read_text().splitlines()]
        assert lines[0] == {
            "custom_id": lines[0]["custom_id"],
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "teacher",
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 5,
            },
        }
        # What waits for a batch is not sent.
        assert collect.main(config).seen == {"in a batch file": 5, "answered": 1}
        assert [prompt_of(body) for body, _ in server.requests] == ["f"]
        a, b, c, d, e = (line["custom_id"] for line in lines)
        results = _write_lines(
            tmp_path / "results.jsonl",
            [
                _openai_result(c, _chat_body("I", "length")),
                _openai_result(a, _chat_body("one")),
                _openai_result(a, _chat_body("another")),
                _openai_result("request-1", _chat_body("whose?")),
            ],
        )
        errors = _write_lines(
            tmp_path / "errors.jsonl",
            [
                _openai_result(b, {"error": {"message": "too long"}}, 400),
                {"custom_id": d, "response": None, "error": {"code": "batch_expired"}},
            ],
        )
        assert collect.command([*run, "--read-batch", results, errors]) == 0
        assert rows(config.folder, "answers")[-1]["cost"] == (7 + 30) / 2
        seen = collect.read_batch(config, [Path(results)]).seen  # read again
        assert seen == {"known": 2, "of other requests": 1}
        # The expired one is sent; the one without a result waits until it is given up.
        assert collect.main(config).seen["answered"] == 1
        assert collect.command([*run, "--forget-batch", str(batch)]) == 0
        result = collect.main(config)
        assert [prompt_of(body) for body, _ in server.requests] == ["f", "d", "e"]
    assert e and {asked(row) for row in rows(config.folder, "answers")} == set("adef")
    assert [row["outcome"] for row in rows(config.folder, "set_aside")] == ["cut"]
    assert [row["final"] for row in rows(config.folder, "failed")] == [True, False]
    assert result.spent == pytest.approx(3 * 37 + 2 * 37 / 2)


def test_anthropics_batch_files(make, tmp_path):
    config = make(["a", "b", "c", "d"], "http://127.0.0.1:9",
                  parameters={"max_tokens": 5, "stop": "END", "temperature": 0.5})  # fmt: skip
    chats = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "e"}]}
    with (tmp_path / "prompts.jsonl").open("w") as file:
        file.write(json.dumps(chats) + "\n")
        for name in "abcd":
            file.write(json.dumps({"messages": [{"role": "user", "content": name}]}) + "\n")
    (batch,) = collect.write_batch(config, tmp_path / "b.json", "anthropic")
    asks = json.loads(batch.read_text())["requests"]
    assert asks[0]["params"] == {
        "model": "teacher",
        "max_tokens": 5,
        "temperature": 0.5,
        "stop_sequences": ["END"],
        "system": "S",
        "messages": [{"role": "user", "content": "e"}],
    }

    def ended(text: str, reason: str) -> Body:
        content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
        usage = {"input_tokens": 4, "output_tokens": 2}
        message = {"model": "t-1", "content": content, "stop_reason": reason, "usage": usage}
        return {"type": "succeeded", "message": message}

    invalid = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
    results = [
        ended("fine", "end_turn"),
        ended("fi", "max_tokens"),
        ended("", "refusal"),
        {"type": "errored", "error": invalid},
        {"type": "expired"},
    ]
    lines = [
        {"custom_id": ask["custom_id"], "result": result}
        for ask, result in zip(asks, results, strict=True)
    ]
    seen = collect.read_batch(config, [Path(_write_lines(tmp_path / "r.jsonl", lines))]).seen
    assert seen == {
        "answered": 1, "cut": 1, "refused": 1, "refused by the server": 1,
        "free to be sent again": 1,
    }  # fmt: skip
    (row,) = rows(config.folder, "answers")
    assert row["messages"] == [*chats["messages"], {"role": "assistant", "content": "fine"}]
    assert row["usage"] == {"prompt_tokens": 4, "completion_tokens": 2}
    (batch,) = collect.write_batch(config, tmp_path / "again.json", "anthropic")
    assert len(json.loads(batch.read_text())["requests"]) == 1


def test_a_batch_is_cut_at_the_service_limits(make, tmp_path, monkeypatch):
    monkeypatch.setitem(MOST, "openai", (2, 10**6))
    config = make(["a", "b", "c", "d", "e", "a"], "http://127.0.0.1:9")
    files = collect.write_batch(config, tmp_path / "b.jsonl", "openai")
    assert [path.name for path in files] == ["b.jsonl", "b-2.jsonl", "b-3.jsonl"]
    assert [len(path.read_text().splitlines()) for path in files] == [2, 2, 1]
    with pytest.raises(UserError, match="nothing to write"):
        collect.write_batch(config, tmp_path / "c.jsonl", "openai")


def test_batch_files_that_cannot_be_are_sentences(make, tmp_path):
    config = make(["a"], "http://127.0.0.1:9")
    with pytest.raises(UserError, match="needs max_tokens"):
        collect.write_batch(config, tmp_path / "b.json", "anthropic")
    (tmp_path / "b.jsonl").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        collect.write_batch(config, tmp_path / "b.jsonl", "openai")
    assert (tmp_path / "b.jsonl").read_text() == "kept"
    for read in (lambda path: collect.read_batch(config, [path]),
                 lambda path: collect.forget_batch(config, path)):  # fmt: skip
        with pytest.raises(UserError, match=r"no (result|line) of a batch"):
            read(tmp_path / "prompts.jsonl")


# --- kills ----------------------------------------------------------------------------------------


def _killed_runs(config: Any, waits_s: list[float]) -> int:
    """Runs in forks that are killed after these times; returns how many were not done by then."""
    killed = 0
    for wait_s in waits_s:
        child = os.fork()
        if not child:
            try:
                collect.main(config)
            finally:
                os._exit(0)
        time.sleep(wait_s)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return killed


def _kill(config_file: Path, count: int, longest_s: float) -> int:
    """``_killed_runs`` in a process that has no threads, because a fork copies only its own."""
    code = (
        "import json, random, sys\n"
        "from tests import test_collect as t\n"
        "from proxykd_jax.config import load_collect\n"
        "t.collector.FIRST_WAIT_S = 0.01\n"
        "config = load_collect(sys.argv[1])\n"
        "random.seed(0)\n"
        "waits_s = [random.uniform(0, float(sys.argv[3])) for _ in range(int(sys.argv[2]))]\n"
        "print('killed', t._killed_runs(config, waits_s))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config_file), str(count), str(longest_s)],
        capture_output=True, text=True, check=True, cwd=REPOSITORY,
    )  # fmt: skip
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_no_kill_pays_or_loses_a_request(make, tmp_path, kills):
    """A server that honours the header bills each request once, whenever the client is killed."""
    prompts = [f"q{i}" for i in range(15 * kills)]

    def answer(body: Body, count: int) -> Reply:
        number = int(prompt_of(body)[1:])
        if count == 0 and number % 7 == 0:
            return [_error(503), _error(429), Reply(["reset"])][number % 3]
        return chat(f"re: {prompt_of(body)}")

    with CollectServer(answer, work_s=0.02) as server:
        config = make(prompts, server.url, concurrency=8)
        killed = _kill(tmp_path / "collect.yaml", kills, 0.1)
        in_flight = sum(server.billed.values())
        result = collect.main(config)
        assert set(server.billed.values()) == {1} and set(server.billed) == set(prompts)
        sent = len(server.requests)
    assert killed > 0.9 * kills and in_flight < len(prompts)
    answers = rows(config.folder, "answers")
    assert sorted(map(asked, answers)) == sorted(prompts)
    assert not rows(config.folder, "failed") and not rows(config.folder, "set_aside")
    assert result.requests >= sent  # what was about to be sent counts, too
    doubts = (Path(config.folder) / "in_doubt.log").read_text().splitlines()
    assert doubts and all(json.loads(line)["id"] for line in doubts)


def test_requests_in_doubt_may_be_held(make, tmp_path, capfd):
    with CollectServer(work_s=0.05) as server:
        config = make([f"q{i}" for i in range(60)], server.url, concurrency=4, in_doubt="hold")
        assert _kill(tmp_path / "collect.yaml", 1, 0.5)
        held = collect.main(config).seen["held"]
        assert held and f"{held} requests were under way" in capfd.readouterr().err
        assert len(rows(config.folder, "answers")) == 60 - held
        collect.main(make([f"q{i}" for i in range(60)], server.url))
    assert len(rows(config.folder, "answers")) == 60


@pytest.mark.parametrize("signal_number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_waits_for_what_is_under_way(make, tmp_path, signal_number, code):
    with CollectServer(work_s=0.1) as server:
        config = make([f"q{i}" for i in range(2000)], server.url, concurrency=4)
        command = [sys.executable, "-m", "proxykd_jax.collect", "--config"]
        run = subprocess.Popen(
            [*command, str(tmp_path / "collect.yaml")], stderr=subprocess.PIPE, cwd=REPOSITORY
        )
        while len(server.requests) < 5:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal_number)
        said = run.communicate()[1].decode()
        assert run.returncode == code and "the same command continues" in said
        answers = rows(config.folder, "answers")
        assert len(answers) == len(server.requests) and "Traceback" not in said
    ledger = collect.open_ledger(config)
    assert not ledger.in_doubt and ledger.requests == len(answers)
    ledger.close()


@pytest.mark.slow
def test_a_server_is_as_busy_as_with_a_plain_load_generator(tmp_path):
    from benchmarks.collect_load import ratios

    assert max(ratios(tmp_path, requests=2000, seconds=0.2, at_once=64, turns=3)) > 0.9


@pytest.mark.slow
def test_memory_does_not_grow_with_the_prompts(tmp_path):
    """As a program of its own: what a run of many takes more than one of few."""

    def peak_kib(requests: int) -> int:
        folder = str(tmp_path / str(requests))
        code = (
            "import sys, resource\n"
            "from pathlib import Path\n"
            "from benchmarks import collect_load as load\n"
            "if __name__ == '__main__':\n"
            f"    load.print_memory(Path({folder!r}), {requests}, 0.0, 64)\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        return int(done.stdout.split()[-1])

    assert peak_kib(40_000) < peak_kib(2_000) + 8 * 1024
