"""Reads rows of Parquet files, Hugging Face datasets and TFDS builders, without reading ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.texts.json_files import Record

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_parquet(path: Path) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, "file:row")`` in batches; rows count from 1.

    Raises:
      UserError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        # A buffer without pre-buffering limits memory to the pages of a batch, not a row group. A
        # memory map would count every page read as the process's memory.
        with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"{path} has two columns of the name {twice}. Rename one of them.")
            # Old writers mark no text as such.
            unmarked = any("binary" in str(field.type) for field in file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield _decoded(record) if unmarked else record, f"{path}:{row}"
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: a text after row {row} is not UTF-8 (byte 0x{error.object[error.start]:02x})."
        ) from error
    # ValueError: two fields of one name within a column; OverflowError: a date beyond all dates.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} cannot be read as Parquet after row {row}: {error}") from error
    if not row:
        raise UserError(f"{path} is empty: it holds no row. Remove it or fill it.")


def read_dataset(name: str, split: str, subset: str | None) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, "name:row")`` of a Hugging Face dataset.

    A folder written by ``save_to_disk`` is memory-mapped; other folders and hub names are streamed.
    Datasets stored as JSON or CSV are refused, because the library guesses their types and changes
    texts that look like dates.

    Raises:
      UserError: no such dataset, split or subset, or one stored as JSON or CSV.
    """
    import datasets

    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        stored = _call(f"the dataset {name}", lambda: datasets.load_from_disk(name))
        if isinstance(stored, datasets.DatasetDict):
            if split not in stored:
                raise UserError(f"{name} has no split {split!r}; it has {', '.join(stored)}.")
            stored = stored[split]
        rows: Any = stored.to_iterable_dataset()
    else:
        rows = _call(f"the dataset {name}", lambda: _stream_dataset(name, split, subset))
    yield from _records(iter(rows), f"{name}/{split}")


def dataset_subsets(name: str) -> list[str]:
    """Names of a Hugging Face dataset's configurations, sorted.

    Raises:
      UserError: there is no such dataset.
    """
    import datasets

    return sorted(_call(f"the dataset {name}", lambda: datasets.get_dataset_config_names(name)))


def _stream_dataset(name: str, split: str, subset: str | None) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(name, subset)
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if kind in ("json", "csv", "pandas"):
        raise UserError(
            f"{name} is kept as {kind.upper()}, which this library reads with guessed types: "
            "texts that look like dates come back changed. Give the files under `path` instead "
            "(JSON Lines, CSV or Parquet)."
        )
    return datasets.load_dataset(name, subset, split=split, streaming=True)


def read_tfds(name: str, split: str) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, "name:row")`` of a TFDS builder that is already prepared.

    Args:
      name: a builder's name, or the folder that ``download_and_prepare`` wrote.
      split: one of its splits, or a slice of one (``train[:10%]``).

    Raises:
      UserError: no such builder or split, or nothing is prepared.
    """
    import tensorflow_datasets as tfds

    if Path(name).is_dir():
        builder = _call(
            f"the TFDS folder {name}", lambda: tfds.builder_from_directory(_version_folder(name))
        )
    else:
        builder = _call(f"the TFDS builder {name}", lambda: tfds.builder(name))
    if not builder.info.splits:
        raise UserError(
            f"The TFDS builder {name} is not prepared in {builder.data_dir}. Prepare it once with "
            f"tfds.builder({name!r}).download_and_prepare(), or give the prepared folder."
        )
    if split.split("[")[0] not in builder.info.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}.")
    rows = _call(f"the split {split} of {name}", lambda: _tfds_rows(builder, split))
    yield from _records(rows, f"{name}/{split}")


def _records(rows: Iterator[Any], name: str) -> Iterator[tuple[Record, str]]:
    def read() -> Record | None:
        record = next(rows, None)
        return None if record is None else _plain(record)

    row = 0
    while (record := _call(f"row {row + 1} of {name}", read)) is not None:
        row += 1
        yield record, f"{name}:{row}"


def _version_folder(name: str) -> str:
    """The folder with the data: the given one, or its latest version."""
    versions = sorted(
        Path(name).glob("**/dataset_info.json"),
        key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdigit()],
    )
    return str(versions[-1].parent) if versions else name


def _tfds_rows(builder: Any, split: str) -> Iterator[Any]:
    if builder.info.file_format.value == "array_record":
        source = builder.as_data_source(split=split)
        return (source[index] for index in range(len(source)))
    import tensorflow_datasets as tfds

    read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    return iter(
        tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=read_config))
    )


def _decoded(value: Any) -> Any:
    """Converts bytes that are UTF-8 to text, at any depth."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Converts bytes and arrays to texts, numbers, lists and dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


_Result = TypeVar("_Result")


def _call(what: str, function: Callable[[], _Result]) -> _Result:
    """Calls a library whose errors the user can fix (names, files, network)."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{what} cannot be read: {type(error).__name__}: {lines[0][:300]}"
        ) from error
