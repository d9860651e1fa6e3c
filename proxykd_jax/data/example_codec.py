"""Encodes one example of the corpus as a tf.train.Example, without TensorFlow.

The format is protobuf's. An Example is a map from names to lists. Integers are varints of seven
bits per byte, least significant first; the high bit is set on all bytes but the last. Entries are
sorted by name, so that equal rows have equal bytes.
"""

from __future__ import annotations

import numpy as np

# Protobuf tags: field number times 8 plus wire type (2: a length, then that many bytes).
_FIELD_1, _FIELD_2, _FIELD_3 = b"\x0a", b"\x12", b"\x1a"


def encode_example(features: dict[str, np.ndarray | bytes]) -> bytes:
    """A tf.train.Example of int64 lists (from integer[n] arrays, none negative) and bytes."""
    entries = b"".join(
        _FIELD_1 + _sized(_FIELD_1 + _sized(name.encode()) + _FIELD_2 + _sized(_feature(value)))
        for name, value in sorted(features.items())
    )
    return _FIELD_1 + _sized(entries)


def decode_example(data: bytes) -> dict[str, np.ndarray | bytes]:
    """The inverse of ``encode_example``: int64 arrays and bytes by name.

    Raises:
      ValueError: the bytes are not such an example.
    """
    try:
        return _decode(memoryview(data))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError("not an example of this corpus") from error


def _feature(value: np.ndarray | bytes) -> bytes:
    if isinstance(value, bytes):
        return _FIELD_1 + _sized(_FIELD_1 + _sized(value))
    return _FIELD_3 + _sized(_FIELD_1 + _sized(encode_varints(value)))


def _decode(data: memoryview) -> dict[str, np.ndarray | bytes]:
    features: dict[str, np.ndarray | bytes] = {}
    entries = _only(data, _FIELD_1)
    while entries:
        entry, entries = _take(entries, _FIELD_1)
        name, value = _take(entry, _FIELD_1)
        feature = _only(value, _FIELD_2)
        if feature[:1] == _FIELD_1:
            content: np.ndarray | bytes = bytes(_only(_only(feature, _FIELD_1), _FIELD_1))
        else:
            numbers = _only(feature, _FIELD_3)
            content = decode_varints(_only(numbers, _FIELD_1) if numbers else numbers)
        features[bytes(name).decode()] = content
    return features


def encode_varints(values: np.ndarray) -> bytes:
    """Varints of integer[n], none negative."""
    values = np.asarray(values).astype(np.uint64)
    if values.size == 0:
        return b""
    places = 1
    while values.max() >> np.uint64(7 * places):
        places += 1
    shifts = np.arange(places, dtype=np.uint64) * np.uint64(7)
    groups = values[:, None] >> shifts  # [n, places]: the bits from each place on
    present = groups > 0
    present[:, 0] = True
    more = np.zeros_like(present)
    more[:, :-1] = present[:, 1:]
    encoded = (groups & np.uint64(0x7F)).astype(np.uint8) | (more.astype(np.uint8) << 7)
    return encoded[present].tobytes()


def decode_varints(data: bytes | memoryview) -> np.ndarray:
    """int64[n] of the varints in ``data``."""
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        return np.zeros(0, np.int64)
    last = raw < 0x80
    if not last[-1]:
        raise ValueError("a number is cut off")
    if last.all():
        return raw.astype(np.int64)
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    place = np.arange(raw.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 8:
        raise ValueError("a number is too large")
    return np.add.reduceat((raw & 0x7F).astype(np.int64) << (7 * place), starts)


def _sized(data: bytes) -> bytes:
    size = len(data)
    head = bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + data


def _take(data: memoryview, tag: bytes) -> tuple[memoryview, memoryview]:
    """The content of the first field, which must have this tag, and the bytes after it."""
    if data[:1] != tag:
        raise ValueError("not an example of this corpus")
    size = shift = 0
    place = 1
    while True:
        byte = data[place]
        size |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            break
    if place + size > len(data):
        raise ValueError("an example is cut off")
    return data[place : place + size], data[place + size :]


def _only(data: memoryview, tag: bytes) -> memoryview:
    content, rest = _take(data, tag)
    if rest:
        raise ValueError("not an example of this corpus")
    return content
