"""The true distribution of a teacher that is a known process: a folder of exact log-probs.

Only evaluation opens it. ``teacher.safetensors`` holds, for n rows of T tokens of which
R = T - prompt length belong to the answer:

    tokens          int32   [sum of T]     rows end to end, prompt and answer
    lengths         int32   [n]            T
    prompt_lengths  int32   [n]
    logps           float32 [sum of R, V]  log-probs of all tokens at each position of the answers;
                                           -inf for tokens that the teacher never says
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.errors import UserError

TEACHER_FILE = "teacher.safetensors"
# The probabilities of a row of 10^5 float32 log-probs sum to 1 within this.
_SUM_TOLERANCE = 1e-4


def write_teacher_logps(
    folder: Path,
    *,
    tokens: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    logps: Sequence[np.ndarray],
) -> None:
    """Writes the folder that ``evaluate.teacher_logps`` names.

    Args:
      folder: created if it does not exist.
      tokens: n integer arrays ``[T]``.
      prompt_lengths: n lengths P.
      logps: n arrays ``[T - P, V]`` of normalised log-probs, in nats.

    Raises:
      ValueError: shapes that do not fit, or probabilities that do not sum to 1.
    """
    from safetensors.numpy import save

    for row, length, table in zip(tokens, prompt_lengths, logps, strict=True):
        if len(table) != len(row) - length:
            raise ValueError(
                f"a row of {len(row)} tokens with a prompt of {length} has {len(table)} places"
            )
        total = np.exp(table.astype(np.float64)).sum(axis=-1)
        if np.any(np.abs(total - 1) > _SUM_TOLERANCE):
            raise ValueError(f"probabilities sum to {total.min()} .. {total.max()}, not to 1")
    arrays = {
        "tokens": np.concatenate(tokens).astype(np.int32),
        "lengths": np.array([len(row) for row in tokens], np.int32),
        "prompt_lengths": np.array(prompt_lengths, np.int32),
        "logps": np.concatenate(logps).astype(np.float32),
    }
    write_bytes(folder / TEACHER_FILE, save(arrays))


class TeacherLogps:
    """The opened folder. Rows are found by their tokens; log-probs are read on demand."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder does not have the form in the module's docstring."""
        from safetensors import SafetensorError, safe_open

        path = folder / TEACHER_FILE
        try:
            self._file = safe_open(str(path), framework="numpy")
            tokens, lengths, prompt_lengths = (
                self._file.get_tensor(name) for name in ("tokens", "lengths", "prompt_lengths")
            )
            self._logps = self._file.get_slice("logps")
            places, self.vocab_size = self._logps.get_shape()
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(
                f"evaluate.teacher_logps: {path} cannot be read ({error}). It must hold tokens, "
                "lengths, prompt_lengths and logps."
            ) from error
        if lengths.sum() != len(tokens) or (lengths - prompt_lengths).sum() != places:
            raise UserError(
                f"evaluate.teacher_logps: {path} is inconsistent: its lengths do not add up to its "
                "tokens and log-probs."
            )
        self._places: dict[tuple[int, bytes], tuple[int, int]] = {}
        start, place = 0, 0
        for length, prompt_length in zip(lengths.tolist(), prompt_lengths.tolist(), strict=True):
            row = tokens[start : start + length]
            self._places[_key(row, prompt_length)] = (place, place + length - prompt_length)
            start, place = start + length, place + length - prompt_length

    def __len__(self) -> int:
        return len(self._places)

    def read(self, tokens: np.ndarray, prompt_length: int) -> np.ndarray:
        """float32 ``[R, V]`` of a row.

        Raises:
          UserError: the folder does not contain this row.
        """
        found = self._places.get(_key(tokens, prompt_length))
        if found is None:
            shown = " ".join(map(str, tokens[:12].tolist()))
            raise UserError(
                f"evaluate.teacher_logps holds no row of these tokens (prompt of {prompt_length}): "
                f"{shown} ... It must be made with the tokenizer, template and test rows of this "
                "run."
            )
        return self._logps[found[0] : found[1]]


def _key(tokens: np.ndarray, prompt_length: int) -> tuple[int, bytes]:
    return prompt_length, np.ascontiguousarray(tokens, np.int32).tobytes()
