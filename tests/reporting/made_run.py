"""Makes folders of runs without a model: corpus, store and manifests are real, figures invented.

The words of the tokenizer would break a page if they were not escaped.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax import prepare
from proxykd_jax.artifacts import complete_stage, open_stage, write_json
from proxykd_jax.config import Config, make_config
from proxykd_jax.data.corpus import TokenCorpus, open_corpus
from proxykd_jax.data.soft_labels import SoftLabels, SoftLabelWriter
from proxykd_jax.generation.samples import SampledRow, SampleStore
from proxykd_jax.training.metrics import MetricsLog

SCRIPT = "<script>alert(1)</script>"
IMAGE = "<img/src=x/onerror=alert(2)>"
WORDS = ("</s>", "<unk>", "Q:", SCRIPT, IMAGE, "&amp;", '"quoted"', "http://example.org/", "yes")
NAMES = (
    *("proxy_raw", "proxy_warmup", "proxy_round_01", "proxy_aligned"),
    *("student_before", "student"),
)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words, with a plain chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% else %}"
        "{% generation %}{{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def made_config(root: Path, name: str, changes: dict[str, Any]) -> Config:
    """A config for files in ``root``; missing files are made."""
    rows = root / "rows.jsonl"
    if not rows.exists():
        write_tokenizer(root / "model")
        rng = random.Random(0)
        words = WORDS[2:]
        lines = [
            {
                "prompt": " ".join(["Q:", *(rng.choice(words) for _ in range(4)), words[i % 5]]),
                "response": " ".join(rng.choice(words) for _ in range(1 + i % 4)),
            }
            for i in range(60)
        ]
        rows.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    model = {"path": str(root / "model")}
    return make_config(
        {
            "preset": "recommended",
            "name": name,
            "runs_dir": str(root / "runs"),
            "corpus": {
                "sources": [{"path": str(rows), "format": "prompt_response"}],
                "max_length": 16,
                "validation_rows": 1,
            },
            "proxy": model,
            "student": model,
            **changes,
        }
    )


def make_run(root: Path, name: str = "run", *, rounds: int = 3, seed: int = 0, **changes) -> Config:
    """A finished run below ``root``; ``changes`` are sections of its config."""
    config = made_config(root, name, changes)
    corpus = open_corpus(prepare.main(config).folder)
    rng = np.random.default_rng(seed)
    log = MetricsLog(config.folder / "metrics.jsonl")
    _align(config, corpus, log, rounds, rng)
    _soft_labels(config, corpus, rng)
    _distill(config, log, rng)
    write_json(config.folder / "eval" / "summary.json", summary(rng))
    arc = {"student": {"generate": {"tasks": {"arc": {"accuracy": 0.5, "se": 0.1, "n": 20}}}}}
    write_json(config.folder / "eval" / "benchmarks" / "summary.json", {"models": arc})
    _answers(config.folder / "eval" / "answers.jsonl")
    times = [
        {"stage": "prepare", "ended": "finished", "seconds": 30.0, "host": "h", "processes": 1},
        *({"stage": "align", "ended": ended, "seconds": 5385.0, "host": "h", "processes": 1,
           "device": "TPU v4", "devices": 8} for ended in ("stopped", "finished")),
    ]  # fmt: skip
    (config.folder / "times.jsonl").write_text("".join(json.dumps(t) + "\n" for t in times))
    return config


def _answers(path: Path) -> None:
    """Five prompts; no answer of the student ends."""
    lines = []
    for number in range(5):
        said = {"text": f"Q: {IMAGE} {number}", "tokens": 9, "digest": "x"}
        names = (("proxy_aligned", True), ("student_before", True), ("student", False))
        answers = {name: {**said, "finished": ended} for name, ended in names}
        teacher = {"text": f"the teacher's {number}", "tokens": 4}
        lines.append({"row_id": f"{number:064x}", "split": "test", "prompt": SCRIPT,
                      "teacher": teacher, "answers": answers})  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _align(config: Config, corpus: TokenCorpus, log: MetricsLog, rounds: int, rng: Any) -> None:
    step, results, best = 0, [], (math.inf, 0)
    for phase in ("raw", "warmup", *(f"round_{i:02d}" for i in range(1, rounds + 1))):
        for inside in range(0 if phase == "raw" else 6):
            step += 1
            nll = 2.4 * math.exp(-step / 60) + 0.6 + 0.1 * rng.normal()
            figures = {"loss": nll, "nll": nll, "grad_norm": 1 + 0.3 * rng.random()}
            if phase.startswith("round"):
                margin = 0.3 * inside + 0.2 * rng.random()
                figures |= {
                    "preference": math.log(2) * math.exp(-inside / 4),
                    "reward_margin": margin,
                    "reward_chosen": margin / 2,
                    "reward_rejected": -margin / 2,
                    "reward_accuracy": min(1.0, 0.5 + 0.1 * inside),
                }
            seconds = 9.0 if inside == 0 else 0.25 + 0.1 * rng.random()
            log.write("align", step, {**figures, "time/step_s": seconds}, phase=phase)
        held_out = {"nll": 2.0 * math.exp(-step / 50) + 0.9, "agreement": 0.7 - 0.4 / (1 + step)}
        log.write("align", step, {f"validation/{k}": v for k, v in held_out.items()}, phase=phase)
        best = min(best, (held_out["nll"], step))
        results.append({"phase": phase, "step": step})
        if phase.startswith("round"):
            counts = _sample(config, corpus, int(phase[-2:]), rng)
            after = {"after/reward_margin": 1.9, "after/reward_accuracy": 0.93}
            times = {"time/sampling_s": 12.0, "time/sampled_rows": 48}
            log.write("align", step, {**after, **counts, **times}, phase=phase)
    folder = config.folder / "proxy"
    open_stage(folder, "align", {}, {})
    complete_stage(
        folder, counts={"steps": step}, files=[], content="x", best_nll=best[0],
        best_step=best[1], last_step=step, kept_steps=[], results=results,
    )  # fmt: skip


def _sample(config: Config, corpus: TokenCorpus, number: int, rng: Any) -> dict[str, Any]:
    """Writes the answers of a round to its store; returns figures for the log."""
    store = SampleStore(config.folder / "samples" / f"round_{number:02d}")
    store.begin({"round": number}, {})
    split = corpus.split("align")
    rows = [
        SampledRow(place, split.row_ids[place], rng.integers(0, len(WORDS), 3).astype(np.int32),
                   place % 2 == 0, place % 3 if place < 3 else 0, -3.0)
        for place in range(min(5, len(split)))
    ]  # fmt: skip
    store.append(0, rows)
    places = np.arange(len(rows), dtype=np.int32)
    logps = -1 - rng.random((2, len(rows))).astype(np.float32)
    store.append_references(0, places, logps[0], logps[1])
    store.complete()
    return {f"samples/{name}": value for name, value in store.counts().items()}


def _soft_labels(config: Config, corpus: TokenCorpus, rng: Any) -> None:
    folder, top_k, figures = config.folder / "soft_labels", 3, {}
    settings = {
        "top_k": top_k, "temperature": 1.0, "store_dtype": "float32", "vocab_size": len(WORDS),
    }  # fmt: skip
    open_stage(folder, "score", settings, {})
    for split in ("warmup", "align", "distill"):
        rows = []
        for row in corpus.split(split):
            count = len(row.tokens) - row.prompt_length
            logps = np.log(np.tile([0.5, 0.3, 0.1], (count, 1)))
            ids = np.tile(np.arange(top_k), (count, 1)).astype(np.int32)
            gold = np.log(0.1 + 0.8 * rng.random(count)).astype(np.float32)
            tail = np.full(count, math.log(0.1), np.float32)
            rows.append(SoftLabels(row.row_id, ids, logps.astype(np.float32), gold, tail))
        writer = SoftLabelWriter(
            folder, split, vocab_size=len(WORDS), top_k=top_k, store_dtype="float32"
        )
        writer.commit(0, rows)
        figures[split] = {
            "rows": len(rows),
            "tokens": sum(len(row.gold_logps) for row in rows),
            "large_mass_share": 0.25,
            **{f"{kind}/loglik_mean": -2.5 for kind in ("sum", "token_mean")},
            **{f"{kind}/loglik_std": 0.75 for kind in ("sum", "token_mean")},
            **{f"{kind}/weight_length_correlation": -0.5 for kind in ("sum", "token_mean")},
        }
    complete_stage(folder, counts={}, figures=figures)


def _distill(config: Config, log: MetricsLog, rng: Any) -> None:
    log.write("distill", 0, {"validation/nll": 4.1, "validation/agreement": 0.1}, phase="untrained")
    figures = {"rows": 50, "planned_steps": 24, "weights/distill/mean": 1.0}
    log.write("distill", 0, figures, phase="untrained")
    best = (math.inf, 0)
    for step in range(1, 25):
        nll = 3 * math.exp(-step / 9) + 1 + 0.1 * rng.normal()
        values = {"loss": 2 * nll, "nll": nll, "kl": nll / 3, "weighted_kl": nll / 2.9,
                  "grad_norm": 1.0, "kl_to_nll": 0.3, "time/step_s": 0.125}  # fmt: skip
        log.write("distill", step, values, phase="train")
        if step % 4 == 0:
            held_out = 2.8 * math.exp(-step / 8) + 1.2 + 0.004 * step
            best = min(best, (held_out, step))
            values = {"validation/nll": held_out, "validation/agreement": 0.6 - 0.5 / step}
            log.write("distill", step, values, phase="train")
        if step % 8 == 0:
            shares = {"benchmark/arc": 0.25, "benchmark/gsm8k": step / 32}
            log.write("distill", step, {**shares, "time/periodic_s": 2.0}, phase="train")
    folder = config.folder / "student"
    open_stage(folder, "distill", {}, {})
    complete_stage(
        folder, counts={"steps": 24}, files=[], content="x", best_nll=best[0], best_step=best[1],
        last_step=24, kept_steps=[], results=[],
    )  # fmt: skip


def summary(rng: Any) -> dict[str, Any]:
    """The summary that evaluate would write, with invented figures."""

    def figures() -> dict[str, Any]:
        return {
            "n": 40,
            "tokens": 777,
            "nll": {"token_mean": 1 + rng.random(), "token_se": 0.01 + 0.01 * rng.random()},
            "agreement": {"token_mean": 0.4 + 0.3 * rng.random(), "token_se": 0.0123},
            "top_mass": {str(k): 1 - 0.5 / k for k in (1, 5, 10, 20, 50)},
            "calibration": {
                **{"ece": 0.0512, "ece_se": 0.0031, "confidence": 0.6543},
                "bins": [
                    {
                        "from": m / 3,
                        "to": (m + 1) / 3,
                        "tokens": 259,
                        "confidence": (m + 0.5) / 3,
                        "agreement": (m + 0.2) / 3,
                    }
                    for m in range(3)
                ],
            },
        }

    difference = {"nll": {"token_mean": -0.4321, "token_se": 0.0234},
                  "agreement": {"token_mean": 0.0765, "token_se": 0.0065}}  # fmt: skip
    apart = {"nll": {"token_mean": 0.01, "token_se": 0.02},
             "agreement": {"token_mean": 0.001, "token_se": 0.01}}  # fmt: skip
    return {
        "models": {name: {split: figures() for split in ("validation", "test")} for name in NAMES},
        "differences": {"proxy_aligned - proxy_raw": {"test": difference},
                        "student - student_before": {"test": difference},
                        "student - proxy_aligned": {"test": apart}},
    }  # fmt: skip
