"""Reads small files that a user names, such as a config or a model's ``config.json``.

Devices, pipes and the files of the kernel can be endless or block forever, so only regular files
are read, and only up to a size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from proxykd_jax.errors import UserError

_MIB = 1 << 20
_KERNEL = (Path("/proc"), Path("/sys"))
_LONGEST_NAME, _LONGEST_PATH = 255, 4000


def path_problem(text: str) -> str | None:
    """What makes a text no path of any file system, or None: empty, NUL, a name too long."""
    if not text.strip():
        return "must not be empty"
    if "\0" in text:
        return "must not hold the character NUL"
    longest = max(len(part.encode("utf-8", "replace")) for part in text.split("/"))
    if longest > _LONGEST_NAME or len(text) > _LONGEST_PATH:
        return f"is too long: a name has at most {_LONGEST_NAME} bytes"
    return None


def in_kernel(path: Path) -> bool:
    """Whether a path, its links followed, lies in /proc or /sys."""
    real = path.resolve()
    return any(real.is_relative_to(folder) for folder in _KERNEL)


def special_file(path: Path) -> str | None:
    """Why a path must not be read as a file, or None.

    A path that does not exist is no problem here.
    """
    try:
        if path.is_dir():
            return "it is a directory"
        if path.exists() and not path.is_file():
            return "it is not a regular file, but a device or a pipe"
        return "it belongs to the system's kernel" if in_kernel(path) else None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        return _why(error)


def check_folder(folder: Path, what: str, *, writable: bool = True) -> None:
    """Checks that a folder exists, or can be made, before any work for it begins.

    Args:
      folder: the folder.
      what: what messages call it.
      writable: also check that this process may write there.

    Raises:
      UserError: a part of its path is no folder, or it cannot be written.
    """
    place = folder
    try:
        while not place.exists() and not place.is_symlink() and place != place.parent:
            place = place.parent
        if place.is_symlink() and not place.exists():
            reason = f"{place} is a link to a place that does not exist"
        elif not place.is_dir():
            reason = f"{place} is no folder"
        elif in_kernel(place):
            reason = f"{place} belongs to the system's kernel"
        elif writable and not os.access(place, os.W_OK | os.X_OK):
            reason = f"{place} may not be written by this user"
        else:
            return
    except (OSError, ValueError, RuntimeError) as error:
        reason = _why(error)
    raise UserError(f"{what}: {folder} cannot be used: {reason}. Choose another folder.")


def read_text(path: str | os.PathLike[str], what: str, *, most_bytes: int = _MIB) -> str:
    """The text of a small file.

    Args:
      path: the file.
      what: what messages call it.
      most_bytes: a larger file is refused before it is read.

    Raises:
      UserError: there is no such file, it is no regular file, too large, or not UTF-8.
    """
    path = Path(path)
    reason = path_problem(str(path)) or special_file(path)
    if reason is None:
        try:
            with open(path, "rb") as file:
                data = file.read(most_bytes + 1)
            if len(data) <= most_bytes:
                return data.decode("utf-8")
            reason = f"it has more than {most_bytes:,} bytes"
        except (OSError, UnicodeDecodeError) as error:
            reason = _why(error)
    shown = str(path).replace("\0", "\\0")
    raise UserError(f"cannot read the {what} {shown}: {reason}.")


def read_object(path: Path, what: str, *, most_bytes: int = 64 * _MIB) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
      UserError: see ``read_text``; also if it holds no JSON object.
    """
    text = read_text(path, what, most_bytes=most_bytes)
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not JSON: nested too deeply.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)
