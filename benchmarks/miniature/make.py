"""Writes the files of a miniature: two models, a teacher's answers, prompts and recipes.

    python -m benchmarks.miniature.make --out runs/demo/miniature [--regime fmt] [--seed 0]

The folder then holds:

    proxy/ student/      Hugging Face model folders with a tokenizer, pre-trained on public text
    teacher.jsonl        prompts with one sampled answer of the teacher each: the corpus
    test.jsonl           the same for prompts that occur nowhere else
    fresh.jsonl          prompts without answers
    teacher_logps/       the teacher's exact next-token log-probs on the test rows, which only
                         the evaluator reads
    configs/             a recipe for each student
    made.json            seed, regime, counts and seconds
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import exit_code
from benchmarks.miniature import world as w
from benchmarks.miniature.recipes import write_recipes
from proxykd_jax.artifacts import read_json, write_bytes, write_json
from proxykd_jax.errors import UserError

NUM_CORPUS, NUM_TEST, NUM_FRESH = 2200, 768, 2700
MADE = "made.json"


def make(
    out: Path,
    *,
    seed: int = 0,
    regime: str = "fmt",
    steps_share: float = 1.0,
    num_corpus: int = NUM_CORPUS,
    num_test: int = NUM_TEST,
    num_fresh: int = NUM_FRESH,
) -> dict[str, Any]:
    """Writes all files, unless they are there already.

    Args:
      out: the folder.
      seed: the seed of worlds, prompts, answers, initialisation and public text.
      regime: a name in ``world.REGIMES``.
      steps_share: a share below 1 shortens pre-training, for tests.
      num_corpus, num_test, num_fresh: the number of prompts of each kind.

    Returns:
      What ``made.json`` holds.

    Raises:
      UserError: the regime is unknown, or the folder was made with other settings.
    """
    if regime not in w.REGIMES:
        raise UserError(f"regime {regime!r} is none of {', '.join(w.REGIMES)}.")
    settings = {
        "seed": seed,
        "regime": regime,
        "steps_share": steps_share,
        "rows": {"corpus": num_corpus, "test": num_test, "fresh": num_fresh},
    }
    if (out / MADE).exists():
        made = read_json(out / MADE)
        if made["settings"] != settings:
            raise UserError(
                f"{out} was made with {made['settings']}, not {settings}. Choose another folder "
                "or remove it."
            )
        return made
    started = time.perf_counter()
    worlds = w.make_worlds(seed, regime)
    pool = w.PromptPool(seed)
    test_NP, corpus_NP, fresh_NP = (pool.take(n) for n in (num_test, num_corpus, num_fresh))
    rng = np.random.Generator(np.random.PCG64([seed, 4]))
    test_NT = w.sample_answers(worlds.teacher, test_NP, rng)
    corpus_NT = w.sample_answers(worlds.teacher, corpus_NP, rng)
    write_rows(out / "teacher.jsonl", corpus_NP, corpus_NT)
    write_rows(out / "test.jsonl", test_NP, test_NT)
    write_rows(out / "fresh.jsonl", fresh_NP, None)
    write_teacher(out / "teacher_logps", worlds.teacher, test_NP, test_NT)
    write_recipes(out)
    _write_models(out, worlds.public, seed, regime, steps_share, w.encode_prompts(test_NP))
    made = {
        "settings": settings,
        "teacher_greedy_accuracy": float(w.greedy_correct(worlds, test_NP).mean()),
        "seconds": time.perf_counter() - started,
    }
    write_json(out / MADE, made)
    return made


def write_rows(path: Path, prompts_NP: np.ndarray, answers_NT: np.ndarray | None) -> None:
    """Writes a JSONL of ``{"prompt", "response"}``, or of prompts alone."""
    lines: Iterable[dict[str, str]]
    if answers_NT is None:
        lines = ({"prompt": w.to_text(prompt)} for prompt in prompts_NP)
    else:
        # The template writes the end token.
        ends = w.answer_lengths(answers_NT) - 1
        lines = (
            {"prompt": w.to_text(prompt), "response": w.to_text(answer[:end])}
            for prompt, answer, end in zip(prompts_NP, answers_NT, ends, strict=True)
        )
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def write_teacher(
    folder: Path, world: w.World, prompts_NP: np.ndarray, answers_NT: np.ndarray
) -> None:
    """Writes the teacher's distribution, as ``evaluate.teacher_logps`` reads it."""
    from proxykd_jax.evaluation.exact_teacher import write_teacher_logps

    lengths = w.answer_lengths(answers_NT)
    probs_NTV = w.answer_probs(world, prompts_NP, answers_NT)
    with np.errstate(divide="ignore"):
        logps_NTV = np.log(probs_NTV)
    write_teacher_logps(
        folder,
        tokens=[
            np.concatenate([prompt, answer[:length]])
            for prompt, answer, length in zip(prompts_NP, answers_NT, lengths, strict=True)
        ],
        prompt_lengths=[w.PROMPT_LENGTH] * len(prompts_NP),
        logps=[logps[:length] for logps, length in zip(logps_NTV, lengths, strict=True)],
    )


def _write_models(
    out: Path, public: w.World, seed: int, regime: str, share: float, excluded: np.ndarray
) -> None:
    from benchmarks.miniature import pretrain
    from proxykd_jax.models.hf_weights import save_model

    tokenizer = out / "tokenizer"
    pretrain.write_tokenizer(tokenizer)
    plans = (
        ("proxy", pretrain.PROXY, pretrain.PROXY_STEPS, pretrain.PROXY_RATE),
        ("student", pretrain.STUDENT, w.REGIMES[regime].student_steps, pretrain.STUDENT_RATE),
    )
    for index, (name, config, steps, rate) in enumerate(plans):
        steps = max(round(steps * share / pretrain.STEPS_A_CALL), 1) * pretrain.STEPS_A_CALL
        print(f"pre-training the {name} ({config.num_params:,} parameters, {steps} steps)")
        params = pretrain.pretrain(
            config,
            public,
            seed=2 * seed + index,
            num_steps=steps,
            learning_rate=rate,
            excluded=excluded,
            log=lambda line: print(f"  {line}", flush=True),
        )
        save_model(out / name, config, params, source=tokenizer, overwrite=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.make",
        description="Pre-train a tiny proxy and student and write a teacher's answers.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--regime", default="fmt", help=f"one of {', '.join(w.REGIMES)}")
    parser.add_argument("--seed", type=int, default=0, help="the seed of everything")
    arguments = parser.parse_args(argv)

    def work() -> None:
        made = make(arguments.out, seed=arguments.seed, regime=arguments.regime)
        print(f"{arguments.out}: made in {made['seconds']:.0f} s")

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
