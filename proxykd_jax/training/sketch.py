"""A sketch is a run made from shapes and lengths alone, for ``plan`` and ``--dry-run``.

Nothing is loaded and nothing is drawn. Weights are ``jax.ShapeDtypeStruct``; rows have lengths but
no tokens. The same code makes the phases of a real run and of a sketch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from proxykd_jax.config import AxesConfig, Config, ModelSection
from proxykd_jax.data.collate import Rows, TokenRow
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.lora import abstract_adapter
from proxykd_jax.models.params import abstract_params
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model, quantization
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import ModelSpec


@dataclass(frozen=True)
class RowsOfLengths:
    """Rows without tokens.

    Attributes:
      lengths: int32[n], tokens of each row.
      prompt_lengths: int32[n], tokens of each prompt.
    """

    lengths: np.ndarray
    prompt_lengths: np.ndarray

    @staticmethod
    def longest(count: int, max_length: int) -> RowsOfLengths:
        """Returns ``count`` rows of the greatest length; half of each is its prompt."""
        lengths = np.full(count, max_length, np.int32)
        return RowsOfLengths(lengths, lengths // 2)

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32[n] zeros."""
        return np.zeros_like(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Raises TypeError: a sketch has no tokens."""
        raise TypeError("A sketch has no tokens.")


@dataclass(frozen=True)
class SketchedCorpus:
    """A corpus that need not exist on disk; its attributes are those of ``TokenCorpus``."""

    splits: Mapping[str, Rows]
    max_length: int
    vocab_size: int
    folder: Path
    end_token_ids: tuple[int, ...] = (0,)

    def split(self, name: str) -> Rows:
        """Returns a split; it is empty if ``splits`` does not name it."""
        return self.splits.get(name, RowsOfLengths.longest(0, self.max_length))

    @staticmethod
    def of(config: Config, counts: Mapping[str, int], vocab_size: int) -> SketchedCorpus:
        """Returns a corpus of ``counts`` rows per split, each of the greatest length."""
        length = config.corpus.max_length
        splits = {name: RowsOfLengths.longest(count, length) for name, count in counts.items()}
        return SketchedCorpus(splits, length, vocab_size, config.folder / "corpus")


# The corpora whose rows a sketch can count.
Corpus = TokenCorpus | SketchedCorpus


def abstract_model(config: ModelConfig, section: ModelSection) -> Model:
    """Returns the shapes of the proxy or the student as ``load_for_training`` would load it.

    Args:
      config: the architecture, with ``lora`` set if an adapter is trained.
      section: ``config.proxy`` or ``config.student``.
    """
    full = section.trainable == "full"
    dtype = "float32" if full else section.dtype
    weights = abstract_params(config, dtype, quantization(section))
    frozen, trainable = ({}, weights) if full else (weights, abstract_adapter(config))
    spec = ModelSpec(config, section.trainable, section.dtype, section.remat)
    return Model(spec, frozen, trainable, Path(section.path or ""))


def sketch_run(
    stage: Literal["align", "distill"],
    config: Config,
    proxy: ModelConfig,
    student: ModelConfig,
    corpus: Corpus | None = None,
) -> StageRun:
    """Returns a stage's run whose phases can be counted and compiled, but not trained.

    Args:
      stage: ``align`` or ``distill``.
      config: config of the run.
      proxy, student: architectures, with ``lora`` set if an adapter is trained.
      corpus: corpus whose rows are counted (default: one row per split).
    """
    if corpus is None:
        one = dict.fromkeys(("warmup", "align", "distill", "fresh"), 1)
        corpus = SketchedCorpus.of(config, one, min(proxy.vocab_size, student.vocab_size))
    models = {
        "align": abstract_model(proxy, config.proxy),
        "distill": abstract_model(student, config.student),
    }
    nothing: Any = None
    run = StageRun(
        stage,
        config,
        corpus,  # type: ignore[arg-type]
        models[stage],
        make_mesh(AxesConfig(), jax.devices()[:1]),
        nothing,
        nothing,
    )
    return dataclasses.replace(run, scorer=models["align"])
