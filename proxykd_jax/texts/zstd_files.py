"""Reads files that are compressed with Zstandard, by an optional package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, cast

from proxykd_jax.errors import UserError

MAGIC = b"\x28\xb5\x2f\xfd"
# Compressed bytes read at once. Few, because the most repetitive ones unpack to many.
_CHUNK = 16 << 10
_BUFFER = 1 << 20
# zstd --long=31 is the widest window there is.
_WIDEST = 1 << 31


def open_zstd(path: Path) -> IO[bytes]:
    """Opens a file for reading what it holds uncompressed.

    Raises:
      UserError: the package is missing; while reading, the file is damaged or cut off.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"{path} is compressed with Zstandard. Install what reads it, with: pip install "
            f"'proxykd_jax[zstd]'. Or decompress it, with: zstd -d {path.name}"
        ) from error
    return cast(IO[bytes], io.BufferedReader(_Frames(path, zstandard), _BUFFER))


class _Frames(io.RawIOBase):
    """The content of all frames; the package's own reader does not see that a file is cut off."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._path, self._file = path, open(path, "rb")  # noqa: SIM115  (closed by close)
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=_WIDEST).decompressobj
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise self._damaged("it is cut off")
                return 0
            self._ready = memoryview(self._decompressed(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompressed(self, data: bytes) -> bytes:
        found = []
        while data:
            self._frame = self._frame or self._new()
            try:
                found.append(self._frame.decompress(data))
            except self._error as error:
                raise self._damaged(str(error)) from error
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None
        return b"".join(found)

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self._path} is a damaged Zstandard file ({why}). Copy or compress it again."
        )

    def close(self) -> None:
        self._file.close()
        super().close()
