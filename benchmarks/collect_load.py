"""How busy ``collect`` keeps a server, and how much memory it takes.

    python -m benchmarks.collect_load --out runs/load --requests 2000 --seconds 0.1
    python -m benchmarks.collect_load --out runs/load --requests 1000000 --seconds 0 --memory

A server on loopback, in a process of its own, answers each request after a fixed time. A plain load
generator (a thread per connection, kept connections, nothing written) sends the same requests as
``collect`` does, with the same number at once. The result is the ratio of their times. With
``--memory`` only ``collect`` runs, and its resident memory is printed as the answers grow; then it
runs again with everything answered, and again with its index removed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import multiprocessing
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proxykd_jax import collect
from proxykd_jax.collecting.collector import Collector
from proxykd_jax.collecting.ledger import INDEX
from proxykd_jax.config import CollectConfig, load_collect

_ANSWER = {
    "id": "x",
    "model": "teacher",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "An answer of some length. " * 20},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 20, "completion_tokens": 100},
}
_MARKS = (1000, 10_000, 100_000, 250_000, 500_000, 750_000, 1_000_000)


def serve(seconds: float, port: Any) -> None:
    """Answers every request after a time; puts its port into ``port``."""
    body = json.dumps(_ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    reply = head.encode() + b"\r\n" + body

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(asked.split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(seconds)
                writer.write(reply)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(run())


def prompt(number: int) -> str:
    """The prompt of a request."""
    return f"Question {number} of a list of questions, and what belongs to it. "


def plain_s(port: int, requests: int, at_once: int) -> float:
    """Seconds of a load generator that only sends and reads."""
    numbers, lock = iter(range(requests)), threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            messages = [{"role": "user", "content": prompt(number)}]
            body = json.dumps({"model": "teacher", "messages": messages})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            connection.getresponse().read()

    begun = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - begun


def collect_s(config: CollectConfig) -> float:
    """Seconds of ``collect``, from reading the first prompt to the last fsync."""
    begun = time.monotonic()
    collect.main(config)
    return time.monotonic() - begun


def make_config(folder: Path, port: int, requests: int, at_once: int, name: str) -> CollectConfig:
    """A config whose prompts are written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.jsonl", "w") as file:
        for number in range(requests):
            file.write(json.dumps({"prompt": prompt(number)}) + "\n")
    section = {
        "prompts": [{"path": str(folder / "prompts.jsonl")}],
        "folder": str(folder / name),
        "url": f"http://127.0.0.1:{port}",
        "model": "teacher",
        "concurrency": at_once,
    }
    (folder / "collect.yaml").write_text(json.dumps({"collect": section}))
    return load_collect(folder / "collect.yaml")


def ratios(folder: Path, requests: int, seconds: float, at_once: int, turns: int) -> list[float]:
    """Time of the plain generator over that of ``collect``, for several turns.

    Args:
      folder: for prompts and answers; must be new.
      requests: in each turn.
      seconds: that the server takes.
      at_once: requests in flight.
      turns: each has both, one after the other.
    """

    def measure(port: int) -> list[float]:
        found = []
        for turn in range(turns):
            config = make_config(folder, port, requests, at_once, f"turn_{turn}")
            plain, ours = plain_s(port, requests, at_once), collect_s(config)
            found.append(plain / ours)
            print(f"plain {plain:.2f} s, collect {ours:.2f} s, ratio {plain / ours:.3f}")
        return found

    return _with_server(seconds, measure)


def print_memory(folder: Path, requests: int, seconds: float, at_once: int) -> None:
    """Prints resident memory as answers grow, and of runs that find everything answered."""
    keep, marks, begun = Collector._keep, iter(_MARKS), time.monotonic()
    mark = next(marks)

    def watched(self: Collector) -> None:
        nonlocal mark
        keep(self)
        while sum(self.seen.values()) >= mark:
            print(f"{mark:,}: {_resident_mib()} MiB, {time.monotonic() - begun:.0f} s", flush=True)
            mark = next(marks, sys.maxsize)

    def measure(port: int) -> None:
        config = make_config(folder, port, requests, at_once, "out")
        print(f"before: {_resident_mib()} MiB", flush=True)
        Collector._keep = watched  # type: ignore[method-assign]
        print(f"collected in {collect_s(config):.0f} s, {_resident_mib()} MiB", flush=True)
        Collector._keep = keep  # type: ignore[method-assign]
        print(f"again in {collect_s(config):.1f} s, {_resident_mib()} MiB", flush=True)
        index = Path(config.folder) / INDEX
        print(f"index: {index.stat().st_size / requests:.0f} bytes for each request")
        index.unlink()
        print(f"index made again in {collect_s(config):.1f} s, {_resident_mib()} MiB", flush=True)

    _with_server(seconds, measure)


def _with_server(seconds: float, measure: Callable[[int], Any]) -> Any:
    context = multiprocessing.get_context("spawn")
    port = context.SimpleQueue()
    server = context.Process(target=serve, args=(seconds, port), daemon=True)
    server.start()
    try:
        return measure(port.get())
    finally:
        server.kill()
        server.join()


def _resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) >> 8


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collect_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for what is collected")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.1, help="that the server takes")
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    given = parser.parse_args(argv)
    folder = next(path for n in itertools.count(1) if not (path := given.out / str(n)).exists())
    if given.memory:
        print_memory(folder, given.requests, given.seconds, given.at_once)
    else:
        ratios(folder, given.requests, given.seconds, given.at_once, given.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
