"""Model folders from strangers: every wrong value is a sentence, before anything is allocated."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.hf_config import config_from_hf, read_config
from proxykd_jax.models.peft import load_adapter
from proxykd_jax.models.tensor_files import TensorFile, weight_files

GOOD = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor")
WHOLE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "eos_token_id"),
    *("bos_token_id", "pad_token_id"),
)
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


@pytest.mark.parametrize(
    "keys, values",
    [
        (NUMBERS, ("text", [1.0], {"a": 1}, True, float("nan"), float("inf"), 10**400, -(10**400))),
        (WHOLE, ("7", 7.5, [[7]], {"a": 1}, True, 10**13, 10**5000)),
        (FLAGS, ("false", 1, [], {})),
        (("architectures",), (7, {"a": 1}, [7], [["LlamaForCausalLM"]], ["Other"])),
        (("model_type",), (7, ["llama"], {"a": 1}, "other", "")),
        (("hidden_act",), (7, ["silu"], "gelu")),
        (("rope_scaling", "rope_parameters"), ("linear", 7, ["linear"], {"rope_type": 7})),
        (("rms_norm_eps", "initializer_range"), (-1e-6,)),
        (("rope_theta",), (0, -5.0)),
        (("num_hidden_layers",), (0, -2, 10**9, 10_001)),
        (("vocab_size", "hidden_size"), (0, -4)),
    ],
)
def test_values_of_a_config_that_are_refused(keys, values):
    for key in keys:
        for value in values:
            with pytest.raises(UserError) as caught:
                config_from_hf({**GOOD, key: value})
            assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("value", ["x", [2], True, float("nan"), float("inf"), 0, -2.0, 10**400])
def test_factors_of_rope_that_are_refused(kind, value):
    scaling = {"rope_type": kind, "factor": value, "low_freq_factor": 1, "high_freq_factor": 4}
    with pytest.raises(UserError):
        config_from_hf({**GOOD, "rope_scaling": scaling})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": None},
        {"rms_norm_eps": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None},
        {"tie_word_embeddings": None},
        {"eos_token_id": [1, 2]},
        {"pad_token_id": -1},
        {"model_type": None, "architectures": ["LlamaForCausalLM"]},
    ],
)
def test_values_of_a_config_that_stand_for_the_default(change):
    assert config_from_hf({**GOOD, **change}).family == "llama"


def test_a_model_beyond_all_models_is_refused():
    with pytest.raises(UserError, match="no real model"):
        ModelConfig("llama", 2**31 - 1, 1000, 2**30, 2**30, 4, 4, 2**28)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 90_000, '{"a":' * 90_000, "\ud800"])
def test_json_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "name",
    [".", "..", "", "a", "a.bin", "../b.safetensors", "/b.safetensors", "\0.safetensors", 7, None],
)
def test_names_of_files_in_an_index_that_are_refused(tmp_path, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="refused"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 9000]
)
def test_an_index_of_another_form(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        weight_files(tmp_path)


def test_a_pipe_or_a_folder_holds_no_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            TensorFile(path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="pipe"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [
        *(("r", value) for value in ("4", 4.0, True, None, 0, -1, 10**12, [4])),
        *(("lora_alpha", value) for value in ("8", None, True, float("nan"), 10**400, [8])),
        *(("lora_dropout", value) for value in ("0", 5, -1, float("inf"))),
        ("use_rslora", "no"),
    ],
)
def test_values_of_an_adapter_that_are_refused(tmp_path, key, value):
    from safetensors.numpy import save_file

    config = config_from_hf(GOOD)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (4, config.model_dim), "B": (config.model_dim, 4)}
    tensors = {
        name.format(layer, letter): np.ones(shape, np.float32)
        for layer in range(config.num_layers)
        for letter, shape in shapes.items()
    }
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    record = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    load_adapter(tmp_path, config)
    text = json.dumps({**record, key: None}).replace(f'"{key}": null', f'"{key}": @')
    (tmp_path / "adapter_config.json").write_text(text.replace("@", json.dumps(value)))
    with pytest.raises(UserError):
        load_adapter(tmp_path, config)
