"""Exported models in PyTorch: transformers and peft load the models that were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from proxykd_jax import align, distill
from proxykd_jax.artifacts import read_json, read_manifest, write_manifest
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.models.decoder import forward
from proxykd_jax.models.quantized import QuantizedKernel
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model
from proxykd_jax.training.restore import load_aligned_proxy, load_student
from tests.tiny_run import changed, copy_run, recipe

torch = pytest.importorskip("torch", reason="PyTorch is the reference that exports are read by")


def validation_rows(config: Config) -> list[Any]:
    split = open_corpus(config.folder / "corpus").split("validation")
    return split.read(range(len(split)))


_forward = jax.jit(forward, static_argnames="config")


def our_logits(model: Model, tokens_BL: np.ndarray) -> np.ndarray:
    logits = _forward(model.params, model.adapter, jnp.asarray(tokens_BL), config=model.config)
    return np.asarray(logits, np.float32)


def load_in_torch(folder: Path, dtype: Any = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def torch_logits(model: Any, tokens_BL: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens_BL, dtype=torch.long)).logits.float().numpy()


def some_tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab_size, (24, 16)).astype(np.int32)


def assert_same_model(folder: Path, model: Model, in_torch: Any = None) -> None:
    """Checks that logits are within 1e-4 of ours, and that ours have a wide range."""
    tokens_BL = some_tokens(model.config.vocab_size)
    ours = our_logits(model, tokens_BL)
    theirs = torch_logits(in_torch or load_in_torch(folder), tokens_BL)
    assert ours.std() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


@pytest.fixture(scope="module")
def student(finished_run: Config) -> Model:
    return load_student(finished_run, make_mesh(finished_run.mesh))


def test_the_exported_student_gives_our_logits(finished_run, student):
    assert_same_model(finished_run.folder / "export" / "student", student)
    before = load_student(finished_run, make_mesh(finished_run.mesh), 0)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_same_model(finished_run.folder / "export" / "student", before)


def assert_same_words(folder: Path, model: Model, end: int) -> None:
    """Checks that greedy answers to random prompts equal ours, token by token."""
    prompts_BP = some_tokens(end)[:, :5]
    ours = sample(
        model.weights,
        [Prompt(prompt_P, str(b), 7) for b, prompt_P in enumerate(prompts_BP)],
        config=model.config,
        settings=DrawSettings(0.0, 1.0, model.config.vocab_size, (end,)),
        seed=0,
        round_index=0,
    )
    prompts = torch.tensor(prompts_BP, dtype=torch.long)
    found_BT = load_in_torch(folder).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=7,
        pad_token_id=end + 1,
    )
    assert len({tuple(answer.tokens) for answer in ours}) >= 3
    for answer, row in zip(ours, found_BT[:, 5:].tolist(), strict=True):
        cut = row.index(end) + 1 if end in row else len(row)
        assert answer.tokens.tolist() == row[:cut]
        assert answer.finished == (end in row)


def test_the_exported_student_says_what_it_was_trained_to(finished_run, student):
    (end,) = open_corpus(finished_run.folder / "corpus").end_token_ids
    assert_same_words(finished_run.folder / "export" / "student", student, end)


def nll_in_torch(model: Any, rows: list[Any]) -> float:
    total, count = 0.0, 0
    for row in rows:
        logits = torch_logits(model, row.tokens[None])[0].astype(np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(row.prompt_length, len(row.tokens))
        total -= logps[places - 1, row.tokens[places]].sum()
        count += len(places)
    return total / count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_precision_with_its_validation_nll_beside(finished_run, tmp_path, capsys, dtype):
    config = changed(copy_run(finished_run, tmp_path), {"export": {"dtype": dtype}})
    shutil.rmtree(config.folder / "export")
    capsys.readouterr()
    distill.main(config)
    folder = config.folder / "export" / "student"
    exact = load_file(finished_run.folder / "export" / "student" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert exact.keys() == found.keys()
    for name, array in found.items():
        assert array.dtype.name == dtype
        np.testing.assert_array_equal(array, exact[name].astype(array.dtype))
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    nll = read_json(config.folder / "export" / "student.json")["validation_nll"]
    expected = f"export: student in {dtype}: validation NLL {nll['exported']:.4f}, as trained "
    assert f"{expected}{nll['trained']:.4f}\n" in capsys.readouterr().out
    rows = validation_rows(config)
    ours = nll_in_torch(load_in_torch(finished_run.folder / "export" / "student"), rows)
    assert nll["trained"] == pytest.approx(ours, abs=1e-5)
    if dtype == "float32":
        assert nll["exported"] == pytest.approx(nll["trained"], abs=1e-5)
    else:
        # The files are computed in bfloat16 as their config says: the measured difference is 0.002.
        assert 0 < abs(nll["exported"] - nll["trained"]) < 0.03


def test_tokenizer_files_are_the_tokenizers_byte_for_byte(finished_run, tiny_files):
    folder = finished_run.folder / "export" / "student"
    names = [path.name for path in (tiny_files / "tokenizer").iterdir()]
    assert len(names) >= 2
    for name in names:
        assert (folder / name).read_bytes() == (tiny_files / "tokenizer" / name).read_bytes()


def test_the_adapter_of_the_proxy_loads_with_peft(finished_run, tiny_files):
    from peft import PeftModel

    base = load_in_torch(tiny_files / "proxy")
    folder = finished_run.folder / "export" / "proxy_adapter"
    model = load_aligned_proxy(finished_run, make_mesh(finished_run.mesh))
    tokens_BL = some_tokens(model.config.vocab_size)
    # The adapter makes a large difference here.
    assert np.abs(torch_logits(base, tokens_BL) - our_logits(model, tokens_BL)).max() > 0.5
    assert_same_model(folder, model, PeftModel.from_pretrained(base, folder).eval())
    assert not (finished_run.folder / "export" / "proxy").exists()


@pytest.mark.parametrize("state", ["best", "last"])
def test_a_merged_proxy_is_a_model_of_its_own(finished_run, tmp_path, state, capsys):
    config = changed(copy_run(finished_run, tmp_path), {"export": {"proxy": "merged"}})
    config = changed(config, {"export": {"state": state}})
    manifest = read_manifest(config.folder / "proxy")
    # As if the run had become worse after its warm-up.
    write_manifest(config.folder / "proxy", {**manifest, "best_step": 2})
    align.main(config)
    step = {"best": 2, "last": manifest["last_step"]}[state]
    model = load_aligned_proxy(config, make_mesh(config.mesh), step)
    assert_same_model(config.folder / "export" / "proxy", model)
    if state == "last":
        (end,) = open_corpus(config.folder / "corpus").end_token_ids
        assert_same_words(config.folder / "export" / "proxy", model, end)
    assert "export: proxy in float32: validation NLL" in capsys.readouterr().out


def test_a_proxy_over_four_bits_is_aligned_and_merged_as_it_was_trained(tiny_files, tmp_path):
    """Runs all stages; the merged model has dequantised weights with the adapter merged in."""
    config = recipe(
        tiny_files,
        tmp_path,
        {"proxy": {"quantize": "nf4"}, "export": {"proxy": "merged"}},
        {"distill": {"max_steps": 2}},
    )
    distill.main(config)
    model = load_aligned_proxy(config, make_mesh(config.mesh))
    assert isinstance(model.params["layers"]["mlp"]["up_proj"]["kernel"], QuantizedKernel)
    assert_same_model(config.folder / "export" / "proxy", model)
    plain = changed(config, {"proxy": {"quantize": "none"}})
    with pytest.raises(UserError, match=r"proxy\.quantize"):
        align.main(plain)


def test_no_proxy_is_exported_where_none_is_asked_for(finished_run, tmp_path):
    config = changed(copy_run(finished_run, tmp_path), {"export": {"proxy": "none"}})
    shutil.rmtree(config.folder / "export")
    align.main(config)
    assert not (config.folder / "export").exists()


def test_a_student_with_an_adapter_comes_merged_and_as_an_adapter(tiny_files, tmp_path):
    from peft import PeftModel

    config = recipe(
        tiny_files,
        tmp_path,
        {"student": {"trainable": "lora", "lora": {"rank": 2}}},
        {"distill": {"alpha": 0.0, "max_steps": 2}},
    )
    distill.main(config)
    model = load_student(config, make_mesh(config.mesh))
    folder = config.folder / "export"
    assert_same_model(folder / "student", model)
    base = load_in_torch(tiny_files / "student")
    assert_same_model(
        folder / "student_adapter",
        model,
        PeftModel.from_pretrained(base, folder / "student_adapter").eval(),
    )


def test_no_adapter_is_written_of_a_model_that_was_cut(tiny_files, tmp_path, capfd):
    """It fits only the layers that were kept, and its base folder has more."""
    student = {"path": None, "init": {"path": str(tiny_files / "proxy"), "first_layers": 1}}
    config = recipe(
        tiny_files,
        tmp_path,
        {"student": {**student, "trainable": "lora", "lora": {"rank": 2}}},
        {"distill": {"alpha": 0.0, "max_steps": 2}},
    )
    distill.main(config)
    folder = config.folder / "export"
    assert_same_model(folder / "student", load_student(config, make_mesh(config.mesh)))
    assert not (folder / "student_adapter").exists()
    assert "no adapter of the student is written" in capfd.readouterr().out


def test_an_export_is_made_once(finished_run, tmp_path, monkeypatch):
    config = copy_run(finished_run, tmp_path)
    monkeypatch.setattr("proxykd_jax.training.exporting.save_model", None)
    distill.main(config)  # this writes nothing
    with pytest.raises(TypeError):
        distill.main(changed(config, {"export": {"dtype": "bfloat16"}}))
