"""One HTTP exchange with a server, over a connection that is kept, within a deadline."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import select
import socket
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from proxykd_jax.texts.json_files import MAX_RECORD_BYTES

MOST_REPLY_BYTES = MAX_RECORD_BYTES


@dataclass(frozen=True)
class Reply:
    """A complete reply: status, headers with lower-case names, content."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class ExchangeError(Exception):
    """No complete reply came.

    Attributes:
      sent: the request may have reached the server, so it may have been paid.
    """

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Line:
    """A connection to one server, for one thread. It is opened when needed and kept between uses.

    ``http_proxy``, ``https_proxy`` and ``no_proxy`` are respected. Redirects are replies like any
    other, because following one would send the key to another address.

    Args:
      url: where requests are posted to.
      timeout_s: seconds for one exchange, from connecting to the last byte.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        self._scheme, self._host = parts.scheme, parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path, self._timeout_s = parts.path, timeout_s
        self._proxy = _proxy_for(parts.scheme, parts.netloc)
        if self._proxy and parts.scheme == "http":
            self._path = url
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._expired = False

    def post(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Posts a body.

        Raises:
          ExchangeError: no complete reply came in time.
        """
        self._expired, sent = False, False
        self._deadline = time.monotonic() + self._timeout_s
        try:
            connection = self._connected()
            sent = True
            connection.request("POST", self._path, body, {**headers, **self._proxy_headers()})
            with connection.getresponse() as response:
                content = response.read(MOST_REPLY_BYTES + 1)
                if len(content) > MOST_REPLY_BYTES:
                    raise http.client.HTTPException(
                        f"its reply is longer than {MOST_REPLY_BYTES >> 20} MiB"
                    )
                if response.length:
                    raise http.client.HTTPException("its reply was cut off")
                found = {name.lower(): value for name, value in response.getheaders()}
                if response.will_close:
                    self.close()
            with self._lock:
                if self._expired:
                    raise TimeoutError
                self._deadline = None
            return Reply(response.status, found, _unpacked(content, found))
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            AttributeError,
            zlib.error,
        ) as error:
            # A socket that ``expire`` shuts down fails in one of several ways.
            self.close()
            if self._expired or isinstance(error, TimeoutError):
                reason = f"no whole reply within {self._timeout_s:g} s"
            elif isinstance(error, http.client.IncompleteRead):
                reason = "its reply was cut off"
            else:
                reason = str(error) or type(error).__name__
            raise ExchangeError(reason, sent=sent) from None
        finally:
            with self._lock:
                self._deadline = None

    def expire(self, now: float) -> None:
        """Ends an exchange whose deadline has passed. Called from another thread, now and then.

        Timeouts of a socket hold for each read, so a server that sends a byte now and then would
        never meet one.
        """
        with self._lock:
            connection = self._connection
            late = self._deadline is not None and now > self._deadline
            if late and connection is not None and connection.sock is not None:
                self._expired = True
                with contextlib.suppress(OSError):
                    # Of the plain socket: TLS would drop its state, which is being read.
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the connection; the next exchange opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> http.client.HTTPConnection:
        kept = self._connection
        if kept is not None and kept.sock is not None:
            if not select.select([kept.sock], [], [], 0)[0]:
                return kept
            self.close()  # the server has closed it, or sent what nobody asked for
        kind = (
            http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        )
        if self._proxy is None:
            connection = kind(self._host, self._port, timeout=self._timeout_s)
        else:
            place = self._proxy
            connection = kind(place.hostname or "", place.port or 80, timeout=self._timeout_s)
            if self._scheme == "https":
                connection.set_tunnel(self._host, self._port, _proxy_authorization(place))
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        return connection

    def _proxy_headers(self) -> dict[str, str]:
        if self._proxy is None or self._scheme == "https":
            return {}
        return _proxy_authorization(self._proxy)


def _proxy_for(scheme: str, netloc: str) -> urllib.parse.SplitResult | None:
    address = urllib.request.getproxies().get(scheme)
    if not address or urllib.request.proxy_bypass(netloc):
        return None
    return urllib.parse.urlsplit(address if "://" in address else f"http://{address}")


def _proxy_authorization(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user, word = (urllib.parse.unquote(part or "") for part in (proxy.username, proxy.password))
    return {"Proxy-Authorization": "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()}


def _unpacked(content: bytes, headers: Mapping[str, str]) -> bytes:
    """The content without gzip, which a server may use although it was not offered."""
    if headers.get("content-encoding", "").lower() != "gzip":
        return content
    packed = zlib.decompressobj(16 + zlib.MAX_WBITS)
    plain = packed.decompress(content, MOST_REPLY_BYTES)
    if not packed.eof:
        raise gzip.BadGzipFile("its compressed reply was cut off, or is too long")
    return plain
