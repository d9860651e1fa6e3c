"""A source of the config as an iterator of rows. Memory does not grow with the source."""

from __future__ import annotations

from collections.abc import Iterator

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.data.records import Drops, TextRow


def read_source(
    source: SourceConfig, *, prompts_only: bool, drops: Drops, source_index: int = 0
) -> Iterator[TextRow]:
    """Reads a source lazily.

    Args:
      source: files, a Hugging Face dataset or a TFDS builder.
      prompts_only: yield prompts, which end with the user, and need no answers (answers that are
        there are left off). Otherwise every row ends with the teacher's answer.
      drops: counts rows that are left out.
      source_index: copied into the rows.

    Raises:
      UserError: the source is missing, damaged, of another format, or gives no row at all.
    """
    raise NotImplementedError
    yield
