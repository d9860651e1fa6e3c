"""The sizes of the study, and the product's config and run that each cell stands for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optax

from benchmarks.miniature import make, pretrain
from benchmarks.miniature import world as w
from benchmarks.miniature.recipes import HEADLINE, recipes
from proxykd_jax.config import Config, OptimizerConfig, make_config
from proxykd_jax.data.collate import Rows
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.texts.split import effective_validation_fraction
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.sketch import SketchedCorpus, sketch_run
from proxykd_jax.training.stage_run import StageRun

ROW_LENGTH = w.PROMPT_LENGTH + w.MAX_ANSWER
PRESETS = ("paper", "recommended")
# In this regime the teacher is a neural model of the texts of the analytic teacher of ``fmt``.
NEURAL = "neural"
REGIMES = (*w.REGIMES, NEURAL)
MAIN_REGIME = "fmt"
NEURAL_TEACHER, NEURAL_STEPS, NEURAL_RATE = pretrain.model_config(96, 256), 2000, 3e-3
# The small proxy of Fig. 3 has the student's size and the proxy's pre-training.
SMALL_PROXY = pretrain.STUDENT
# Table 5's family has biases on q, k and v, a norm on the heads, and tied embeddings.
QWEN = {"family": "qwen3", "qk_norm": True, "tie_embeddings": True}


@dataclass(frozen=True)
class Sizes:
    """The numbers of rows and steps.

    Attributes:
      num_corpus, num_test, num_fresh: the number of prompts of each kind.
      steps_share: a share below 1 shortens pre-training, for tests.
      overrides: keys of the product's config, as ``--set`` takes them.
      warmup_share: the share of a student's steps that SODA and GAD spend on their warm-up.
    """

    num_corpus: int = make.NUM_CORPUS
    num_test: int = make.NUM_TEST
    num_fresh: int = make.NUM_FRESH
    steps_share: float = 1.0
    overrides: tuple[str, ...] = ()
    warmup_share: float = 0.25

    @property
    def prompts(self) -> tuple[int, int, int]:
        """The numbers of test, corpus and fresh prompts."""
        return self.num_test, self.num_corpus, self.num_fresh


# With so many epochs every seed takes the same steps, whatever its split's size.
ENOUGH = ("align.warmup_epochs=1000", "align.epochs_per_round=1000", "distill.epochs=1000")


@dataclass(frozen=True)
class Setting:
    """One cell of the study.

    Attributes:
      regime: one of ``REGIMES``.
      preset: one of ``PRESETS``.
      sizes: the numbers of rows and steps.
      proxy_model, student_model: architectures.
    """

    regime: str
    preset: str
    sizes: Sizes = field(default_factory=Sizes)
    proxy_model: ModelConfig = pretrain.PROXY
    student_model: ModelConfig = pretrain.STUDENT

    @functools.cached_property
    def config(self) -> Config:
        """The miniature's recipe, with what the preset changes for the student."""
        recipe: dict[str, Any] = recipes(Path("miniature"))[HEADLINE]
        if self.preset == "recommended":
            recipe["preset"] = "recommended"
            del recipe["distill"]["alpha"]
        return make_config(recipe, [*ENOUGH, *self.sizes.overrides])

    def run(
        self,
        stage: Literal["align", "distill"],
        seed: int,
        splits: Mapping[str, Rows],
        *,
        method: Any = None,
        **sections: Mapping[str, Any],
    ) -> StageRun:
        """A seed's run of the product on rows in memory.

        It is a sketch: its models are shapes. Its phases have the objectives, batches and orders of
        a real run.

        Args:
          stage, seed: of the run.
          splits: its corpus.
          method: the section ``method`` of the config, where it is not the recipe's.
          **sections: values that replace those of the config, by section and key.
        """
        changes: dict[str, Any] = {"seed": seed, "method": method or self.config.method}
        for name, values in sections.items():
            changes[name] = getattr(self.config, name).model_copy(update=dict(values))
        config = self.config.model_copy(update=changes)
        length = config.corpus.max_length
        corpus = SketchedCorpus(splits, length, w.VOCAB_SIZE, Path(), (w.END,))
        return sketch_run(stage, config, self.proxy_model, self.student_model, corpus)

    @property
    def held_out(self) -> float:
        """The share of the corpus that is for validation."""
        corpus = self.config.corpus
        return effective_validation_fraction(
            self.sizes.num_corpus,
            validation_fraction=corpus.validation_fraction,
            validation_rows=corpus.validation_rows,
        )

    @property
    def rows(self) -> tuple[Any, ...]:
        """Everything that decides prompts, answers and splits, except the regime and the seed."""
        return self.sizes.prompts, self.config.corpus.shares, self.held_out

    @property
    def world_regime(self) -> str:
        """The regime of the public text."""
        return MAIN_REGIME if self.regime == NEURAL else self.regime

    @property
    def student_steps(self) -> int:
        """The number of steps of every student."""
        steps = self.config.distill.max_steps
        assert steps is not None
        return steps

    @property
    def warmup_steps(self) -> int:
        """The part of them that SODA and GAD spend on their warm-up."""
        return max(round(self.student_steps * self.sizes.warmup_share), 1)

    def pretrain_steps(self, steps: int) -> int:
        """``steps_share`` of the steps, in whole calls."""
        calls = max(round(steps * self.sizes.steps_share / pretrain.STEPS_A_CALL), 1)
        return calls * pretrain.STEPS_A_CALL


@functools.lru_cache(maxsize=8)
def optimizer_of(config: OptimizerConfig) -> optax.GradientTransformation:
    """One object for equal configs: a step that uses it is compiled once."""
    return make_optimizer(config, 1)
