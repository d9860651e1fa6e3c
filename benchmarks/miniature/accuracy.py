"""The greedy accuracy of a model on the test prompts, by the product's sampler."""

from __future__ import annotations

import numpy as np

from benchmarks.miniature import world as w
from proxykd_jax.generation.sampler import sample
from proxykd_jax.training.model import Model


def greedy_correct(model: Model, prompts_NP: np.ndarray, truth_FA: np.ndarray) -> np.ndarray:
    """bool [N]: whether the model's greedy answer ends with the correct value.

    Args:
      model: a model of the miniature's vocabulary.
      prompts_NP: the prompts.
      truth_FA: the correct results of each function.
    """
    answers = sample(
        model.params,
        model.adapter,
        list(prompts_NP),
        [str(index) for index in range(len(prompts_NP))],
        config=model.config,
        seed=0,
        round_index=0,
        end_token_ids=(w.END,),
        # One token more than the longest answer: a model that goes on has no end and is wrong.
        max_new_tokens=[w.MAX_ANSWER + 1] * len(prompts_NP),
        temperature=0.0,
        batch_size=256,
    )
    values = w.final_values([answer.tokens for answer in answers])
    return values == w.true_results(truth_FA, prompts_NP)
