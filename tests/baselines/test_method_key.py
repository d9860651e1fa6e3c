"""The key ``method``: its short form, its effect on other keys, and contradictions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from proxykd_jax.baselines import method_of
from proxykd_jax.config import Config, Method, dump_config, load_config, make_config
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# A valid section of each method.
SECTIONS: dict[str, dict[str, Any]] = {
    found.model_fields["name"].default: {"beta": 0.1}
    if found.model_fields.get("beta") and found.model_fields["beta"].is_required()
    else {}
    for found in get_args(get_args(Method)[0])
}


def config_of(method: Any = None, *overrides: str, **sections: Any) -> Config:
    data = {
        "preset": "paper",
        "name": "x",
        "corpus": {"sources": [{"path": "answers.jsonl"}]},
        "proxy": {"path": "big"},
        "student": {"path": "small"},
        **sections,
    }
    return make_config(data if method is None else {**data, "method": method}, overrides)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_method_can_be_named_run_dumped_and_read(name: str, tmp_path: Path):
    config = config_of({"name": name, **SECTIONS[name]})
    module = method_of(config)
    assert callable(module.phases) and callable(module.to_score)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_without_the_key_it_is_proxy_kd():
    config = config_of()
    assert config.method.name == "proxy_kd"
    assert config.distill.alpha == PRESETS["paper"]["distill"]["alpha"]


def test_a_name_alone_is_the_method_with_its_defaults():
    assert config_of("takd") == config_of({"name": "takd"})
    assert config_of(None, "method=takd") == config_of("takd")
    assert config_of("takd", "method.lam=0.25").method.lam == 0.25
    assert config_of(None, "method=soda", "method.beta=2").method.beta == 2
    assert config_of({"name": "takd", "lam": 0.3}, "method.lam=0.25").method.lam == 0.25
    assert config_of({"name": "takd", "lam": 0.3}, "method=black_box_kd").distill.alpha == 0


def test_a_method_lies_between_preset_and_file():
    config = config_of({"name": "takd", "lam": 0.7, "temperature": 4.0})
    assert (config.distill.alpha, config.distill.nll_weight) == (0.7, 0.3)
    assert config.score.temperature == 4 and not config.distill.weights.enabled
    assert (config.align.alignment, config.align.num_rounds) == ("nll", 1)
    # A file may change what the method only suggests, and may repeat what it requires.
    changed = config_of("takd", align={"num_rounds": 3, "alignment": "nll"})
    assert changed.align.num_rounds == 3
    # Keys that the method does not mention keep the preset's values.
    assert config.distill.tail == PRESETS["paper"]["distill"]["tail"]


@pytest.mark.parametrize("name", SECTIONS)
def test_what_defines_a_method_cannot_be_contradicted(name: str):
    section = {"name": name, **SECTIONS[name]}

    def leaves(node: dict[str, Any], place: str = "") -> list[tuple[str, Any]]:
        found = []
        for key, value in node.items():
            here = f"{place}{key}"
            found += leaves(value, f"{here}.") if isinstance(value, dict) else [(here, value)]
        return found

    for key, value in leaves(config_of(section).method.defines()):
        others = {"none": "warmup", "nll": "none", "distill": "all"}
        others |= dict.fromkeys(("example_mean", "token_mean"), "sum")
        other = others.get(value, value)
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, float):
            other = value + 1
        elif value is None:
            other = "{url: 'http://x:1', api: vllm}"
        said = f"{key}: method.name {name} requires "
        with pytest.raises(UserError, match=re.escape(said)):
            config_of(section, f"{key}={other}")


@pytest.mark.parametrize(
    "method, said",
    [
        ("tkad", "method: must be 'proxy_kd', .*did you mean 'takd'.*got \"tkad\""),
        ({"name": "tkad"}, "did you mean 'takd'"),
        ({}, "method: needs a name: one of proxy_kd, black_box_kd"),
        ({"lam": 1}, "method: needs a name"),
        (7, "method: .*got 7"),
        ({"name": "takd", "lamb": 1}, r"method\.lamb: unknown key; did you mean 'lam'"),
        ({"name": "takd", "beta": 1}, r"method\.beta: unknown key"),
        ({"name": "takd", "lam": "much"}, r"method\.lam: should be a valid number"),
    ],
)
def test_mistakes_are_sentences(method: Any, said: str):
    with pytest.raises(UserError, match=said):
        config_of(method)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        config_of({"name": "takd", "lam": 2}, distill={"epochs": 0})
    assert "method.lam" in str(caught.value) and "distill.epochs" in str(caught.value)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_method_has_a_recipe(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROXYKD_ASSETS", "/assets")
    recipe = "stories260k" if name == "proxy_kd" else name
    path = CONFIGS / f"{recipe}.yaml"
    assert load_config(path).method.name == name
    # The command in the recipe's head, for the paper's size, is a valid config too.
    given = re.findall(r"--set (\S+)", path.read_text())
    if given:
        large = load_config(CONFIGS / "llama2_70b_to_7b.yaml", given)
        assert (large.method.name, large.name) == (name, name)
