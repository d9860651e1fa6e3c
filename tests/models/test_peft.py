"""Adapters in PEFT's format: peft loads ours, and we load those of peft."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from proxykd_jax.errors import UserError
from proxykd_jax.models import llama
from proxykd_jax.models.config import LORA_TARGETS, LoraConfig
from proxykd_jax.models.peft import load_adapter, save_adapter


@pytest.mark.parametrize(
    "targets, rslora", [(LORA_TARGETS, False), (("q_proj", "down_proj"), True)]
)
def test_peft_gives_our_logits(reference, helpers, tmp_path, targets, rslora):
    import peft
    import transformers

    model = reference("qwen2")
    lora = LoraConfig(rank=4, alpha=8.0, targets=targets, rslora=rslora)
    config = model.config.replace(lora=lora)
    adapter = helpers.adapter(config)
    save_adapter(tmp_path / "adapter", adapter, config, str(model.folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(model.folder)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens_BL = helpers.tokens(0, 2, 24)
    ours = llama.forward(model.params, adapter, tokens_BL, config=config)
    assert np.abs(ours - helpers.torch_logits(loaded, tokens_BL)).max() < 1e-4
    assert np.abs(ours - model.logits(tokens_BL)).max() > 0.05

    found, back = load_adapter(tmp_path / "adapter", model.config)
    assert found == lora
    jax.tree.map(np.testing.assert_array_equal, back, adapter)


def test_an_adapter_of_pefts_gives_its_logits(reference, helpers, tmp_path):
    import peft
    import transformers

    model = reference("llama_biases_tied")
    base = transformers.AutoModelForCausalLM.from_pretrained(model.folder)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        lora_dropout=0.1,
        target_modules=r".*\.(o_proj|gate_proj|v_proj)",
        init_lora_weights=False,  # so that b is not zero
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    lora, adapter = load_adapter(tmp_path / "adapter", model.config)
    expected = LoraConfig(3, 12.0, targets=("v_proj", "o_proj", "gate_proj"), dropout=0.1)
    assert lora == expected
    tokens_BL = helpers.tokens(0, 2, 24)
    config = model.config.replace(lora=lora)
    ours = llama.forward(model.params, adapter, tokens_BL, config=config)
    logits = helpers.torch_logits(theirs, tokens_BL)
    assert np.abs(ours - logits).max() < 1e-4 * max(1.0, float(logits.std()))
    assert np.abs(logits - model.logits(tokens_BL)).max() > 0.05


@pytest.fixture
def folder(small_config, helpers, tmp_path):
    save_adapter(tmp_path / "adapter", helpers.adapter(small_config), small_config, "base")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "change, word",
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"r": None}, "r and lora_alpha"),
        ({"r": 5}, "rank 5"),
    ],
)
def test_other_kinds_of_adapter_are_refused(folder, small_config, change, word):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=word):
        load_adapter(folder, small_config)


def test_tensors_that_do_not_fit_are_refused(folder, small_config):
    with pytest.raises(UserError, match="the model has 4"):
        load_adapter(folder, small_config.replace(num_layers=4))
    with pytest.raises(UserError, match="has shape"):
        load_adapter(folder, small_config.replace(ffn_dim=50))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
    save_file(tensors, weights)
    with pytest.raises(UserError, match="lm_head"):
        load_adapter(folder, small_config)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled"):
        load_adapter(folder, small_config)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_adapter(folder, small_config)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_adapter(folder, small_config)


def test_an_adapter_of_another_shape_is_not_written(small_config, helpers, tmp_path):
    adapter = helpers.adapter(small_config)
    other = small_config.replace(lora=LoraConfig(rank=5))
    with pytest.raises(ValueError, match="shape"):
        save_adapter(tmp_path / "adapter", adapter, other, "base")
    assert not (tmp_path / "adapter").exists()
