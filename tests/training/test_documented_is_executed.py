"""Training computes the equations that docs/method.md names.

Each documented function in turn is replaced everywhere in the package by one that fails. Every part
of a run that needs the equation must then fail too. Tracing is enough, so nothing is trained.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from proxykd_jax import losses
from proxykd_jax.config import PreferenceConfig
from proxykd_jax.data.sample_weights import weights_of
from proxykd_jax.training.batch_objectives import AlignObjective, DistillObjective, NllObjective

from .conftest import random_distill, random_pairs, random_rows

METHOD = Path(__file__).resolve().parents[2] / "docs" / "method.md"
# Parts of a run by the documented function that they need.
NEEDED_BY = {
    "token_logps": ("nll", "align"),  # distill computes labels and top-k in one function
    "nll": ("nll", "align", "distill"),
    "dpo_loss": ("align",),
    "preference_loss": ("align",),
    "alignment_objective": ("nll", "align"),
    "topk_kl": ("distill",),
    "topk_kl_tokens": ("distill",),
    "alignment_weights": ("weights",),
    "normalize_weights": ("weights",),
    "length_correlation": ("weights",),
    "weighted_kl": ("distill",),
    "distill_objective": ("distill",),
}


class ReplacedError(Exception):
    """The error that a replaced function raises."""


def _documented() -> list[str]:
    """Returns the functions of ``losses`` in the table of equations."""
    section = METHOD.read_text(encoding="utf-8").split("## From equations to functions")[1]
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return sorted(set(re.findall(r"`losses\.(\w+)`", "\n".join(rows))))


def _share(model, objective, batch) -> None:
    spec, frozen, trainable = model
    counts = objective.counts(batch)
    jax.eval_shape(
        lambda models: objective.share(models, batch, counts, spec, None),
        spec.bind(frozen, trainable),
    )


@pytest.fixture
def parts(lora_model):
    """Returns the parts of a run that compute equations."""
    rng = np.random.default_rng(0)
    dpo = PreferenceConfig(loss="dpo", beta=0.1)
    steps = {
        "nll": (NllObjective("example_mean"), random_rows(rng, 2)),
        "align": (AlignObjective(dpo, "example_mean", 1.0, 1.0), random_pairs(rng, 3)),
        "distill": (
            DistillObjective(10.0, 1.0, "bucket", "example_mean"),
            random_distill(rng, 3),
        ),
    }
    logliks, lengths = np.array([-3.0, -9.0, -5.0]), np.array([2, 7, 3])
    return {
        **{name: functools.partial(_share, lora_model, *step) for name, step in steps.items()},
        "weights": lambda: weights_of(logliks, lengths, normalize=True),
    }


def _replace(monkeypatch, name: str) -> None:
    """Replaces ``losses.<name>`` by a function that fails in every module that has it."""
    original = getattr(losses, name)

    def replaced(*_args, **_kwargs):
        raise ReplacedError(name)

    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "proxykd_jax":
            continue
        for attribute, value in list(vars(module).items()):
            if value is original:
                monkeypatch.setattr(module, attribute, replaced)


def test_every_documented_function_is_looked_at() -> None:
    assert _documented() == sorted(NEEDED_BY)


def test_the_parts_run_with_the_documented_functions(parts) -> None:
    for run in parts.values():
        run()


@pytest.mark.parametrize("name", _documented())
def test_what_needs_a_documented_function_fails_without_it(name, parts, monkeypatch) -> None:
    _replace(monkeypatch, name)
    for part, run in parts.items():
        if part in NEEDED_BY[name]:
            with pytest.raises(ReplacedError) as raised:
                run()
            assert raised.value.args == (name,)
        else:
            run()
