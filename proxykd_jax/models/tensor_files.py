"""Safetensors files: checked reading, and writing that leaves the old or the new folder if killed.

Every mistake in a folder of weights becomes one sentence: pickles instead of safetensors, an index
that names files elsewhere or missing tensors, a truncated file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from proxykd_jax.artifacts import sync_folder, write_json
from proxykd_jax.errors import UserError
from proxykd_jax.peers import is_first, on_first
from proxykd_jax.small_files import read_object, special_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Safetensors' names of the dtypes that weights may have.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_FILE_NAME = re.compile(r"[^/\\\0]{1,240}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorFile:
    """One open safetensors file.

    Raises:
      UserError: the file is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        special = special_file(path)
        if special:
            raise UserError(f"{path} cannot be read: {special}.")
        try:
            self._file = safe_open(str(path), framework="np").__enter__()
        except FileNotFoundError:
            raise UserError(f"{path} does not exist.") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or no safetensors file ({error}); fetch it again."
            ) from None
        self.names: list[str] = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the part of it that ``index`` selects.

        Raises:
          UserError: the tensor's dtype is not one of weights, or it holds NaN or infinity.
        """
        part = self._file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is of type {part.get_dtype()}; weights must be "
                f"{', '.join(_DTYPES)} (quantised checkpoints are not supported)."
            )
        array = self._file.get_tensor(name) if index is None else part[index]
        if not is_finite(array):
            raise UserError(f"{self.path}: tensor {name} holds NaN or infinite values.")
        return array


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which NumPy handles much faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


def is_finite(array: np.ndarray) -> bool:
    """Whether there is no NaN or infinity; inspects bits for bfloat16, whose isfinite is slow."""
    if array.dtype == ml_dtypes.bfloat16:
        return not np.any((bits(array) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(array).all())


class TensorFolder:
    """The weights of a Hugging Face model folder, in one file or several with an index.

    Raises:
      UserError: there are no safetensors, or the index does not match the files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = {path.name: TensorFile(path) for path in weight_files(self.folder)}
        self._where = {
            name: file_name for file_name, file in self._files.items() for name in file.names
        }
        index = _read_index(self.folder)
        missing = sorted(name for name in index if self._where.get(name) != index[name])
        if missing:
            raise UserError(
                f"{self.folder / INDEX_FILE} says that {missing[0]} is in {index[missing[0]]}, "
                f"but it is not there ({len(missing)} such tensors). Fetch the folder again."
            )

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[self._where[name]].shape(name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._files[self._where[name]].read(name, index)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model folder's weights, sorted.

    Raises:
      UserError: the folder or its weights are missing, or the index names a file outside it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a model is a Hugging Face folder.")
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = _read_index(folder)
    if index:
        return [folder / name for name in sorted(set(index.values()))]
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        raise UserError(
            f"{folder} has {', '.join(loose[:3])} but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "fetch the folder again."
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code "
            "when they are read. Convert them to safetensors."
        )
    raise UserError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}.")


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty if there is a single file or no index."""
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).exists() or not path.exists():
        return {}
    index = read_object(path, "index").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path} is damaged: it has no weight_map; fetch it again.")
    for name in index.values():
        # A symlink is fine, because the hub's cache consists of them; a path is not.
        if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
            raise UserError(
                f"{path} names {str(name)[:80]!r}, which is no safetensors file or lies outside of "
                "the folder; refused."
            )
        if not (folder / name).is_file():
            raise UserError(f"{path} names {name}, which is missing. Fetch the folder again.")
    return index


Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def write_tensors(
    folder: Path, tensors: Sequence[Tensor], dtype: np.dtype, max_shard_bytes: float
) -> None:
    """Writes tensors in order, in one file or in shards with an index, and reads each back.

    Args:
      tensors: (name, shape, function that makes the array); one shard is in memory at a time.
      max_shard_bytes: a shard ends before the tensor that would exceed this; tensors are not split.
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    sizes = [int(np.prod(shape)) * dtype.itemsize for _, shape, _ in tensors]
    for tensor, size in zip(tensors, sizes, strict=True):
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0], dtype)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, dtype)
        weight_map.update({tensor_name: name for tensor_name, _, _ in shard})
    write_json(
        folder / INDEX_FILE, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    )


def write_file(path: Path, tensors: Sequence[Tensor], dtype: np.dtype) -> None:
    """Writes a safetensors file with the metadata that transformers needs, and reads it back.

    All processes must make each tensor, because each may hold a part; the first one writes.

    Raises:
      ValueError: a tensor has another shape than announced, or holds NaN or infinity.
      OSError: what the disk gives back differs from what was written.
    """
    from safetensors.numpy import save_file

    arrays = {}
    for name, shape, make in tensors:
        # save_file silently writes wrong values for an array that is not contiguous.
        made = make()
        if not is_first():
            continue
        array = np.ascontiguousarray(bits(made.astype(dtype, copy=False))).view(dtype)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
        if not is_finite(array):
            raise ValueError(f"{name} holds NaN or infinite values as {dtype}; not written.")
        arrays[name] = array

    def write() -> None:
        save_file(arrays, str(path), metadata={"format": "pt"})
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        written = TensorFile(path)
        for name, array in arrays.items():
            back = written.read(name)
            if back.dtype != array.dtype or not np.array_equal(bits(back), bits(array)):
                raise OSError(f"{path}: {name} does not read back as it was written.")

    on_first(write)


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that replaces ``path`` when the block ends without an error.

    The first process creates it; for the others it is only a name.

    Raises:
      UserError: ``path`` exists and may not be overwritten, or is not a folder.
    """
    if not is_first():
        yield path
        on_first(lambda: None)
        return
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old.tmp")
    if old.exists() and not path.exists():
        os.replace(old, path)  # killed between the two renames below: restore the old folder
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder.")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} exists and is not empty; remove it or choose another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    on_first(lambda: None)  # all processes wait until the first has renamed


def numpy_dtype(dtype: Any) -> np.dtype:
    """The dtype of float32, bfloat16 or float16, given by name or type.

    Raises:
      UserError: anything else.
    """
    try:
        found = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    except TypeError:
        found = None
    if found not in [np.dtype(known) for known in _DTYPES.values()]:
        raise UserError(f"Weights are float32, bfloat16 or float16, not {dtype!r}.")
    return found
