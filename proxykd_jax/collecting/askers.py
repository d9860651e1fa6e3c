"""Threads that talk to the server, each over a connection of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass, field

from proxykd_jax.collecting.exchange import Line
from proxykd_jax.collecting.ledger import Entry
from proxykd_jax.collecting.replies import Verdict, compiled, judge
from proxykd_jax.collecting.requests import Request
from proxykd_jax.config.schema import CollectConfig


@dataclass(slots=True)
class Task:
    """A request that is wanted in this run."""

    request: Request
    entry: Entry
    body: bytes
    tokens: int
    most_cost: float
    tries: int = 0
    busy: int = 0
    reasons: list[str] = field(default_factory=list)


class Askers:
    """As many threads as requests may be in flight; a context, within which they run.

    Args:
      config: the section ``collect``.
      secret: the server's key, or "".
    """

    def __init__(self, config: CollectConfig, secret: str) -> None:
        self._refusals = compiled(config.refusals)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "proxykd_jax",
        }
        if secret:
            self._headers["Authorization"] = f"Bearer {secret}"
        url = endpoint_of(config.url)
        self._lines = [Line(url, config.timeout_s) for _ in range(config.concurrency)]
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Task, Verdict | BaseException]] = queue.SimpleQueue()

    def __enter__(self) -> Askers:
        for line in self._lines:
            threading.Thread(target=self._work, args=(line,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for _line in self._lines:
            self._queue.put(None)

    def send(self, task: Task) -> None:
        """Sends a request as soon as a thread is free."""
        self._queue.put(task)

    def recall(self) -> list[Task]:
        """Takes back the requests that no thread has begun."""
        found = []
        with contextlib.suppress(queue.Empty):
            while (task := self._queue.get_nowait()) is not None:
                found.append(task)
        return found

    def replies(self, wait_s: float) -> list[tuple[Task, Verdict | BaseException]]:
        """What has come, or what comes first within a time. Ends exchanges that are too late.

        A failure of an exchange is an ``ExchangeError``.
        """
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._done.get(timeout=wait_s))
            while True:
                found.append(self._done.get_nowait())
        now = time.monotonic()
        for line in self._lines:
            line.expire(now)
        return found

    def _work(self, line: Line) -> None:
        while (task := self._queue.get()) is not None:
            verdict: Verdict | BaseException
            try:
                verdict = self._ask(line, task)
            except BaseException as error:
                verdict = error
            self._done.put((task, verdict))
        line.close()

    def _ask(self, line: Line, task: Task) -> Verdict:
        # An API that knows the header answers a repeated request from what it kept, unpaid.
        key = f"{task.request.key}-{task.entry.turn}"
        return judge(
            line.post(task.body, {**self._headers, "Idempotency-Key": key}), self._refusals
        )


def endpoint_of(url: str) -> str:
    """Where chats are posted to; an address without a path gets /v1."""
    url = url.rstrip("/")
    return f"{url}{'' if url.count('/') > 2 else '/v1'}/chat/completions"
