"""Folders that survive a kill: atomic writes, digests, and one manifest per stage.

A stage's folder has a ``manifest.json`` from the start. ``settings`` are the config keys that
determine its content, and ``inputs`` identify what it was made from. A run whose settings or inputs
no longer match stops with a message instead of mixing two runs.

The manifest holds a digest of itself, and a finished one those of the stage's files. Whoever opens
a finished stage compares them first (``verification`` says how much is read). The command that made
a stage makes damaged files again; readers stop and name that command.

If a run has several processes, process 0 writes. On the others writing does nothing, and opening or
completing a stage waits for process 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from proxykd_jax import __version__, peers
from proxykd_jax.errors import UserError

Verification = Literal["full", "sampled", "off"]
MANIFEST = "manifest.json"
_CHUNK = 1 << 22
_PROBLEMS_SHOWN = 3
_DIGEST = "record_digest"
_NOTHING_MADE = {MANIFEST, f".{MANIFEST}.tmp"}
_TEMPORARY = ".*.tmp"
# The coarsest clock of a file system ticks every two seconds.
_SETTLED_NS = 2_000_000_000
# Path -> (inode, size, mtime, ctime) and digest of the files that this process has read.
_known: dict[Path, tuple[tuple[int, int, int, int], str]] = {}
# How much of a finished stage's files is compared with the digests.
_verification: Verification = "full"
# ``sampled`` reads small files whole, and one in so many of the large ones.
_SMALL_FILE, _ONE_IN = 64 << 20, 10
# The arguments of ``borrowing``, while it is active.
_borrowing: tuple[Path, Sequence[Path], Sequence[str] | None] | None = None


def write_bytes(path: Path, data: bytes, *, one_of_several: bool = False) -> None:
    """Writes a whole file or nothing: temporary name, fsync, rename, fsync of the folder.

    Args:
      path: the file.
      data: its content.
      one_of_several: other processes may write the same file at the same time, so the temporary
        name must be unique.
    """
    if not peers.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{secrets.token_hex(4)}" if one_of_several else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically. NaN and infinity are refused, because JSON has neither."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file that this program wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} and run again.") from (
            error
        )


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON values of a file's lines; lines that are no JSON are left out.

    A killed process may have left its last line half written.
    """
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def digest_file(path: Path) -> str:
    """xxh3-128 of a file, which detects bit rot but not manipulation (6 GB/s where measured).

    A process reads a file only once while its metadata are unchanged, because every stage asks for
    the digests of its inputs, which may include tens of GB of weights. Bit rot does not change
    metadata; ``changed_files`` reads the bytes.
    """
    now, before = time.time_ns(), _file_state(path)
    found = _known.get(path)
    if found is not None and found[0] == before:
        return found[1]
    digest = _read_digest(path)
    # A file written a moment ago may be written again within one tick of its clock.
    if before[2] < now - _SETTLED_NS and _file_state(path) == before:
        _known[path] = before, digest
    return digest


def _file_state(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_digest(path: Path) -> str:
    import xxhash

    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return f"xxh3:{state.hexdigest()}"


def digest_value(value: Any) -> str:
    """xxh3-128 of a JSON value, independent of key order."""
    import xxhash

    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(text.encode())}"


def digest_files(folder: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """``{relative path: {bytes, digest}}`` of files (default: all but the manifest).

    Temporary files do not count, because a killed process may have left them.
    """
    if files is None:
        files = (
            path
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST and not path.match(_TEMPORARY)
        )
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "digest": digest_file(path)}
        for path in sorted(files)
    }


def changed_files(folder: Path, digests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Differences from ``digest_files``: one sentence per file; empty if nothing has changed."""
    return list(_differing(folder, digests, _read_digest).values())


def _differing(
    folder: Path,
    digests: Mapping[str, Mapping[str, Any]],
    digest_of: Callable[[Path], str | None],
) -> dict[str, str]:
    """By name, what is wrong with the files that differ; a digest of None is not compared."""
    problems = {}
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            problems[name] = f"{path} is missing"
        elif path.stat().st_size != expected["bytes"]:
            problems[name] = f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
        elif digest_of(path) not in (None, expected["digest"]):
            problems[name] = f"{path} was changed since it was written (digest differs)"
    return problems


@contextlib.contextmanager
def verification(how: Verification) -> Iterator[None]:
    """While active, finished stages are compared with their digests in this way.

    Args:
      how: ``full`` reads every file once per process. ``sampled`` reads small files, and one in ten
        of those above 64 MiB. ``off`` compares names and sizes alone.
    """
    global _verification
    before, _verification = _verification, how
    try:
        yield
    finally:
        _verification = before


def damaged_files(folder: Path, digests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By name, what is wrong with the files of a finished stage; see ``verification``."""

    def digest_of(path: Path) -> str | None:
        small = path.stat().st_size <= _SMALL_FILE
        chosen = secrets.randbelow(_ONE_IN) == 0
        if _verification == "full" or (_verification == "sampled" and (small or chosen)):
            return digest_file(path)
        return None

    return _differing(folder, digests, digest_of)


@contextlib.contextmanager
def borrowing(
    run: Path, lenders: Sequence[Path], stages: Sequence[str] | None = None
) -> Iterator[None]:
    """While active, ``run`` links stages that other runs have finished instead of making them.

    A missing stage is linked if a lender has it, complete, with the same settings and inputs, as
    ``open_stage`` compares them. Complete stages are only read from then on.

    Args:
      run: folder of the run.
      lenders: folders of other runs, searched in this order.
      stages: names of the stages that may be linked (default: all).
    """
    global _borrowing
    before, _borrowing = _borrowing, (run, lenders, stages)
    try:
        yield
    finally:
        _borrowing = before


def open_stage(
    folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Any]
) -> bool:
    """Opens or creates a stage's folder.

    Settings and inputs of a stage that has made nothing yet may still change: a run that was
    refused because of a damaged file continues once the file is repaired. Within ``borrowing`` the
    folder may become a link. Damaged files of a complete stage are removed, with a warning, and the
    stage is open again, so that the caller makes them anew.

    Returns:
      Whether the stage is already complete.

    Raises:
      UserError: the folder was made with other settings or inputs, is not a stage folder, or is a
        link to a damaged one.
    """
    return peers.on_first(lambda: _open_stage(folder, stage, settings, inputs))


def _open_stage(
    folder: Path, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Any]
) -> bool:
    path = folder / MANIFEST
    begun = {
        "stage": stage,
        "status": "running",
        "settings": _plain(settings),
        "inputs": _plain(inputs),
        "code_version": __version__,
    }
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a link to {os.readlink(folder)}, which is gone. Put that back, or remove "
            "the link to make the stage again."
        )
    if not folder.exists() and _borrow(folder, begun):
        return True
    if path.exists():
        manifest = read_manifest(folder)
        differences = [
            f"{key}: {_shown(old)} then, {_shown(new)} now"
            for key, old, new in _unlike(manifest, begun)
        ]
        names = {p.name for p in folder.iterdir()}
        if differences and manifest["status"] == "running" and names <= _NOTHING_MADE:
            write_manifest(folder, begun)
            return False
        if differences:
            listed = "\n  ".join(differences)
            raise UserError(
                f"{folder} was made with other settings:\n  {listed}\n"
                f"Give the run another name, or remove {folder} to make it again."
            )
        if manifest["status"] != "complete":
            return False
        return not _reopen(folder, manifest, begun)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the stage needs a folder of that name.")
    if folder.exists() and any(p.name not in _NOTHING_MADE for p in folder.iterdir()):
        raise UserError(
            f"{folder} holds files but no {MANIFEST}: it was not made by this program. "
            "Choose another name for the run, or move it away."
        )
    write_manifest(folder, begun)
    return False


def _reopen(folder: Path, manifest: Mapping[str, Any], begun: Mapping[str, Any]) -> bool:
    """Removes the damaged files of a complete stage and marks it running; says whether it did."""
    problems = damaged_files(folder, manifest.get("files", {}))
    if not problems:
        return False
    listed = _listed(problems.values())
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a link to a damaged stage: {listed}. Run the command of {begun['stage']} "
            f"for {folder.resolve().parent}, which makes these files again, or remove the link."
        )
    print(f"WARNING: {folder} is damaged: {listed}. These files are made again.", flush=True)
    for name in problems:
        (folder / name).unlink(missing_ok=True)
    write_manifest(folder, begun)
    return True


def _listed(problems: Iterable[str]) -> str:
    shown = list(problems)
    more = len(shown) - _PROBLEMS_SHOWN
    return "; ".join(shown[:_PROBLEMS_SHOWN]) + (f"; and {more} more files" if more > 0 else "")


def _borrow(folder: Path, begun: Mapping[str, Any]) -> bool:
    """Links a missing stage to a lender's equal one; returns whether there is one."""
    if _borrowing is None or not folder.is_relative_to(_borrowing[0]):
        return False
    run, lenders, stages = _borrowing
    if stages is not None and begun["stage"] not in stages:
        return False
    for lender in lenders:
        there = lender / folder.relative_to(run)
        if lender == run or not (there / MANIFEST).is_file():
            continue
        manifest = read_manifest(there)
        same = manifest["stage"] == begun["stage"] and not _unlike(manifest, begun)
        if manifest["status"] == "complete" and same:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Relative, so that a folder of runs can be moved; to the stage itself, not to a link.
            folder.symlink_to(os.path.relpath(there.resolve(), folder.parent.resolve()))
            print(f"{folder}: the same as {there}, linked", flush=True)
            return True
    return False


def _unlike(manifest: Mapping[str, Any], begun: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, there, now) of settings and inputs that differ."""
    return [
        difference
        for part in ("settings", "inputs")
        for difference in _differences(manifest.get(part, {}), begun[part])
    ]


def unlike_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting of a stage that differs from these."""
    made = read_manifest(folder).get("settings", {})
    return [
        f"{key}: {_shown(old)} there, {_shown(new)} in the config"
        for key, old, new in _differences(made, _plain(settings))
    ]


def complete_stage(
    folder: Path,
    *,
    counts: Mapping[str, Any],
    files: Iterable[Path] | None = None,
    content: str | None = None,
    **extra: Any,
) -> None:
    """Marks a stage complete.

    Args:
      folder: the stage's folder.
      counts: the numbers of rows that were read, kept and dropped.
      files: files whose digests are stored (default: all).
      content: digest of the content, if the files' bytes are not reproducible.
      **extra: more entries of the manifest.
    """

    def complete() -> None:
        manifest = read_manifest(folder)
        digests = digest_files(folder, files)
        manifest.update(
            status="complete",
            counts=_plain(counts),
            files=digests,
            content=content or digest_value({name: d["digest"] for name, d in digests.items()}),
            **_plain(extra),
        )
        write_manifest(folder, manifest)

    peers.on_first(complete)


def finished_manifest(folder: Path, stage: str, holds: str) -> dict[str, Any]:
    """The manifest of a finished stage, for readers of its folder.

    Args:
      folder: the stage's folder.
      stage: the command that makes it.
      holds: its content, for the message: ``corpus``, ``soft labels``.

    Raises:
      UserError: it is missing, incomplete or of another stage, or a file of it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no {holds}; run proxykd {stage} first.")
    manifest = read_manifest(folder)
    if manifest.get("stage") != stage:
        raise UserError(f"{folder} was not made by {stage}; it holds no {holds}.")
    if manifest["status"] != "complete":
        raise UserError(f"{folder} is not complete; run {stage} again to continue it.")
    problems = peers.on_first(lambda: damaged_files(folder, manifest.get("files", {})))
    if problems:
        raise UserError(
            f"{folder} is damaged: {_listed(problems.values())}. Run proxykd {stage} "
            "again, which makes these files anew."
        )
    return manifest


def stage_identity(folder: Path) -> str:
    """A digest of a stage's settings, inputs and content, which later stages record as an input."""
    manifest = read_manifest(folder)
    return digest_value({key: manifest.get(key) for key in ("settings", "inputs", "content")})


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files and folders that a killed process left."""
    if not peers.is_first():
        return
    for path in folder.glob(_TEMPORARY):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stage.

    Raises:
      UserError: it is missing or damaged.
    """
    manifest = read_record(folder / MANIFEST)
    if manifest.get("status") not in {"running", "complete"}:
        raise _damaged_record(folder / MANIFEST, "it names no status")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a stage's manifest with its digest."""
    write_record(folder / MANIFEST, manifest)


def read_record(path: Path) -> dict[str, Any]:
    """Reads an object that ``write_record`` wrote, without its digest.

    Raises:
      UserError: the file is missing or damaged.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise _damaged_record(path, "it holds no object")
    digest = record.pop(_DIGEST, None)  # older versions wrote none
    if digest not in (None, digest_value(record)):
        raise _damaged_record(path, "its digest differs")
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object with a digest of itself."""
    plain = _plain(record)
    write_json(path, {**plain, _DIGEST: digest_value(plain)})


def _damaged_record(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}); remove {path.parent} and run again.")


def check_export(folder: Path) -> None:
    """Compares the folder of an exported model with the record that lies beside it, if any.

    Raises:
      UserError: the record or a file that it names is damaged.
    """
    record = folder.parent / f"{folder.name.removesuffix('_adapter')}.json"
    if folder.parent.name != "export" or not record.is_file():
        return
    digests = {
        name: entry
        for name, entry in read_record(record).get("files", {}).items()
        if Path(name).parts[0] == folder.name
    }
    problems = damaged_files(folder.parent, digests)
    if problems:
        raise UserError(
            f"{folder} is damaged: {_listed(problems.values())}. Run python -m proxykd_jax.export "
            "for its run, which writes it again."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in dict.fromkeys([*old, *new])
            for difference in _differences(
                old.get(name), new.get(name), f"{key}.{name}" if key else name
            )
        ]
    return [] if old == new else [(key, old, new)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
