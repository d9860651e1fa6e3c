"""A file of prices: what tokens of a model cost."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from proxykd_jax.config.load import _explain, _read_yaml
from proxykd_jax.config.section import NonNegativeFloat, Section
from proxykd_jax.errors import UserError

_MILLION = 1_000_000


class Price(Section):
    """Prices of a model, in any one currency, for a million tokens."""

    input: NonNegativeFloat = Field(description="price of a million tokens of prompts")
    output: NonNegativeFloat = Field(description="price of a million tokens of answers")
    batch: NonNegativeFloat = Field(
        1.0, description="share of these prices that a request in a batch file costs"
    )

    def cost(self, prompt_tokens: float, answer_tokens: float, *, batch: bool = False) -> float:
        """What a request costs."""
        whole = (self.input * prompt_tokens + self.output * answer_tokens) / _MILLION
        return whole * self.batch if batch else whole


def load_price(path: str | Path, model: str) -> Price:
    """The price of a model.

    Args:
      path: a YAML file ``model: {input, output, batch}``.
      model: as in the config.

    Raises:
      UserError: the file cannot be read, its entry is wrong, or it has none for this model.
    """
    data, problems = _read_yaml(path, "price file")
    if not isinstance(data, dict):
        raise UserError(f"{path}: a price file maps models to {{input: ..., output: ...}}.")
    if model not in data:
        raise UserError(
            f"{path} has no price for the model {model!r}, only for "
            f"{', '.join(map(str, data)) or 'none'}; add {{input: ..., output: ...}} for it."
        )
    try:
        price = Price.model_validate_json(json.dumps(data[model]), strict=True)
    except ValidationError as error:
        problems += _explain(error.errors(), unresolved_preset=False, root=Price)
    else:
        if not problems:
            return price
    raise UserError("\n".join(f"{path}: {model}: {problem}" for problem in problems))
