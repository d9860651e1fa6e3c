"""The recipes for a laptop run on real weights and real answers, with few steps."""

import json
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax import run
from proxykd_jax.config import load_config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.models.hf_weights import load_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NEW_TOKENS = 80


def read_metrics(config) -> list[dict]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").open()]


@pytest.mark.slow
def test_the_papers_preset_runs_through_on_a_bfloat16_base(assets, tmp_path, monkeypatch):
    """The stories have many lengths: in bfloat16 a log-prob depends on the shape of its batch."""
    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    short = ["corpus.max_rows=64", "align.num_rounds=2", "align.sampling.max_new_tokens=96"]
    config = load_config(CONFIGS / "tiny.yaml", [f"runs_dir={tmp_path}", *short])
    assert config.proxy.dtype == "bfloat16"
    run.main(config)

    lines = [line for line in read_metrics(config) if "preference" in line]
    first = {line["phase"]: line["preference"] for line in reversed(lines)}
    assert set(first) == {f"round_{i:02d}" for i in (1, 2)}
    np.testing.assert_allclose(list(first.values()), np.log(2), atol=1e-4)
    assert (config.folder / "export" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_stories260k_gives_a_student_that_transformers_continues_alike(
    assets, tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("PROXYKD_ASSETS", str(assets))
    short = [
        "corpus.max_rows=160",
        "align.num_rounds=1",
        "align.sampling.max_new_tokens=96",
        "distill.max_steps=24",
        "distill.epochs=9",
    ]
    config = load_config(CONFIGS / "stories260k.yaml", [f"runs_dir={tmp_path}", *short])
    run.main(config)

    corpus = open_corpus(config.folder / "corpus")
    assert sum(len(corpus.split(n)) for n in ("warmup", "align", "distill", "validation")) == 160
    lines = read_metrics(config)
    losses = [line["preference"] for line in lines if "preference" in line]
    assert abs(losses[0] - np.log(2)) < 1e-3 and losses[-1] < losses[0]
    held_out = [
        line["validation/nll"]
        for line in lines
        if line["stage"] == "distill" and "validation/nll" in line
    ]
    assert held_out[-1] < held_out[0] - 0.5

    rows = corpus.split("validation").read(range(8))
    folder = config.folder / "export" / "student"
    model_config, params = load_model(folder, dtype="float32")
    prompts = [row.prompt for row in rows]
    ours = sample(
        (params, None),
        [Prompt(prompt, row.row_id, NEW_TOKENS) for prompt, row in zip(prompts, rows, strict=True)],
        config=model_config,
        settings=DrawSettings(0.0, 1.0, model_config.vocab_size, corpus.end_token_ids),
        seed=0,
        round_index=0,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(corpus.end_token_ids),
            pad_token_id=0,
        )
        np.testing.assert_array_equal(out[0, len(prompt) :].numpy(), answer.tokens)
