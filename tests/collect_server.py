"""A loopback server for tests of ``collect``: it answers, bills, remembers and misbehaves.

A request whose ``Idempotency-Key`` the server has billed gets the same reply again, and is not
billed again. Work goes on when the client has gone, as with a real API.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]
# Bytes are written, numbers are seconds to wait; "close" ends the connection, "reset" breaks it.
Step = bytes | float | str


@dataclass
class Reply:
    """What the server does with one request.

    Attributes:
      steps: in order, each a ``Step``.
      billed: whether the request costs.
    """

    steps: Sequence[Step]
    billed: bool = False


def http(
    status: int, content: Any, *, headers: dict[str, str] | None = None, billed: bool = False,
    after_s: float = 0.0,
) -> Reply:  # fmt: skip
    """A complete reply with JSON, or with raw bytes."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    found = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    head = "".join(f"{name}: {value}\r\n" for name, value in {**found, **(headers or {})}.items())
    return Reply([after_s, f"HTTP/1.1 {status} OK\r\n{head}\r\n".encode() + data], billed)


def chat(
    text: Any, reason: Any = "stop", *, message: Body | None = None, choice: Body | None = None,
    usage: Any = None, after_s: float = 0.0, **more: Any,
) -> Reply:  # fmt: skip
    """A complete answer."""
    content = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "teacher-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **(message or {})},
                "finish_reason": reason,
                **(choice or {}),
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3} if usage is None else usage,
        **more,
    }
    return http(200, content, billed=True, after_s=after_s)


def prompt_of(body: Body) -> str:
    """The last message of a request."""
    text: str = body["messages"][-1]["content"]
    return text


@dataclass
class Work:
    """A reply that is made, once for each idempotency key."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Reply | None = None


class CollectServer:
    """``with CollectServer(answer) as server: ... server.url``.

    Args:
      answer: ``(body, count) -> Reply``; ``count`` is how often this prompt was asked before.
      remembers: honour ``Idempotency-Key``.
      work_s: seconds that every answer takes, also after the client has gone.

    Attributes:
      requests: (body, headers) of each request, in the order of arrival.
      billed: bills by prompt.
      most_at_once: most requests that were open at the same time.
      busy_s: sum over requests of the time that each was open.
    """

    def __init__(
        self,
        answer: Callable[[Body, int], Reply] = lambda body, count: chat(f"re: {prompt_of(body)}"),
        *,
        remembers: bool = True,
        work_s: float = 0.0,
        port: int = 0,
    ) -> None:
        self.requests: list[tuple[Body, dict[str, str]]] = []
        self.billed: Counter[str] = Counter()
        self.most_at_once = self._open = 0
        self._asked: Counter[str] = Counter()
        self._answer, self._remembers, self._work_s = answer, remembers, work_s
        self._work: dict[str, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._port, self._started = port, threading.Event()

    def __enter__(self) -> CollectServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def count(self, prompt: str) -> int:
        """How often a prompt was asked."""
        return sum(prompt_of(body) == prompt for body, _ in self.requests)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._talk, "127.0.0.1", self._port, backlog=512)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["Content-Length"])))
        self.requests.append((body, headers))
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            key = headers.get("Idempotency-Key") if self._remembers else None
            work = self._work.get(key) if key else None
            if work is None:
                work = Work()
                if key:
                    self._work[key] = work
                task = asyncio.create_task(self._do(work, body, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await work.ready.wait()
            assert work.reply is not None
            for step in work.reply.steps:
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                elif isinstance(step, float):
                    if step:
                        await asyncio.sleep(step)
                elif step == "reset":
                    writer.transport.abort()
                    return False
                else:
                    return False
            return True
        finally:
            self._open -= 1

    async def _do(self, work: Work, body: Body, key: str | None) -> None:
        prompt = prompt_of(body)
        if self._work_s:
            await asyncio.sleep(self._work_s)
        work.reply = self._answer(body, self._asked[prompt])
        self._asked[prompt] += 1
        if work.reply.billed:
            self.billed[prompt] += 1
        elif key:
            del self._work[key]
        work.ready.set()
