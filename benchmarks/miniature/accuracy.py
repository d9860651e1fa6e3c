"""The greedy accuracy of a model on the test prompts, by the product's sampler."""

from __future__ import annotations

import numpy as np

from benchmarks.miniature import world as w
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.training.model import Model


def greedy_correct(model: Model, prompts_NP: np.ndarray, truth_FA: np.ndarray) -> np.ndarray:
    """bool [N]: whether the model's greedy answer ends with the correct value.

    Args:
      model: a model of the miniature's vocabulary.
      prompts_NP: the prompts.
      truth_FA: the correct results of each function.
    """
    answers = sample(
        model.weights,
        # One token more than the longest answer: a model that goes on has no end and is wrong.
        [Prompt(prompt_P, str(n), w.MAX_ANSWER + 1) for n, prompt_P in enumerate(prompts_NP)],
        config=model.config,
        settings=DrawSettings(0.0, 1.0, model.config.vocab_size, (w.END,)),
        seed=0,
        round_index=0,
        batch_size=256,
    )
    values = w.final_values([answer.tokens for answer in answers])
    return values == w.true_results(truth_FA, prompts_NP)
