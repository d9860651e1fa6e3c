"""A distillation strategy for google-tunix that reads stored top-k labels under a mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from tunix.distillation.strategies import base_strategy
from tunix.rl import common

ALPHA = 1.0


def forward(model: Any, input_tokens: jax.Array, input_mask: jax.Array) -> jax.Array:
    """Logits of every position."""
    valid_BL = input_tokens != -1
    positions_BL = common.build_positions_from_mask(valid_BL)
    logits_BLV, _ = model(input_tokens, positions_BL, None, common.make_causal_attn_mask(valid_BL))
    return logits_BLV


class StoredLabels(base_strategy.BaseStrategy):
    """The NLL of the answers and the weighted KL on the stored ids and a bucket for the rest."""

    def get_train_loss(self, model: Any, teacher_output: Any, inputs: dict[str, Any]) -> Any:
        """The loss, from logits and from the labels that replace logits in ``teacher_output``."""
        logits_BLV = self._student_forward_fn(model, **inputs)[:, :-1].astype(jnp.float32)
        labels_BL, mask_BL = inputs["input_tokens"][:, 1:], inputs["input_mask"][:, 1:]
        return self.compute_loss(logits_BLV, {**teacher_output, "mask": mask_BL}, labels_BL)

    def compute_loss(self, student_output: Any, teacher_output: Any, labels: Any) -> Any:
        """The mean loss over the tokens of the answers."""
        ids_BLK, logps_BLK = teacher_output["ids"][:, 1:], teacher_output["logps"][:, 1:]
        normalizer_BL = jax.nn.logsumexp(student_output, axis=-1)
        gold_BL = jnp.take_along_axis(student_output, labels[..., None], -1)[..., 0]
        topk_BLK = jnp.take_along_axis(student_output, ids_BLK, -1) - normalizer_BL[..., None]
        tails = [
            jnp.log(-jnp.expm1(jnp.minimum(jax.nn.logsumexp(x, axis=-1), -1e-7)))
            for x in (logps_BLK, topk_BLK)
        ]
        kl_BL = jnp.sum(jnp.exp(logps_BLK) * (logps_BLK - topk_BLK), axis=-1)
        kl_BL += jnp.exp(tails[0]) * (tails[0] - tails[1])
        mask_BL = teacher_output["mask"].astype(jnp.float32)
        weighted = jnp.sum(kl_BL * mask_BL * teacher_output["weights"][:, None])
        nll = jnp.sum((normalizer_BL - gold_BL) * mask_BL)
        return (nll + ALPHA * weighted) / jnp.sum(mask_BL)

    def compute_eval_loss(self, student_output: Any, labels: Any) -> Any:
        """Nothing calls it."""
        raise NotImplementedError
