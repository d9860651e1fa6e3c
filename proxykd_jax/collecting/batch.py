"""Batch files: requests written for a batch service, and its results read back.

Two forms are known: OpenAI's, one request per line, and Anthropic's, one JSON object that is the
body of ``POST /v1/messages/batches``. Nothing is sent: uploading a file and fetching its results is
left to the service's own tools. Requests in a batch file are not sent by ``collect`` as well.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from proxykd_jax.artifacts import sync_folder
from proxykd_jax.collecting.exchange import Reply
from proxykd_jax.collecting.ledger import (
    ANSWERED,
    BATCHED,
    FAILED,
    GAVE_UP,
    PENDING,
    SET_ASIDE,
    Entry,
    Ledger,
)
from proxykd_jax.collecting.limits import Budget
from proxykd_jax.collecting.replies import (
    Again,
    Answer,
    Refused,
    Verdict,
    answer_of,
    compiled,
    judge,
    usage_of,
)
from proxykd_jax.collecting.requests import Request, body_of, most_answer_tokens
from proxykd_jax.collecting.rows import answer_row, failed_row, unwanted
from proxykd_jax.config.price_file import Price
from proxykd_jax.config.schema import CollectConfig
from proxykd_jax.errors import UserError
from proxykd_jax.generation.server import clean_text
from proxykd_jax.texts.json_files import read_json_records

Form = Literal["openai", "anthropic"]
# (requests, bytes) of a file, as the services document them.
MOST = {"openai": (50_000, 200_000_000), "anthropic": (100_000, 256_000_000)}
_KEY = re.compile(r"[0-9a-f]{32}")
_ROWS_A_SYNC = 1000


def write_batch(
    config: CollectConfig,
    requests: Iterator[Request],
    ledger: Ledger,
    path: Path,
    form: Form,
    budget: Budget,
    price: Price | None = None,
) -> tuple[list[Path], int, str | None]:
    """Writes every request that is wanted, in as many files as the service's limits need.

    The files get their names after the ledger knows of them: a kill in between leaves files named
    ``.NAME.tmp`` and no request that could be paid twice.

    Args:
      config: the section ``collect``.
      requests: ``read_requests``.
      ledger: the folder.
      path: the first file; the others have -2, -3 and so on before the ending.
      form: whose form.
      budget: the hard stops; each request is counted with the most that it may cost.
      price: prices of the model.

    Returns:
      The files, the number of requests in them, and the limit that ended the writing, if one did.

    Raises:
      UserError: a file exists, or the form cannot say what the config asks.
    """
    _check(config, form)
    most_tokens = most_answer_tokens(config.parameters) or 0
    files: list[Path] = []
    count, stopped, writer = 0, None, None
    try:
        for request in requests:
            entry = ledger.lookup(request.key)
            if unwanted(entry, config) is not None:
                continue
            cost = 0.0
            if price is not None:
                cost = price.cost(request.most_prompt_tokens, most_tokens, batch=True)
            stopped = budget.stop(cost)
            if stopped is not None:
                break
            line = _line(config, request, form)
            if writer is None or not writer.takes(line):
                if writer is not None:
                    writer.close()
                place = path if not files else path.with_stem(f"{path.stem}-{len(files) + 1}")
                if place.exists():
                    raise UserError(f"{place} exists; read its results first, or choose a name.")
                files.append(place)
                writer = _Writer(_temporary(place), form)
            writer.write(line)
            budget.hold(cost)
            budget.settle(cost, cost)
            entry = entry or Entry()
            ledger.put(
                request.key,
                entry._replace(
                    state=BATCHED, attempts=entry.attempts + 1, held=cost, run=ledger.run
                ),
            )
            count += 1
    finally:
        if writer is not None:
            writer.close()
    ledger.requests, ledger.spent = budget.requests, budget.spent
    ledger.sync()
    for place in files:
        os.replace(_temporary(place), place)
        sync_folder(place.parent)
    return files, count, stopped


def read_batch(
    config: CollectConfig,
    requests: Iterator[Request],
    ledger: Ledger,
    paths: Sequence[Path],
    price: Price | None = None,
    secret: str = "",
) -> Counter[str]:
    """Takes the results of a batch service.

    Answers go where those of ``collect`` go. What expired, was cancelled or failed in a way that
    may pass is free to be sent again. Results that were read before are left.

    Args:
      config: the section ``collect``.
      requests: ``read_requests``; they give the messages of the results.
      ledger: the folder.
      paths: result files, and error files, of either form.
      price: prices of the model.
      secret: the server's key, or "".

    Returns:
      Results by what became of them.

    Raises:
      UserError: a file is damaged or of another form.
    """
    found = sqlite3.connect("", isolation_level=None)  # a file that vanishes with its connection
    found.execute("pragma journal_mode = off")
    found.execute("create table result (key text primary key, line text) without rowid")
    found.execute("begin")
    seen: Counter[str] = Counter()
    for path in paths:
        for record, origin in read_json_records(path):
            key = record.get("custom_id")
            if not isinstance(key, str) or not record.keys() & {"result", "response", "error"}:
                raise UserError(f"{origin} is no result of a batch: it has the keys {[*record]}.")
            if not _KEY.fullmatch(key):
                seen["of other requests"] += 1
            else:
                found.execute(
                    "insert or ignore into result values (?, ?)", (key, json.dumps(record))
                )
    refusals = compiled(config.refusals)
    for number, request in enumerate(requests):
        line = found.execute("select line from result where key = ?", (request.key,)).fetchone()
        if line is None:
            continue
        found.execute("delete from result where key = ?", (request.key,))
        entry = ledger.lookup(request.key) or Entry()
        if entry.state in (ANSWERED, SET_ASIDE):
            seen["known"] += 1
            continue
        verdict = _verdict(json.loads(line[0]), refusals)
        seen[_take(config, request, entry, verdict, ledger, price, secret)] += 1
        if number % _ROWS_A_SYNC == 0:
            ledger.sync()
    (left,) = found.execute("select count(*) from result").fetchone()
    if left:
        seen["of other requests"] += left
    ledger.sync()
    found.close()
    return seen


def forget_batch(ledger: Ledger, path: Path) -> int:
    """Frees the requests of a batch file that is not going to be submitted; returns their number.

    Raises:
      UserError: the file is damaged or no batch file.
    """
    count = 0
    for record, origin in read_json_records(path):
        for asked in record.get("requests", [record]):
            key = asked.get("custom_id") if isinstance(asked, dict) else None
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise UserError(f"{origin} is no line of a batch file of this program.")
            entry = ledger.lookup(key)
            if entry is not None and entry.state == BATCHED:
                ledger.spent -= entry.held
                ledger.put(key, entry._replace(state=PENDING, held=0.0))
                count += 1
    ledger.sync()
    return count


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """One file, within the limits of its form."""

    def __init__(self, path: Path, form: Form) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 (closed by ``close``)
        self._form, self._count, self._bytes = form, 0, 100
        self._most_count, self._most_bytes = MOST[form]
        if form == "anthropic":
            self._file.write(b'{"requests": [')

    def takes(self, line: bytes) -> bool:
        return self._count < self._most_count and (self._bytes + len(line) + 2 <= self._most_bytes)

    def write(self, line: bytes) -> None:
        between = b"," if self._form == "anthropic" and self._count else b""
        start, end = (between + b"\n", b"") if self._form == "anthropic" else (b"", b"\n")
        self._file.write(start + line + end)
        self._count += 1
        self._bytes += len(line) + 2

    def close(self) -> None:
        if self._file.closed:
            return
        if self._form == "anthropic":
            self._file.write(b"\n]}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _check(config: CollectConfig, form: Form) -> None:
    if form == "openai":
        return
    if most_answer_tokens(config.parameters) is None:
        raise UserError("Anthropic's form needs max_tokens in collect.parameters.")
    if config.top_logprobs is not None or "seed" in config.parameters:
        raise UserError(
            "Anthropic's form has neither seeds nor log-probs: remove collect.top_logprobs and "
            "the seed from collect.parameters."
        )


def _line(config: CollectConfig, request: Request, form: Form) -> bytes:
    body = body_of(config, request)
    if form == "openai":
        whole = {
            "custom_id": request.key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body,
        }
    else:
        messages = body.pop("messages")
        if messages[0]["role"] == "system":
            body["system"] = messages.pop(0)["content"]
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = most_answer_tokens(config.parameters)
        if "stop" in body:
            stop = body.pop("stop")
            body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
        whole = {"custom_id": request.key, "params": {**body, "messages": messages}}
    return json.dumps(whole).encode()


# --- reading --------------------------------------------------------------------------------------


def _verdict(record: Mapping[str, Any], refusals: Sequence[re.Pattern[str]]) -> Verdict:
    result, response = record.get("result"), record.get("response")
    if isinstance(result, dict):
        return _anthropic(result, refusals)
    if isinstance(response, dict) and type(response.get("status_code")) is int:
        content = json.dumps(response.get("body")).encode()
        return judge(Reply(response["status_code"], {}, content), refusals)
    error = record.get("error")
    code = error.get("code") or error.get("message") if isinstance(error, dict) else error
    return Again(f"no reply: {code}", 0)


def _anthropic(result: Mapping[str, Any], refusals: Sequence[re.Pattern[str]]) -> Verdict:
    kind, message = result.get("type"), result.get("message")
    if kind == "succeeded" and isinstance(message, dict):
        blocks = message.get("content")
        texts = [
            block["text"]
            for block in (blocks if isinstance(blocks, list) else [])
            if isinstance(block, dict)
            and block.get("type") == "text"
            and isinstance(block.get("text"), str)
        ]
        reason, model = message.get("stop_reason"), message.get("model")
        return answer_of(
            "".join(texts),
            reason if isinstance(reason, str) else None,
            refusals,
            served_model=model if isinstance(model, str) else None,
            usage=usage_of(message.get("usage"), ("input_tokens", "output_tokens")),
        )
    error = result.get("error")
    inner = error.get("error", error) if isinstance(error, dict) else {}
    said = f"{kind}: {inner.get('message') or inner.get('type') or 'without a word'}"
    if isinstance(inner, dict) and inner.get("type") == "invalid_request_error":
        return Refused(said, 400)
    return Again(said, 0)


def _take(
    config: CollectConfig,
    request: Request,
    entry: Entry,
    verdict: Verdict,
    ledger: Ledger,
    price: Price | None,
    secret: str,
) -> str:
    """Puts a result where it belongs; returns what became of the request, in words."""
    if entry.state == BATCHED:
        ledger.spent -= entry.held
    else:  # written before the index was made again
        ledger.requests += 1
    cost = 0.0
    if isinstance(verdict, Answer):
        usage = verdict.usage
        if price is not None and verdict.paid:
            cost = entry.held
            if usage is not None:
                tokens = usage["prompt_tokens"], usage["completion_tokens"]
                cost = price.cost(*tokens, batch=True)
        kind = "answers" if verdict.outcome == "answered" else "set_aside"
        shown = None if price is None else cost
        ledger.append(
            kind, answer_row(config, request, verdict, attempts=entry.attempts, cost=shown)
        )
        state = ANSWERED if kind == "answers" else SET_ASIDE
        outcome: str = verdict.outcome
    else:
        final = isinstance(verdict, Refused)
        if isinstance(verdict, Again) and verdict.status == 200:
            cost = entry.held
        reason = clean_text(verdict.reason, secret)
        ledger.append(
            "failed",
            failed_row(request, reason, final=final, before=(), attempts=entry.attempts),
        )
        state = FAILED if final else GAVE_UP
        outcome = "refused by the server" if final else "free to be sent again"
    ledger.spent += cost
    ledger.put(request.key, entry._replace(state=state, held=0.0, run=ledger.run))
    return outcome
