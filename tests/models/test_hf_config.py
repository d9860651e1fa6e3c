"""config.json in its old and new spellings, and what is refused."""

import json

import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.models.config import LoraConfig, ModelConfig, RopeConfig
from proxykd_jax.models.hf_config import read_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KEYS = (
    "hidden_size",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "tie_word_embeddings",
    "sliding_window",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
)


def test_every_case_survives_both_directions(helpers, reference):
    """Our writer keeps every key, and transformers reads the same model from the file."""
    import transformers

    for case in helpers.cases:
        model = reference(case)
        assert ModelConfig.from_hf(model.config.to_hf()) == model.config
        record = model.config.to_hf(dtype="bfloat16")
        new = transformers.AutoConfig.for_model(**json.loads(json.dumps(record)))
        assert str(new.dtype).endswith("bfloat16")
        old = model.torch_model.config
        assert new.head_dim == (getattr(old, "head_dim", None) or 8)
        for key in KEYS:
            assert getattr(new, key, None) == getattr(old, key, None), (case, key)
        assert new.rope_parameters == {**new.rope_parameters, **old.rope_parameters}, case


def test_old_and_new_spellings_are_one_model():
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    new = {**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"}
    both = {**old, **new}
    config = ModelConfig.from_hf(old)
    assert config == ModelConfig.from_hf(new) == ModelConfig.from_hf(both)
    assert config.rope == RopeConfig(
        theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192
    )


def test_a_reader_that_knows_only_the_old_keys_gets_them_all():
    record = ModelConfig.from_hf({**LLAMA, "rope_scaling": LLAMA3, "rope_theta": 5e5}).to_hf()
    for key in ("rope_parameters", "dtype"):
        del record[key]
    assert ModelConfig.from_hf(record).rope.kind == "llama3"
    assert record["torch_dtype"] == "float32" and record["rope_theta"] == 5e5
    linear = ModelConfig.from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.to_hf()["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_absent_keys_take_the_defaults_of_transformers():
    import transformers

    sizes = {key: LLAMA[key] for key in list(LLAMA)[2:]}
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        ours = ModelConfig.from_hf({"model_type": family, **sizes, "num_key_value_heads": 2})
        theirs = transformers.AutoConfig.for_model(family, **sizes, num_key_value_heads=2)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32 // 4)
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.sliding_window == (theirs.sliding_window if family == "mistral" else None)
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.bos_token_id == theirs.bos_token_id
        assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (2,))
        assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ModelConfig.from_hf(LLAMA).num_kv_heads == 4  # Llama 1 files do not have the key


def test_several_end_tokens():
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    assert ModelConfig.from_hf({**LLAMA, "eos_token_id": [2, 7]}).to_hf()["eos_token_id"] == [2, 7]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "gpt2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
            },
            "contradict",
        ),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"num_key_value_heads": 3}, "multiple"),
        (
            {
                "model_type": "qwen2",
                "architectures": None,
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "layer_types",
        ),
    ],
)
def test_what_is_not_supported_is_named(change, word):
    with pytest.raises(UserError, match=word):
        ModelConfig.from_hf({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"family": "mistral", "qkv_bias": True},
        {"family": "qwen2"},
        {"family": "llama", "qkv_bias": True},
        {"family": "llama", "sliding_window": 4, "sliding_layers": (0,)},
        {"family": "qwen3"},
        {"family": "mistral", "mlp_bias": True},
        {"family": "mistral", "sliding_window": 4, "sliding_layers": (0,)},
    ],
)
def test_a_model_without_hugging_face_form_is_not_written(change):
    with pytest.raises(UserError, match="cannot have"):
        ModelConfig.from_hf(LLAMA).replace(**change).to_hf()


def test_read_config_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(UserError, match="JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json.*bert"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    lora = LoraConfig(rank=2)
    assert read_config(tmp_path, lora=lora) == read_config(tmp_path / "config.json", lora=lora)


def test_configs_are_static_under_jit():
    config = ModelConfig.from_hf(LLAMA, lora=LoraConfig())
    assert hash(config) == hash(ModelConfig.from_hf(dict(LLAMA), lora=LoraConfig()))
    assert config.num_params == 97 * 32 * 2 + 32 + 3 * (4 * 32 * 32 + 3 * 32 * 48 + 64)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"family": "gpt"}, "family"),
        ({"num_layers": 0}, "num_layers"),
        ({"head_dim": 7}, "even"),
        ({"sliding_layers": (1,)}, "sliding_window"),
        ({"sliding_layers": (3,), "sliding_window": 4}, "sliding_layers"),
    ],
)
def test_impossible_models_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        ModelConfig.from_hf(LLAMA).replace(**change)
