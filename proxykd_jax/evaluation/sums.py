"""The file of a measured model: its sums by row, what identifies it, and their digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.data.parts import digest_arrays
from proxykd_jax.errors import UserError


def write_sums(path: Path, identity: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the sums of a model.

    Args:
      path: file to write.
      identity: JSON values that identify model, corpus and teacher.
      arrays: ``<split>/<name>`` -> array.
    """
    from safetensors.numpy import save

    record = {"identity": identity, "digest": digest_arrays(arrays)}
    write_bytes(path, save(dict(arrays), metadata={"record": json.dumps(record, sort_keys=True)}))


def read_sums(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What identifies the measured model, and the sums by row: ``<split>/<name>`` -> array.

    Raises:
      UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            record = json.loads(file.metadata()["record"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        identity, digest = record["identity"], record["digest"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error or type(error).__name__}).") from error
    if digest != digest_arrays(arrays):
        raise UserError(f"{path} is damaged (its digest differs).")
    return identity, arrays
