"""Several processes with one mesh: they start and end together, and arrays span them.

jax's coordination service connects them; it runs in process 0. It notices a silent process within
``_SILENCE_S`` seconds and aborts the others, which ``supervisor`` reports. A process that ends with
an error first announces this under the key ``failed/<index>``, and then the others end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from proxykd_jax import peers
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.launchers import Launch
from proxykd_jax.parallel.sharding import ROWS, row_ways
from proxykd_jax.parallel.supervisor import PEER_LOST, TRY_AGAIN

# A process that is silent for this long counts as lost.
_SILENCE_S = 30
_CONNECT_S = int(os.environ.get("PROXYKD_CONNECT_SECONDS", "300"))
_LEAVE_S = 60
# Processes that fail within this time of one another are taken to have the same error.
_SAME_ERROR_S = 3.0
_LOOK_EVERY_S = 1.0
_WAIT_MS = 2_000
# Words in the messages of gloo, gRPC and NCCL about a lost connection.
_CONNECTION_WORDS = ("gloo", "connection", "socket closed", "unavailable", "deadline", "nccl")
# Larger arrays are gathered slice by slice: each device holds what it gathers.
_GATHERED_AT_ONCE = 1 << 28


def start(launch: Launch) -> None:
    """Connects this process with the others, before anything uses a device.

    If the others do not appear in time, jax aborts and the supervisor reports it.

    Raises:
      UserError: the processes do not fit together, or the port is taken.
    """
    options: dict[str, Any] = {}
    if launch.coordinator is not None:
        options = {
            "coordinator_address": launch.coordinator,
            "num_processes": launch.count,
            "process_id": launch.index,
            "local_device_ids": launch.local_devices,
            "cluster_detection_method": "deactivate",
        }
    # peers.py handles SIGTERM: jax's own agreement misses it when steps take a few milliseconds.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=_CONNECT_S,
            heartbeat_timeout_seconds=_SILENCE_S,
            shutdown_timeout_seconds=_LEAVE_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"process {launch.index} of {launch.count} ({launch.by}) could not meet the others at "
            f"{launch.coordinator}: {_first_line(error)}. The address must be that of process 0, "
            "with a free port."
        ) from error
    if jax.process_count() == 1:
        return
    index = jax.process_index()
    peers.join(index, jax.process_count(), _Channel())
    if index:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)
    _listener.start()


def finish(code: int) -> None:
    """Disconnects together with the others, after all have finished or stopped at the same step.

    Args:
      code: the exit code of this process, which the others can read.
    """
    # A launcher that sees the first process end may send SIGTERM to the others in their last steps.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if peers.count() > 1:
        _over.set()
        _listener.join()  # a thread inside jax would abort the interpreter's exit
        with contextlib.suppress(Exception):
            _Channel().put(f"left/{peers.index()}", str(code))
        jax.distributed.shutdown()
        peers.leave()


def fail(code: int, error: BaseException) -> NoReturn:
    """Ends one process of several because of an error, and tells the others.

    If the error is only a consequence of another process's end, that end is reported instead. The
    process exits without the interpreter's shutdown, which would wait for the others.

    Args:
      code: the exit code of this process.
      error: the error.
    """
    channel, index = _Channel(), peers.index()
    text = str(error) if isinstance(error, UserError) else _first_line(error)
    lost = not isinstance(error, UserError) and _is_lost_connection(error)
    if lost:
        time.sleep(_SAME_ERROR_S)  # the process that failed may be about to say so
        for other, (its_code, its_text) in channel.failures().items():
            _print_sentence(f"process {other} ended: {its_text}")
            _exit(its_code)
        _print_sentence(f"{PEER_LOST} ({text})")
        _exit(TRY_AGAIN)
    channel.put(f"failed/{index}", json.dumps([code, text]))
    if index:
        time.sleep(_SAME_ERROR_S / 2)
        told = channel.failures().get(0)
        if told is None or told[1] != text:
            _print_error(error, f"process {index}: ")
        _exit(code)
    _print_error(error, "")
    # The service ends with process 0, and then jax aborts the others. So process 0 ends last.
    end = time.monotonic() + 2 * _SAME_ERROR_S
    while time.monotonic() < end and len(channel.left()) < peers.count() - 1:
        time.sleep(0.1)
    _exit(code)


def _print_error(error: BaseException, prefix: str) -> None:
    if isinstance(error, UserError | KeyboardInterrupt):
        _print_sentence(f"{prefix}{error}")
    else:
        print(prefix, file=sys.stderr, end="")
        traceback.print_exception(error)


def _print_sentence(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        _Channel().put(f"left/{peers.index()}", str(code))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error).lower()
    return any(word in text for word in _CONNECTION_WORDS)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _watch_others() -> None:
    """Ends this process when another one reports an error.

    On process 0 it also raises SIGTERM when another process was asked to stop.
    """
    channel = _Channel()
    forwarded = False
    while not _over.wait(_LOOK_EVERY_S):
        try:
            failures = channel.failures()
            if peers.is_first() and not forwarded and channel.any_under("term"):
                forwarded = True
                os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            return  # connection lost: jax aborts
        failures.pop(peers.index(), None)
        if failures:
            time.sleep(_SAME_ERROR_S)  # this process may be about to report the same error
            other, (code, text) = next(iter(failures.items()))
            if peers.is_first() or 0 not in failures:
                _print_sentence(f"process {other} ended: {text}")
            _exit(code)


_over = threading.Event()
_listener = threading.Thread(target=_watch_others, daemon=True)


class _Channel:
    """``peers.Channel`` over the key-value store of jax's coordination service."""

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # there is no public name for the client

        self._client: Any = global_state.client

    def put(self, key: str, text: str) -> None:
        self._client.key_value_set(f"proxykd/{key}", text)

    def get(self, key: str, meanwhile: Callable[[], None]) -> str:
        while True:
            meanwhile()
            try:
                text: str = self._client.blocking_key_value_get(f"proxykd/{key}", _WAIT_MS)
                return text
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def any_under(self, key: str) -> bool:
        return bool(self._client.key_value_dir_get(f"proxykd/{key}/"))

    def failures(self) -> dict[int, tuple[int, str]]:
        """Process -> exit code and sentence, for processes that ended with an error."""
        return {
            int(key.rpartition("/")[2]): tuple(json.loads(text))
            for key, text in self._client.key_value_dir_get("proxykd/failed/")
        }

    def left(self) -> list[str]:
        """Processes that have ended or are about to."""
        return [key for key, _ in self._client.key_value_dir_get("proxykd/left/")]


# --- arrays that span processes -------------------------------------------------------------------


def fetch(tree: Any) -> Any:
    """NumPy arrays of a tree of arrays, each whole on every process.

    If arrays span processes, all processes must call it together.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_fetched, tree)


def _fetched(array: Any) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    if array.nbytes <= _GATHERED_AT_ONCE or array.ndim < 2:
        return multihost_utils.process_allgather(array, tiled=True)
    each = max(_GATHERED_AT_ONCE * array.shape[0] // array.nbytes, 1)
    parts = [_fetched(array[i : i + each]) for i in range(0, array.shape[0], each)]
    return np.concatenate(parts)


def own_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process's devices hold part ``index`` of ``count`` of a batch's rows.

    If the mesh gives a process rows that are not contiguous, the result is (0, 1): all rows.
    """
    ways = row_ways(mesh.shape)
    places = NamedSharding(mesh, ROWS).addressable_devices_indices_map((ways,))
    held = sorted({place[0].indices(ways)[0] for place in places.values() if place is not None})
    side_by_side = held == list(range(held[0], held[0] + len(held)))
    if not side_by_side or ways % len(held) or held[0] % len(held):
        return 0, 1
    return held[0] // len(held), ways // len(held)


def put_own_rows(batch: Any, mesh: Mesh, part: tuple[int, int]) -> Any:
    """Places a batch of which this process has only its own rows.

    Args:
      batch: arrays with the rows of part ``index`` of ``count``.
      mesh: the devices.
      part: from ``own_part``.
    """
    index, count = part
    sharding = NamedSharding(mesh, ROWS)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        first = index * len(array)

        def rows(where: Any) -> np.ndarray:
            start, stop, _ = where[0].indices(count * len(array))
            return array[start - first : stop - first]

        shape = (count * len(array), *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows)

    return jax.tree.map(place, batch)
