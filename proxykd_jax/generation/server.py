"""Client of an OpenAI-compatible server: bounded retries, loading of weights, completions.

It covers vLLM, SGLang and ``transformers serve``; ``docs/sampling_server.md`` links the pages that
describe their calls.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from proxykd_jax.config.schema import SamplingServer
from proxykd_jax.errors import UserError

# Status codes of a server that is busy or starting. Other refusals would only repeat.
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_MOST_SHOWN = 200
_T = TypeVar("_T")


@dataclass(frozen=True)
class Completion:
    """A server's reply to one prompt.

    Attributes:
      text: the answer, without the token that ended it.
      finished: an end token was drawn; otherwise the budget ran out.
      tokens: ids of the answer if the server reports them, perhaps with the end token.
      end_token: id that ended it, if the server reports it.
      prompt_length: tokens that the server counted in the prompt, if it reports that.
    """

    text: str
    finished: bool
    tokens: list[int] | None
    end_token: int | None
    prompt_length: int | None


def read_key(variable: str | None, where: str) -> str:
    """A server's key from the environment; "" if no variable is named.

    Args:
      variable: name of the environment variable.
      where: the config's section, for messages.

    Raises:
      UserError: the variable is not set, or its value cannot be sent in a header. The message does
        not contain the value.
    """
    key = os.environ.get(variable or "", "").strip()
    if variable and not key:
        raise UserError(
            f"{where}.api_key_env: the environment variable {variable} is not set; export the "
            "server's key in it."
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{where}.api_key_env: the environment variable {variable} holds characters that no "
            "key has; export the server's key in it, alone."
        )
    return key


def clean_text(text: str, key: str) -> str:
    """One short line without the key, which some servers repeat, and without control characters."""
    if key:
        text = text.replace(key, "***")
    text = " ".join(text.split()).rstrip(".")
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * _MOST_SHOWN])
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


class UnansweredError(UserError):
    """The server could not be reached, or kept failing in a way that may be temporary."""


class StoppedError(Exception):
    """Another request failed permanently, so this one is abandoned."""


class Connection:
    """A server's address, with limits on retries and waiting. Safe to use from many threads.

    Args:
      url: without /v1.
      retries: how often a request is repeated after a failure that may be temporary.
      timeout_s: seconds to wait for one reply.
      api_key_env: environment variable that holds the key, if there is one.
      where: the config key that names the server, for messages.

    Raises:
      UserError: the environment variable of the key is not set.
    """

    def __init__(
        self, url: str, *, retries: int, timeout_s: float, api_key_env: str | None, where: str
    ) -> None:
        self.url = url.rstrip("/")
        self._retries, self._timeout_s, self._where = retries, timeout_s, where
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._stopped = threading.Event()
        self._key = read_key(api_key_env, where)

    def stop(self) -> None:
        """Makes requests in other threads end at their next failure instead of retrying."""
        self._stopped.set()

    def chat(self, body: dict[str, Any]) -> Completion:
        """One reply to a conversation.

        Raises:
          UserError, StoppedError: see ``send``.
        """
        reply: Completion = self.send("POST", "/v1/chat/completions", body, read=_read_chat)
        return reply

    def send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        read: Callable[[bytes], _T] | None = None,
        retries: int | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Sends one request, and repeats it while its failure may be temporary.

        Args:
          method, path, body: the request; the body goes out as JSON.
          read: converts the reply's bytes to the result; ValueError counts as a failure.
          retries, timeout_s: override the connection's own.

        Raises:
          UserError: the server refuses, or gives no usable reply (UnansweredError).
          StoppedError: ``stop`` was called.
        """
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        tries = 1 + (self._retries if retries is None else retries)
        trouble, wait_s = "", 0.0
        for attempt in range(tries):
            if attempt and self._stopped.wait(wait_s):
                raise StoppedError
            wait_s = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            try:
                with self._opener.open(request, timeout=timeout_s or self._timeout_s) as reply:
                    content = reply.read()
                return read(content) if read else content
            except urllib.error.HTTPError as error:
                trouble = f"status {error.code}, {self._said(error)}"
                if error.code not in _MAY_PASS:
                    raise UserError(
                        f"{self._where}: {self.url} refused {method} {path}: {trouble}."
                    ) from None
                with contextlib.suppress(ValueError):  # absent, or a date
                    asked_s = float(error.headers.get("Retry-After", ""))
                    wait_s = min(max(wait_s, asked_s), _LONGEST_WAIT_S)
            except TimeoutError:
                trouble = f"no reply within {timeout_s or self._timeout_s:g} s"
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = getattr(error, "reason", None) or error
                trouble = self._clean(str(reason) or type(reason).__name__)
        times = "once" if tries == 1 else f"{tries} times"
        raise UnansweredError(
            f"{self._where}: {self.url} was asked {times} and gave no usable answer to "
            f"{method} {path} ({trouble}); check that the server is running there, then run the "
            "same command again to continue."
        )

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            return self._clean(error.read().decode("utf-8", "replace")) or "without a word"
        except (OSError, http.client.HTTPException):
            return "without a word"

    def _clean(self, text: str) -> str:
        return clean_text(text, self._key)


class ServerClient:
    """One server, for one run. Safe to use from many threads.

    Args:
      server: its address and options.
      base: name of the base model on it, if that is fixed (vllm, sglang).

    Raises:
      UserError: the environment variable of the key is not set.
    """

    def __init__(self, server: SamplingServer, base: str) -> None:
        self.server = server
        self.base = server.model or base
        self._connection = Connection(
            server.url,
            retries=server.retries,
            timeout_s=server.timeout_s,
            api_key_env=server.api_key_env,
            where="align.sampling.server",
        )
        self._url, self._send = self._connection.url, self._connection.send

    def check(self, *, retries: int | None = None, timeout_s: float | None = None) -> None:
        """Checks that the server answers and, if its base model is fixed, that it is ours.

        Raises:
          UserError: it does not answer (UnansweredError), or its base model is another one.
        """
        patience: dict[str, Any] = {"retries": retries, "timeout_s": timeout_s}
        if self.server.api == "transformers":
            # It loads any model that a request names; /v1/models lists a cache, or fails.
            self._send("GET", "/health", **patience)
            return
        listed = self._send("GET", "/v1/models", read=_read_models, **patience)
        if self.base not in listed:
            shown = ", ".join(listed) or "no model"
            raise UserError(
                f"align.sampling.server: {self._url} serves {shown}, not {self.base}; start it "
                "with the proxy's base model, or give the name that it goes by there in "
                "align.sampling.server.model."
            )

    def load(self, name: str, folder: Path) -> None:
        """Makes the server use the weights in ``folder``, a path that must be valid there, too.

        Raises:
          UserError: it refuses, or does not answer.
        """
        place = str(folder.resolve())
        if self.server.serves == "adapter":
            self._send("POST", self._lora_path("load"), {"lora_name": name, "lora_path": place})
        elif self.server.api == "sglang":
            self._send("POST", "/update_weights_from_disk", {"model_path": place})
        # transformers serve loads the folder that a request names, so there is nothing to do.

    def unload(self, name: str) -> None:
        """Frees what ``load`` took; a server that refuses keeps the weights, which is harmless."""
        with contextlib.suppress(UserError, StoppedError):
            if self.server.serves == "adapter":
                self._send("POST", self._lora_path("unload"), {"lora_name": name}, retries=0)
            elif self.server.api == "transformers":
                self._send("POST", "/reset", {}, retries=0)

    def complete(self, body: dict[str, Any]) -> Completion:
        """One completion.

        Raises:
          UserError: the server refuses, gives no usable reply, or answers with another model.
          StoppedError: ``stop`` was called.
        """
        reply, named = self._send("POST", "/v1/completions", body, read=_read_completion)
        if named is not None and not named.startswith(body["model"]):
            raise UserError(
                f"align.sampling.server: {self._url} answered with the model {named}, not "
                f"{body['model']}; it serves something else."
            )
        return reply

    def stop(self) -> None:
        """See ``Connection.stop``."""
        self._connection.stop()

    def _lora_path(self, action: str) -> str:
        prefix = "/v1" if self.server.api == "vllm" else ""
        return f"{prefix}/{action}_lora_adapter"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another address."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _read_models(content: bytes) -> list[str]:
    """Names in the reply of ``/v1/models``; ValueError if there are none."""
    try:
        return [str(card["id"]) for card in json.loads(content)["data"]]
    except (KeyError, TypeError) as error:
        raise ValueError("its list of models is not a list") from error


def _read_chat(content: bytes) -> Completion:
    """The one choice in a reply of ``/v1/chat/completions``; ValueError if there is none."""
    try:
        (choice,) = json.loads(content)["choices"]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("its reply is not a chat completion with one choice") from error
    if text is not None and not isinstance(text, str):
        raise ValueError("its reply has no text")
    return Completion(text or "", reason == "stop", None, None, None)


def _read_completion(content: bytes) -> tuple[Completion, str | None]:
    """The one choice in a reply, and the model that it names; ValueError if there is none."""
    try:
        value = json.loads(content)
        (choice,) = value["choices"]
        text, reason = choice["text"], choice["finish_reason"]
        usage = value.get("usage") or {}
        tokens = choice.get("token_ids")
        ends = (choice.get("matched_stop"), choice.get("stop_reason"))
        prompt_length = usage.get("prompt_tokens")
        named = value.get("model")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("its reply is not a completion with one choice") from error
    if not isinstance(text, str):
        raise ValueError("its reply has no text")
    if reason not in ("stop", "length"):
        raise ValueError(f"its reply ended for the reason {reason!r}")
    if tokens is not None and not (
        isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
    ):
        raise ValueError("its reply has token_ids that are not ids")
    completion = Completion(
        text,
        reason == "stop",
        tokens,
        next((end for end in ends if isinstance(end, int)), None),
        prompt_length if isinstance(prompt_length, int) else None,
    )
    return completion, named if isinstance(named, str) else None
