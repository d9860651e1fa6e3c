"""How the stages of a run compare in cost, for the time that the status line says is left."""

from __future__ import annotations

from proxykd_jax.config import Config, ModelSection
from proxykd_jax.data.corpus import TokenCorpus

# Passes of a token through a model: an update is a forward and a backward pass, of twice the work;
# a token that is drawn reads all weights for itself, which a batch shares only in part.
_UPDATE, _DRAW = 3.0, 4.0


def stage_costs(config: Config, corpus: TokenCorpus) -> dict[str, float]:
    """Relative costs of the stages that a run trains and measures: tokens x passes x parameters.

    They are no forecast: they only divide what is left once the first stage's speed is known.

    Args:
      config: the config of the run.
      corpus: its corpus.

    Returns:
      Stage -> cost, in the order of the run.

    Raises:
      UserError: a model's ``config.json`` cannot be read.
    """
    align, distill = config.align, config.distill
    tokens = {
        name: float(corpus.split(name).lengths.sum())
        for name in ("warmup", "align", "distill", "fresh", "validation", "test")
    }
    held_out = tokens["validation"] + tokens["test"]
    student = _parameters(config.student)
    proxy = _parameters(config.proxy) if config.needs != "nothing" else 0.0
    taught = tokens["distill"]
    if distill.data == "all":
        taught += tokens["warmup"] + tokens["align"]
    costs = {}
    if config.needs != "nothing":
        passes = 0.0
        if align.alignment != "none":
            passes += _UPDATE * align.warmup_epochs * tokens["warmup"]
        if align.uses_pairs:  # draw, two references, and an update with both answers
            passes += (_DRAW + 2 + 2 * _UPDATE * align.epochs_per_round) * tokens["align"]
        elif align.alignment in ("nll", "nll_preference"):
            passes += _UPDATE * align.epochs_per_round * tokens["align"]
        costs["align"] = proxy * passes
    if config.needs == "labels":
        costs["score"] = proxy * (taught + (1 + _DRAW) * tokens["fresh"])
    costs["distill"] = student * _UPDATE * distill.epochs * (taught + tokens["fresh"])
    if held_out:
        costs["evaluate"] = (3 * proxy + 2 * student) * held_out
    return costs


def _parameters(section: ModelSection) -> float:
    from proxykd_jax.models.folder import local_folder
    from proxykd_jax.models.hf_config import read_config
    from proxykd_jax.models.hf_weights import cut_config
    from proxykd_jax.training.model import model_origin

    config = read_config(local_folder(model_origin(section)))
    if section.init is not None:
        config = cut_config(config, section.init.first_layers)
    return float(config.num_params)
