"""A real HTTP server on loopback that speaks the protocol of vLLM, SGLang or transformers serve.

A function of the test makes the answers, and a script of the test makes the failures.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Reply:
    """A reply of the server; with a ``status`` of 0 it cuts the connection instead.

    Attributes:
      content: JSON, or raw bytes.
      after_s: seconds before the reply is sent.
    """

    status: int = 200
    content: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


def completion(
    text: str, reason: str = "stop", *, model: str | None = None, prompt_tokens: int | None = None,
    **choice: Any,
) -> Reply:  # fmt: skip
    """The JSON of a complete reply of ``/v1/completions``."""
    content: Body = {
        "object": "text_completion",
        "choices": [{"index": 0, "text": text, "finish_reason": reason, **choice}],
    }
    if model is not None:
        content["model"] = model
    if prompt_tokens is not None:
        content["usage"] = {"prompt_tokens": prompt_tokens}
    return Reply(200, content)


class FakeServer:
    """``with FakeServer(answer) as server: ... server.url``.

    Args:
      answer: ``body -> Reply``, for each request for a completion.
      models: names that ``/v1/models`` lists.
      other: ``(path, body) -> Reply``, for every other POST.

    Attributes:
      requests: (path, body, headers) of each request, in the order of arrival.
      script: replies that are sent first, one per request for a completion.
    """

    def __init__(
        self,
        answer: Callable[[Body], Reply],
        *,
        models: tuple[str, ...] = ("base",),
        other: Callable[[str, Body], Reply] = lambda path, body: Reply(),
    ) -> None:
        self.requests: list[tuple[str, Body, dict[str, str]]] = []
        self.script: list[Reply] = []
        self._answer, self._other, self._models = answer, other, models
        self._lock, self._closing = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer._reply(self, {})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer._reply(self, json.loads(self.rfile.read(length)))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def bodies(self, path: str = "/v1/completions") -> list[Body]:
        """The bodies of the requests for a path."""
        return [body for asked, body, _ in self.requests if asked == path]

    def _reply(self, handler: BaseHTTPRequestHandler, body: Body) -> None:
        path = handler.path
        with self._lock:
            self.requests.append((path, body, dict(handler.headers)))
            scripted = path == "/v1/completions" and self.script
            reply = self.script.pop(0) if scripted else None
        if reply is None and path == "/v1/models":
            reply = Reply(200, {"data": [{"id": name} for name in self._models]})
        elif reply is None:
            reply = self._answer(body) if path == "/v1/completions" else self._other(path, body)
        self._closing.wait(reply.after_s)
        if reply.status == 0:
            handler.close_connection = True
            handler.connection.close()
            return
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content)
        data = content if isinstance(content, bytes) else content.encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
