"""A round's references are the log-probs of the training step's own forward pass."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from proxykd_jax import align
from proxykd_jax.config import Config, PreferenceConfig, make_config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import LoraConfig
from proxykd_jax.models.hf_weights import load_model, save_model
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.params import flatten, init_params, is_linear, unflatten
from proxykd_jax.models.quantized import quantize
from proxykd_jax.training.batch_objectives import AlignObjective
from proxykd_jax.training.logprobs import pair_label_logps, pair_sums
from proxykd_jax.training.pairs import collate_pairs
from proxykd_jax.training.reference import (
    LN_2,
    check_first_dpo_loss,
    first_loss_tolerance,
    pair_logps,
)
from proxykd_jax.training.state import ModelSpec, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import Pairs
from tests.conftest import COMPILES_AS_USERS_DO, REPOSITORY
from tests.tiny_run import changed, log_lines, recipe

from .conftest import VOCAB, tiny_config

ROWS = 8
REMATS = ("none", "dots", "outputs", "full")
# dtype, remat, micro-batches, both answers in one row, kind of frozen weights
QUICK = [
    ("bfloat16", "none", 1, False, "plain"),
    ("bfloat16", "none", 2, True, "plain"),
    ("bfloat16", "none", 1, False, "nf4"),
    ("float32", "none", 1, True, "plain"),
]
BASES = ("plain", "int8", "nf4", "nothing")
# Every remat occurs with one row and with two rows a pair, in each precision; the rest alternates.
OTHERS = [
    ("bfloat16", remat, 1 + place % 2, place % 4 >= 2, BASES[place % 4])
    for place, remat in enumerate((*REMATS, *REMATS[2:], *REMATS[:2]))
] + [("float32", remat, 1, False, "plain") for remat in REMATS]


def made_model(base: str, dtype: str, remat: str) -> tuple[ModelSpec, dict, dict]:
    """Returns (spec, frozen, trainable) of a model whose log-probs show each rounding."""
    lora = None if base == "nothing" else LoraConfig(rank=4, alpha=8.0)
    config = tiny_config(lora).replace(
        model_dim=64, ffn_dim=128, head_dim=16, initializer_range=0.2, max_positions=256
    )
    spec = ModelSpec(config, "full" if lora is None else "lora", dtype, remat)
    params = init_params(jax.random.key(0), config)
    if lora is None:
        return spec, {}, params
    leaves = {}
    for path, leaf in flatten(params):
        leaf = leaf.astype(dtype)
        if base != "plain" and is_linear(path):
            layers = [quantize(kernel, method=base) for kernel in leaf]
            leaf = jax.tree.map(lambda *some: jnp.stack(some), *layers)
        leaves[path] = leaf
    adapter = init_adapter(jax.random.key(1), config)
    adapter = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapter
    )
    return spec, unflatten(leaves), adapter


def made_pairs(share_prompt: bool, references: tuple[np.ndarray, np.ndarray]) -> Pairs:
    rng = np.random.default_rng(0)
    pairs = []
    for row in range(ROWS):
        prompt = rng.integers(3, VOCAB, 9)
        rows = []
        for size in rng.integers(60, 110, 2):
            tokens = np.concatenate([prompt, rng.integers(3, VOCAB, size)]).astype(np.int32)
            rows.append(TokenRow(tokens, len(prompt), f"{row:064x}"))
        pairs.append(tuple(rows))
    planned = PlannedBatch(tuple((row,) for row in range(ROWS)), 256 if share_prompt else 128)
    return collate_pairs(pairs, planned, references, share_prompt=share_prompt)


def first_metrics(
    dtype: str,
    remat: str,
    microbatches: int,
    share_prompt: bool,
    base: str,
    logps_of: Callable[..., Any] = pair_logps,
) -> dict[str, float]:
    """Returns the metrics of a first step whose references the same model has just computed."""
    spec, frozen, trainable = made_model(base, dtype, remat)
    zeros = np.zeros(ROWS, np.float32)
    asked = made_pairs(share_prompt, (zeros, zeros))
    found = logps_of(frozen, trainable, asked, spec=spec, microbatches=microbatches)
    batch = made_pairs(share_prompt, tuple(np.asarray(x) for x in found))
    objective = AlignObjective(PreferenceConfig(loss="dpo", beta=1.0), "example_mean", 1.0, 1.0)
    optimizer = optax.sgd(0.05)
    step = make_train_step(spec, objective, optimizer, microbatches=microbatches, seed=0)
    state = init_state(jax.tree.map(jnp.copy, trainable), optimizer)
    return {k: float(v) for k, v in step(state, frozen, batch)[1].items()}


def check(*case) -> None:
    metrics = first_metrics(*case)
    # With beta 1 the rewards are nats per sequence.
    bound = 1e-3 if case[0] == "float32" else 0.0
    assert abs(metrics["reward_chosen"]) <= bound and abs(metrics["reward_rejected"]) <= bound
    assert metrics["preference"] == pytest.approx(LN_2, abs=1e-3)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_references_are_the_steps_own_log_probs(case) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_for_every_precision_remat_and_base(case) -> None:
    check(*case)


def test_the_plain_forward_pass_would_not_do() -> None:
    """It is off by tenths of a nat in bfloat16; otherwise the tests above would prove nothing."""

    @functools.partial(jax.jit, static_argnames=("spec", "microbatches"))
    def plain(frozen, trainable, batch, *, spec, microbatches):
        return pair_sums(pair_label_logps(*spec.bind(frozen, trainable), batch, spec), batch)

    metrics = first_metrics(*QUICK[0], logps_of=plain)
    assert abs(metrics["reward_chosen"]) + abs(metrics["reward_rejected"]) > 0.01


def test_the_tolerance_knows_precision_and_tokens() -> None:
    assert first_loss_tolerance("float32", beta=0.1, tokens=500) == pytest.approx(1e-3, abs=1e-6)
    bound = first_loss_tolerance("bfloat16", beta=0.1, tokens=400)
    assert bound == pytest.approx(1e-3 + 0.05 * 2**-7 * 20)
    spec = made_model("plain", "bfloat16", "none")[0]
    told = {"beta": 0.1, "tokens": 400.0, "folder": Path("samples/round_01")}
    check_first_dpo_loss(LN_2 + 0.99 * bound, spec, **told)
    for wrong in (LN_2 + 1.01 * bound, math.nan):
        with pytest.raises(UserError, match=r"400 tokens a pair.*Remove samples/round_01"):
            check_first_dpo_loss(wrong, spec, **told)


# --- whole runs -----------------------------------------------------------------------------------


def save_soon_ending(source: Path, folder: Path) -> None:
    """Changes the random model so that answers end early: 1,024 tokens each would take minutes."""
    config, params = load_model(source, dtype="float32")
    params["embed"]["embedding"] += 0.5
    kernel = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = kernel.at[:, config.eos_token_ids[0]].set(0.1)
    save_model(folder, config, params, source=source)


def readme_config(files: Path, folder: Path) -> tuple[Config, Path]:
    """Writes the README's first config, with files at the paths that it names."""
    readme = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    text = next(block for block in blocks if "\nproxy:" in block)
    data = yaml.safe_load(text)
    for role, name in (("proxy", "big-chat"), ("student", "small-chat")):
        assert data[role] == {"path": f"models/{name}"}
        save_soon_ending(files / role, folder / "models" / name)
    (source,) = data["corpus"]["sources"]
    rows = [json.loads(line) for line in (files / "teacher.jsonl").read_text().splitlines()]
    assert source == {"path": "gpt4_answers.jsonl"} and set(rows[0]) >= {"prompt", "response"}
    shutil.copy(files / "teacher.jsonl", folder / source["path"])
    path = folder / "run.yaml"
    path.write_text(text)
    return make_config(data), path


def first_losses(config: Config) -> list[float]:
    """Returns the first loss of each round of DPO."""
    lines = [line for line in log_lines(config, "align") if "preference" in line]
    firsts = {line["phase"]: line["preference"] for line in reversed(lines)}
    return [loss for phase, loss in firsts.items() if phase.startswith("round_")]


@pytest.mark.slow
def test_in_programs_as_users_compile_them(tmp_path) -> None:
    """XLA's fusions determine the rounding, and the other tests compile with flags of their own."""
    tests = [__file__, "-k", "own_log_probs or would_not_do"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        env=os.environ | COMPILES_AS_USERS_DO,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_readmes_config_at_its_defaults(tiny_files, tmp_path) -> None:
    """Runs the command, with programs as users compile them."""
    config, path = readme_config(tiny_files, tmp_path)
    assert (config.proxy.dtype, config.proxy.remat) == ("bfloat16", "none")
    done = subprocess.run(
        [sys.executable, "-m", "proxykd_jax.run", "--config", str(path)],
        env=os.environ | COMPILES_AS_USERS_DO | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Other libraries write nothing.
    assert re.fullmatch(r"((align|score|distill|evaluate): .*\n)*", done.stderr), done.stderr
    config = changed(config, {"runs_dir": str(tmp_path / config.runs_dir)})
    assert first_losses(config) == pytest.approx([LN_2] * config.align.num_rounds, abs=1e-3)
    assert (config.folder / "export" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "batching, share_prompt", [("pad", False), ("bucket", False), ("bucket", True), ("pack", True)]
)
def test_every_batching(tiny_files, tmp_path, batching, share_prompt) -> None:
    change = {
        "proxy": {"dtype": "bfloat16"},
        "align": {
            "batching": batching,
            "preference": {"share_prompt": share_prompt},
            "warmup_max_steps": 1,
            "num_rounds": 1,
            "round_max_steps": 1,
        },
    }
    config = recipe(tiny_files, tmp_path, change)
    align.main(config)
    assert first_losses(config) == pytest.approx([LN_2], abs=1e-3)
