"""Adam as configured (the paper, section 4.2: constant 1e-5, no decay, no clipping)."""

from __future__ import annotations

import optax

from proxykd_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then constant, cosine or linear to 0."""
    peak = config.learning_rate
    rest = max(total_steps - config.warmup_steps, 1)
    after: optax.Schedule
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        after = optax.linear_schedule(peak, 0.0, rest)
    if config.warmup_steps == 0:
        return after
    # The rate of step 0 is not zero, which would waste the step.
    warmup = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Chains clipping, Adam, decoupled weight decay and the schedule, in this order."""
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*parts)
