"""A folder of arrays written part by part; a kill loses at most the part being written.

A part is one numbered safetensors file. It is written under a temporary name, synced and renamed,
so a file with a part's name is complete. Its header holds digests of its arrays and metadata. The
bytes of a part depend only on both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import digest_value, remove_leftovers, write_bytes
from proxykd_jax.errors import UserError
from proxykd_jax.peers import on_first

_NAME = re.compile(r"part_(\d{5,})\.safetensors")
# A single key, because the writer's hash map orders metadata differently in each run.
_METADATA_KEY = "proxykd"
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


class Part:
    """Arrays of one file, memory-mapped: only accessed parts are read.

    Attributes:
      path: the file.
      arrays: by name, read-only.
      metadata: the value given to ``PartFolder.commit``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.arrays, header = _map_arrays(path)
            record = json.loads(header[_METADATA_KEY])
            self.digest: str = record["digest"]
            self.metadata: dict[str, Any] = record["metadata"]
            # Older versions wrote no digest of the metadata.
            metadata_digest = record.get("metadata_digest", digest_value(self.metadata))
            if metadata_digest != digest_value(self.metadata):
                raise ValueError("the digest of its metadata differs")
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist.") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, str(error) or type(error).__name__) from error

    def verify(self) -> None:
        """Reads the whole file once and checks its digest.

        Raises:
          UserError: the arrays differ from those that were written.
        """
        if digest_arrays(self.arrays) != self.digest:
            raise damaged(self.path, "its digest differs")


class PartFolder:
    """The parts of one folder.

    Args:
      folder: its location.
      one_of_several: other processes may commit the same part at the same time.
    """

    def __init__(self, folder: Path, *, one_of_several: bool = False) -> None:
        self.folder = Path(folder)
        self._one_of_several = one_of_several

    def path(self, index: int) -> Path:
        return self.folder / f"part_{index:05d}.safetensors"

    def complete(self) -> list[int]:
        """Numbers of the existing parts, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def resume(self, num_parts: int) -> list[int]:
        """Prepares the folder for continuing; returns the parts still to make.

        Half-written files of a killed process are removed, and existing parts are verified.

        Raises:
          UserError: a part is damaged, or there are more than ``num_parts``.
        """
        return on_first(lambda: self._resume(num_parts))

    def _resume(self, num_parts: int) -> list[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        there = self.complete()
        if there and there[-1] >= num_parts:
            raise UserError(
                f"{self.path(there[-1])} lies beyond the {num_parts} parts of this run: the folder "
                f"was made with other data. Remove {self.folder} to make it again."
            )
        for index in there:
            self.open(index).verify()
        return [index for index in range(num_parts) if index not in set(there)]

    def commit(
        self,
        index: int,
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes a whole part or nothing; returns the digest of its arrays.

        Args:
          index: the part's number, from 0.
          arrays: by name; bool, integers or floats of the dtypes in ``_DTYPES``.
          metadata: JSON values.
        """
        from safetensors.numpy import save

        # The writer ignores strides and would write wrong values for a transposed array.
        plain = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
        for name, array in plain.items():
            if array.dtype not in [np.dtype(dtype) for dtype in _DTYPES.values()]:
                raise ValueError(f"Array {name!r} has type {array.dtype}, which no part can hold.")
        digest = digest_arrays(plain)
        about = dict(metadata or {})
        record = json.dumps(
            {"digest": digest, "metadata": about, "metadata_digest": digest_value(about)},
            sort_keys=True,
            allow_nan=False,
        )

        def write() -> None:
            data = save(plain, metadata={_METADATA_KEY: record})
            write_bytes(self.path(index), data, one_of_several=self._one_of_several)

        on_first(write)
        return digest

    def open(self, index: int) -> Part:
        return Part(self.path(index))


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """xxh3-128 over names, types, shapes and contents."""
    import xxhash

    state = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        state.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
        state.update(array.tobytes())
    return f"xxh3:{state.hexdigest()}"


def damaged(path: Path, what: str) -> UserError:
    """The error for a file that has changed since it was written."""
    return UserError(f"{path} is damaged ({what}). Remove it and run again to rebuild it.")


def _map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays over the file's memory map, and the header's metadata."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(start - 8))
    metadata = header.pop("__metadata__", {})
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if start + max(ends, default=0) != size:
        raise ValueError(f"it has {size} bytes, not {start + max(ends, default=0)}")
    memory = np.memmap(path, np.uint8, mode="r")
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        # A plain view: slicing a memmap object is slower.
        flat = np.asarray(memory[start + begin : start + end])
        arrays[name] = flat.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata
