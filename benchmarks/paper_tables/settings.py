"""How large the miniature is, and which config of the product each preset stands for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optax

from benchmarks.miniature import make, pretrain
from benchmarks.miniature import world as w
from benchmarks.miniature.recipes import HEADLINE, recipes
from proxykd_jax.config import Config, OptimizerConfig, make_config
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.texts.split import effective_validation_fraction
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import ModelSpec

ROW_LENGTH = w.PROMPT_LENGTH + w.MAX_ANSWER
PRESETS = ("paper", "recommended")
# ``neural``: the teacher is a model too, of the same texts as the analytic one of ``fmt``.
NEURAL = "neural"
REGIMES = (*w.REGIMES, NEURAL)
MAIN_REGIME = "fmt"
NEURAL_TEACHER, NEURAL_STEPS, NEURAL_RATE = pretrain.model_config(96, 256), 2000, 3e-3
# The small proxy of Fig. 3 has the student's size and the proxy's pre-training.
SMALL_PROXY = pretrain.STUDENT
# Table 5's family: biases on q, k and v, a norm on the heads, tied embeddings.
QWEN = {"family": "qwen3", "qk_norm": True, "tie_embeddings": True}


@dataclass(frozen=True)
class Sizes:
    """Rows and steps.

    Attributes:
      num_corpus, num_test, num_fresh: prompts of each kind.
      steps_share: less than 1 pre-trains for fewer steps, for tests.
      overrides: of the product's config, as ``--set`` takes them.
      warmup_share: of a student's steps that SODA and GAD spend on their warm-up.
    """

    num_corpus: int = make.NUM_CORPUS
    num_test: int = make.NUM_TEST
    num_fresh: int = make.NUM_FRESH
    steps_share: float = 1.0
    overrides: tuple[str, ...] = ()
    warmup_share: float = 0.25

    @property
    def prompts(self) -> tuple[int, int, int]:
        """Test, corpus, fresh."""
        return self.num_test, self.num_corpus, self.num_fresh


# Epochs enough for every seed to take the same steps whatever its split's size, see recipes.py.
ENOUGH = ("align.warmup_epochs=1000", "align.epochs_per_round=1000", "distill.epochs=1000")


@dataclass(frozen=True)
class Setting:
    """One cell of the study: a regime, a preset and the sizes.

    Attributes:
      regime: of ``REGIMES``.
      preset: of ``PRESETS``.
      sizes: rows and steps.
      proxy_model, student_model: architectures.
    """

    regime: str
    preset: str
    sizes: Sizes = field(default_factory=Sizes)
    proxy_model: ModelConfig = pretrain.PROXY
    student_model: ModelConfig = pretrain.STUDENT

    @functools.cached_property
    def config(self) -> Config:
        """The demo's recipe, with what the preset changes for the student."""
        recipe: dict[str, Any] = recipes(Path("miniature"))[HEADLINE]
        if self.preset == "recommended":
            recipe["preset"] = "recommended"
            del recipe["distill"]["alpha"]
        return make_config(recipe, [*ENOUGH, *self.sizes.overrides])

    @functools.cached_property
    def proxy(self) -> ModelSpec:
        """The proxy's static half."""
        section = self.config.proxy
        return ModelSpec(self.proxy_model, "full", section.dtype, section.remat)

    @functools.cached_property
    def student(self) -> ModelSpec:
        """The student's static half."""
        section = self.config.student
        return ModelSpec(self.student_model, "full", section.dtype, section.remat)

    @property
    def held_out(self) -> float:
        """Share of the corpus that is for validation."""
        corpus = self.config.corpus
        return effective_validation_fraction(
            self.sizes.num_corpus,
            validation_fraction=corpus.validation_fraction,
            validation_rows=corpus.validation_rows,
        )

    @property
    def rows(self) -> tuple[Any, ...]:
        """What decides prompts, answers and splits beside the regime and the seed."""
        return self.sizes.prompts, self.config.corpus.shares, self.held_out

    @property
    def align_optimizer(self) -> optax.GradientTransformation:
        """Of the proxy."""
        return _optimizer(self.config.align.optimizer.model_dump_json())

    @property
    def distill_optimizer(self) -> optax.GradientTransformation:
        """Of the student."""
        return _optimizer(self.config.distill.optimizer.model_dump_json())

    @property
    def world_regime(self) -> str:
        """The regime of the public text."""
        return MAIN_REGIME if self.regime == NEURAL else self.regime

    @property
    def student_steps(self) -> int:
        """Steps of every student."""
        steps = self.config.distill.max_steps
        assert steps is not None
        return steps

    def pretrain_steps(self, steps: int) -> int:
        """A share of the steps, whole calls."""
        calls = max(round(steps * self.sizes.steps_share / pretrain.STEPS_A_CALL), 1)
        return calls * pretrain.STEPS_A_CALL


@functools.lru_cache(maxsize=8)
def _optimizer(config_json: str) -> optax.GradientTransformation:
    """One object for equal configs, so that what is compiled with it is compiled once."""
    return make_optimizer(OptimizerConfig.model_validate_json(config_json), 1)
