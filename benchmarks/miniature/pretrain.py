"""Pre-trains the tiny proxy and student on the public text, and writes their tokenizer."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.miniature import world as w
from proxykd_jax.losses import nll, token_logps
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.llama import forward
from proxykd_jax.models.params import init_params

BATCH_SIZE = 64
PROXY_STEPS, PROXY_RATE, STUDENT_RATE = 1750, 4e-3, 5e-3
LAST_SHARE, LAST_FACTOR = 0.2, 0.2  # The last fifth of the steps has a fifth of the rate.
STEPS_A_CALL = 50

# Each symbol is a word, and the tokenizer drops the spaces between words. {% generation %} marks
# the answer's tokens. It must begin at a token, so the space stands before it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' }}{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def model_config(model_dim: int, ffn_dim: int, num_layers: int = 2) -> ModelConfig:
    """A Llama of the miniature's vocabulary, whose heads have 16 dimensions."""
    return ModelConfig(
        family="llama",
        vocab_size=w.VOCAB_SIZE,
        num_layers=num_layers,
        model_dim=model_dim,
        ffn_dim=ffn_dim,
        num_heads=model_dim // 16,
        num_kv_heads=model_dim // 16,
        head_dim=16,
        norm_eps=1e-6,
        max_positions=32,
        eos_token_ids=(w.END,),
        pad_token_id=w.UNKNOWN,
        initializer_range=0.1,
    )


PROXY = model_config(64, 168)  # 103,488 parameters
STUDENT = model_config(32, 88)  # 28,192 parameters


def public_rows(
    world: w.World, rng: np.random.Generator, count: int, excluded: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws ``[count, P + 7]`` prompts with answers, and which labels are answers."""
    prompts_NP = w.random_prompts(rng, count, excluded)
    answers_NT = w.sample_answers(world, prompts_NP, rng)
    rows = np.concatenate([prompts_NP, answers_NT], axis=1)
    place = np.arange(1, rows.shape[1])[None, :] - w.PROMPT_LENGTH
    mask = (place >= 0) & (place < w.answer_lengths(answers_NT)[:, None])
    return rows, mask


OverSeeds = Callable[[Callable[..., Any]], Callable[..., Any]]


def _all_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = jax.jit(jax.vmap(function))
    return compiled


@functools.lru_cache(maxsize=8)
def _training(
    config: ModelConfig, num_steps: int, learning_rate: float, over_seeds: OverSeeds
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer, and a function ``(state, rows_SZBT, mask_SZBL) -> (state, losses_SZ)``."""
    last = round(num_steps * (1 - LAST_SHARE))
    schedule = optax.join_schedules(
        [
            optax.constant_schedule(learning_rate),
            optax.constant_schedule(LAST_FACTOR * learning_rate),
        ],
        [last],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    def loss_of(params: Any, rows_BT: jax.Array, mask_BL: jax.Array) -> jax.Array:
        logits_BLV = forward(params, None, rows_BT[:, :-1], config=config)
        nll_B = nll(token_logps(logits_BLV, rows_BT[:, 1:]), mask_BL, reduction="sum")
        return nll_B.sum() / mask_BL.sum()

    def train(state: Any, rows_ZBT: jax.Array, mask_ZBL: jax.Array) -> tuple[Any, jax.Array]:
        def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, optimizer_state = state
            loss, gradient = jax.value_and_grad(loss_of)(params, *batch)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), loss

        return jax.lax.scan(step, state, (rows_ZBT, mask_ZBL))

    return optimizer, over_seeds(train)


def pretrain(
    config: ModelConfig,
    world: w.World,
    *,
    seed: int,
    num_steps: int,
    learning_rate: float,
    excluded: np.ndarray,
    log: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Pre-trains a model of one seed as ``pretrain_seeds`` does."""
    params_S: dict[str, Any] = pretrain_seeds(
        config,
        [world],
        seeds=[seed],
        num_steps=num_steps,
        learning_rate=learning_rate,
        excluded=[excluded],
        log=log,
    )
    return jax.tree.map(lambda x: x[0], params_S)


def pretrain_seeds(
    config: ModelConfig,
    worlds: Sequence[w.World],
    *,
    seeds: Sequence[int],
    num_steps: int,
    learning_rate: float,
    excluded: Sequence[np.ndarray],
    log: Callable[[str], Any] = lambda line: None,
    over_seeds: OverSeeds = _all_at_once,
) -> Any:
    """Trains a model of every seed on batches of fresh public text.

    Args:
      config: the model.
      worlds: the public text of each seed.
      seeds: the seeds of initialisation and text.
      num_steps: a multiple of 50, so that one program serves all calls.
      learning_rate: the rate of Adam; the last fifth of the steps has a fifth of it.
      excluded: for each seed ``encode_prompts`` of prompts that must not occur.
      log: takes lines with the mean loss.
      over_seeds: turns a function of one seed into a compiled function of all seeds.

    Returns:
      The parameters, with a leading axis S.

    Raises:
      ValueError: num_steps is not a multiple of 50.
    """
    if num_steps % STEPS_A_CALL:
        raise ValueError(f"num_steps must be a multiple of {STEPS_A_CALL}, got {num_steps}")
    rngs = [np.random.Generator(np.random.PCG64([seed, 3])) for seed in seeds]
    optimizer, train_S = _training(config, num_steps, learning_rate, over_seeds)
    firsts = [init_params(jax.random.key(seed), config) for seed in seeds]
    params_S = jax.tree.map(lambda *leaves: jnp.stack(leaves), *firsts)
    state_S = (params_S, jax.vmap(optimizer.init)(params_S))
    for done in range(0, num_steps, STEPS_A_CALL):
        drawn = [
            public_rows(world, rng, STEPS_A_CALL * BATCH_SIZE, out)
            for world, rng, out in zip(worlds, rngs, excluded, strict=True)
        ]
        rows_SZBT, mask_SZBL = (
            np.stack(arrays).reshape(len(seeds), STEPS_A_CALL, BATCH_SIZE, -1)
            for arrays in zip(*drawn, strict=True)
        )
        state_S, losses_SZ = train_S(state_S, rows_SZBT, mask_SZBL)
        if (done // STEPS_A_CALL) % 7 == 6 or done + STEPS_A_CALL == num_steps:
            log(f"step {done + STEPS_A_CALL}: loss {float(losses_SZ.mean()):.3f} nat a token")
    return state_S[0]


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer folder: ``tokenizer.json`` and ``tokenizer_config.json``."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    ids = {symbol: index for index, symbol in enumerate(w.SYMBOLS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [AddedToken(text, special=True, normalized=False) for text in ("</s>", "<unk>")]
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "model_max_length": 32,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=1)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
