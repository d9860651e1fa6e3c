"""Logits of every family are compared with transformers in PyTorch, in float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.losses import token_logps
from proxykd_jax.models import llama
from proxykd_jax.models.hf_weights import load_model, save_model

TOLERANCE = 1e-4  # maximal absolute difference at logits of about unit size


def test_logits_equal_transformers(each_reference, helpers):
    tokens_BL = helpers.tokens(1, 2, helpers.length)
    expected = each_reference.logits(tokens_BL)
    assert 0.5 < expected.std() < 2
    ours = llama.forward(each_reference.params, None, tokens_BL, config=each_reference.config)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - expected).max() < TOLERANCE


@pytest.mark.parametrize("case", ["llama3", "mistral_window", "qwen2_half_sliding_tied"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers(reference, helpers, case, side):
    model = reference(case)
    tokens_BL = helpers.tokens(2, 3, 30)
    lengths = [30, 21, 9]
    valid = np.zeros((3, 30), np.int64)
    for row, length in enumerate(lengths):
        valid[row, slice(30 - length, None) if side == "left" else slice(length)] = 1
    positions = np.maximum(np.cumsum(valid, 1) - 1, 0)
    expected = model.logits(tokens_BL, attention_mask=valid, position_ids=positions)
    ours = llama.forward(
        model.params,
        None,
        tokens_BL,
        config=model.config,
        positions_BL=jnp.asarray(positions, jnp.int32),
        segment_ids_BL=jnp.asarray(valid, jnp.int32),
    )
    assert np.abs(np.asarray(ours) - expected)[valid == 1].max() < TOLERANCE


def test_the_cases_need_what_they_name(reference, helpers):
    """At this length window, rope scaling and biases matter: without them parity must fail."""
    tokens_BL = helpers.tokens(1, 2, helpers.length)
    for case, change in {
        "mistral_window": {"sliding_layers": ()},
        "qwen3_biases_half_sliding_tied": {"sliding_layers": (0, 1, 2)},
        "llama3": {"rope": llama_rope("llama3", factor=1.0)},
        "qwen2": {"rope": llama_rope("default")},
        "llama_linear": {"rope": llama_rope("default")},
    }.items():
        model = reference(case)
        changed = model.config.replace(**change)
        ours = llama.forward(model.params, None, tokens_BL, config=changed)
        assert np.abs(ours - model.logits(tokens_BL)).max() > 100 * TOLERANCE, case


def llama_rope(kind, **fields):
    from proxykd_jax.models.config import RopeConfig

    return RopeConfig(kind=kind, original_max_positions=16, **fields)


def test_dynamic_scaling_is_refused_beyond_the_context(reference, helpers):
    model = reference("llama_dynamic")
    for call in (
        lambda: llama.hidden_states(
            model.params, None, helpers.tokens(0, 1, 65), config=model.config
        ),
        lambda: llama.init_cache(model.config, 1, 65),
    ):
        with pytest.raises(UserError, match="dynamic"):
            call()


@pytest.mark.parametrize("case", ["llama", "qwen2_half_sliding_tied"])
def test_cut_model_equals_transformers_with_as_many_layers(reference, helpers, tmp_path, case):
    import transformers

    model = reference(case)
    config, params = llama.first_layers(model.config, model.params, 2)
    reread, read_params = load_model(model.folder, first_layers=2)
    assert reread == config
    jax.tree.map(np.testing.assert_array_equal, params, read_params)

    hf_config = transformers.AutoConfig.from_pretrained(model.folder, num_hidden_layers=2)
    if hasattr(hf_config, "layer_types"):
        hf_config.layer_types = hf_config.layer_types[:2]
    cut = transformers.AutoModelForCausalLM.from_pretrained(model.folder, config=hf_config).eval()
    tokens_BL = helpers.tokens(3, 2, helpers.length)
    expected = helpers.torch_logits(cut, tokens_BL)
    assert (
        np.abs(llama.forward(params, None, tokens_BL, config=config) - expected).max() < TOLERANCE
    )

    save_model(tmp_path / "cut", config, params)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    np.testing.assert_allclose(helpers.torch_logits(loaded, tokens_BL), expected, atol=1e-6)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_a_cut_of_no_or_more_layers_is_refused(small_config, helpers, num_layers):
    with pytest.raises(UserError, match="first_layers"):
        llama.first_layers(small_config, helpers.params(small_config), num_layers)


def test_bfloat16_stays_near_float32(each_reference, helpers):
    tokens_BL = helpers.tokens(4, 2, helpers.length)
    config, params = load_model(each_reference.folder, dtype="bfloat16")
    ours = np.asarray(llama.forward(params, None, tokens_BL, config=config))
    expected = each_reference.logits(tokens_BL)
    # bfloat16 has eight bits of mantissa. Through three layers the error was 0.009 to 0.016.
    assert np.sqrt(np.mean((ours - expected) ** 2)) < 0.03


def greedy(params, config, prompt, steps):
    """The token ids after ``prompt``, by prefill and cached decoding."""
    cache = llama.init_cache(config, 1, len(prompt) + steps, jnp.float32)
    step = jax.jit(llama.forward_cached, static_argnames="config")
    tokens_BL, position, out = jnp.asarray([prompt]), 0, []
    for _ in range(steps):
        positions_BL = position + jnp.arange(tokens_BL.shape[1])[None]
        hidden_BLD, cache = step(
            params, None, tokens_BL, cache, config=config, positions_BL=positions_BL
        )
        position += tokens_BL.shape[1]
        tokens_BL = jnp.argmax(llama.unembed(params, hidden_BLD[:, -1:], config=config), axis=-1)
        out.append(int(tokens_BL[0, 0]))
    return out


def test_greedy_text_equals_transformers(reference):
    import torch

    model = reference("llama3")
    with torch.no_grad():
        expected = model.torch_model.generate(
            torch.tensor([[1, 5, 9]]), max_new_tokens=30, do_sample=False, eos_token_id=None
        )
    assert greedy(model.params, model.config, [1, 5, 9], 30) == expected[0, 3:].tolist()


def test_stories260k(assets, helpers):
    """Real weights have the right logits, greedy text from BOS, and NLL of whole stories."""
    import tokenizers
    import torch
    import transformers

    folder = assets / "models" / "stories260K"
    config, params = load_model(folder)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens_BL = helpers.tokens(5, 2, 200, config.vocab_size)
    expected = helpers.torch_logits(torch_model, tokens_BL)
    scale = max(1.0, float(expected.std()))
    difference = np.abs(llama.forward(params, None, tokens_BL, config=config) - expected).max()
    assert difference < TOLERANCE * scale

    ours = greedy(params, config, [1], 120)
    with torch.no_grad():
        theirs = torch_model.generate(
            torch.tensor([[1]]), max_new_tokens=120, do_sample=False, eos_token_id=None
        )
    assert ours == theirs[0, 1:].tolist()
    assert tokenizer.decode(ours).startswith(
        "Once upon a time, there was a little girl named Lily."
    )

    lines = (assets / "corpora" / "tinystories.jsonl").read_text().splitlines()[:6]
    stories = [
        tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids for line in lines
    ]
    tokens_BL = np.asarray([[1, *ids[:128]] for ids in stories], np.int32)
    logits_BLV = llama.forward(params, None, tokens_BL[:, :-1], config=config)
    logps_BL = token_logps(logits_BLV, tokens_BL[:, 1:])
    logits = torch.from_numpy(helpers.torch_logits(torch_model, tokens_BL))[:, :-1]
    labels = torch.from_numpy(tokens_BL[:, 1:].astype(np.int64))
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, 512), labels.reshape(-1)).item()
    assert abs(-float(logps_BL.mean()) - nll) < 1e-5
    assert 1.0 < nll < 2.0  # a model that knows no stories would have log 512 = 6.2
