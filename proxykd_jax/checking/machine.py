"""Whether a run fits this machine: disk, memory, time, and whether its models end their answers."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.shapes import CountedPhases
from proxykd_jax.config import Config, CorpusConfig
from proxykd_jax.data.soft_labels import ids_dtype
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.ahead import compiled_program
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.planning.run_programs import run_programs
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops
from proxykd_jax.texts.template import Renderer
from proxykd_jax.training.abstract import Lengths, Program, state_of
from proxykd_jax.training.draw_answers import make_draw
from proxykd_jax.training.model import load_for_training
from proxykd_jax.training.phase import Phase

_GIB = 1 << 30
# Checkpoints that are kept in addition to those of finished phases: the newest two and the best.
_OTHER_CHECKPOINTS = 3
# The share of a measured matrix product's speed that training steps reach (docs/speed.md).
_SHARE_OF_SPEED = 0.5
_SPEED_TRIES = 5
# Below this share of the memory nothing is compiled, because even a generous guess is far from it.
_FAR_BELOW = 0.25
_LOGITS = 6
_KEPT = {"none": 40, "dots": 20, "outputs": 4, "full": 1}
# Answers are drawn to see whether they end. A larger model takes minutes to load.
_ANSWERS, _ANSWER_TOKENS, _MOST_PARAMS = 8, 128, 1e9


def check_disk(
    config: Config,
    counted: CountedPhases,
    models: Mapping[str, ModelConfig | None],
    findings: Findings,
) -> None:
    """Compares what the run writes with what is free where it writes."""
    needed = {
        "checkpoints": _checkpoint_bytes(counted.taught),
        "soft labels": 0.0,
        "exports": 0.0,
    }
    if models["proxy"] is not None:
        needed["checkpoints"] += _checkpoint_bytes(counted.aligned)
    itemsize = jnp.dtype(config.export.dtype).itemsize
    for role, model in models.items():
        if model is not None and (role == "student" or config.export.proxy == "merged"):
            needed["exports"] += itemsize * model.num_params
    if config.needs == "labels" and models["student"] is not None:
        needed["soft labels"] = _label_bytes(config, counted, models["student"].vocab_size)
    folder = next(p for p in (config.folder, *config.folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    total = sum(needed.values())
    listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed.items())
    said = f"about {total / _GIB:.2f} GiB in {config.runs_dir} ({listed}); {free / _GIB:.0f} free"
    if total > free:
        text = f"{said}. Set runs_dir to a larger disk."
        findings.problems.append(f"disk: {text}") if findings.here else findings.warn("disk", text)
    else:
        findings.say("disk", said)


def _checkpoint_bytes(phases: list[Phase]) -> float:
    if not phases:
        return 0.0
    kept = sum(phase.keep for phase in phases) + _OTHER_CHECKPOINTS
    leaves = jax.tree.leaves(state_of(phases[0]))
    return kept * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _label_bytes(config: Config, counted: CountedPhases, vocab_size: int) -> float:
    score, corpus = config.score, counted.rows.corpus
    logp = jnp.dtype(score.store_dtype).itemsize
    a_token = score.top_k * (ids_dtype(vocab_size).itemsize + logp) + 2 * logp
    tokens = 0
    for name in ("distill", "fresh"):
        rows = corpus.split(name)
        tokens += int(rows.lengths.sum()) - int(rows.prompt_lengths.sum())
    return a_token * tokens


def check_machine(
    config: Config,
    proxy: ModelConfig,
    student: ModelConfig,
    counted: CountedPhases | None,
    findings: Findings,
) -> None:
    """Compiles the run's programs for this machine's devices: their memory, and the run's time."""
    devices = jax.devices()
    limit = memory_limit(devices[0])
    findings.say(
        "devices",
        f"{len(devices)} x {devices[0].device_kind}, {limit / _GIB:.1f} GiB of memory each",
    )
    peak, most = 0, ""
    for program in run_programs(config, proxy, student):
        model = student if program.work == "distill" else proxy
        needed = findings.attempt(
            f"mesh.{program.work}",
            functools.partial(_peak_bytes, config, program, model, limit * _FAR_BELOW),
        )
        if needed is not None and needed > peak:
            peak, most = needed, program.name
    if most:
        said = f"at most {peak / _GIB:.2f} GiB a device, in {most}"
        if peak < limit * _FAR_BELOW:
            findings.say("memory", f"far less than a device has (about {peak / _GIB:.1f} GiB)")
        elif peak > limit:
            findings.problems.append(
                f"memory: {said}, but a device has {limit / _GIB:.1f} GiB. Set microbatch_size or "
                "sampling.batch_size lower, remat: full, or quantize: nf4 for the proxy; "
                "proxykd plan --fit searches what fits."
            )
        else:
            findings.say("memory", said)
    if counted is not None and not findings.problems:
        _show_time(config, proxy, student, counted, findings)


def _peak_bytes(config: Config, program: Program, model: ModelConfig, enough: float) -> int:
    """Bytes that a device holds at most; the guess if that is less than ``enough``."""
    mesh = make_mesh(config.mesh.of(program.work))
    guess = guessed_bytes(config, program, model)
    if guess < enough:
        return guess
    found = [compiled_program(lowered) for lowered in program.lower(mesh, program.rows)]
    return program.resident(mesh) + max(one.peak_bytes for one in found)


def guessed_bytes(config: Config, program: Program, model: ModelConfig) -> int:
    """A generous guess at the bytes that a device holds, without compiling.

    Pairs put two answers into a row. Logits take a few float32 arrays of the vocabulary. A layer
    keeps a few dozen float32 arrays of the model's dimension, or its input alone with
    ``remat: full``; then one layer is computed anew at a time.
    """
    section = config.student if program.work == "distill" else config.proxy
    mesh = make_mesh(config.mesh.of(program.work))
    positions = program.rows * 2 * config.corpus.max_length // mesh.size
    kept = _KEPT[section.remat]
    layers = kept * model.num_layers + _KEPT["none"]
    a_position = _LOGITS * model.vocab_size + layers * model.model_dim
    held = program.held(dict(mesh.shape)) + program.resident(mesh)
    return held + 4 * positions * a_position


def memory_limit(device: jax.Device) -> float:
    """Bytes of a device's memory; of a CPU, all of the machine's."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit", float("inf")))


def _show_time(
    config: Config,
    proxy: ModelConfig,
    student: ModelConfig,
    counted: CountedPhases,
    findings: Findings,
) -> None:
    flops = 0.0
    for phase in (*counted.aligned, *counted.taught):
        if not phase.steps:
            continue
        lengths = _mean_lengths(phase)
        examples = len(phase.plan(0)[0].rows) * phase.steps
        for program in phase.programs(phase):
            flops += _flops(config, program, lengths) * examples * program.times
    whole = counted.rows.corpus.split("distill")
    for program in run_programs(config, proxy, student):
        if program.name == "score" and len(whole):
            lengths = Lengths(int(whole.prompt_lengths.mean()), _mean_answer(whole))
            flops += _flops(config, program, lengths) * len(whole)
    speed = _measured_speed(config.student.dtype) * len(jax.devices())
    hours = flops / (speed * _SHARE_OF_SPEED) / 3600
    shown = f"{hours:.1f} hours" if hours >= 1 else f"{max(60 * hours, 1):.0f} minutes"
    findings.say(
        "time",
        f"about {shown} of training, sampling and scoring on this machine, at half of the "
        f"{speed / 1e12:.2f} TFLOP/s that a matrix product reaches here; compiling comes on top",
    )


def _flops(config: Config, program: Program, lengths: Lengths) -> float:
    """Operations of a program for one row."""
    axes = dict(make_mesh(config.mesh.of(program.work)).shape)
    return program.cost(axes, program.rows, lengths).flops / program.rows


def _mean_lengths(phase: Phase) -> Lengths:
    return Lengths(int(phase.rows.prompt_lengths.mean()), _mean_answer(phase.rows))


def _mean_answer(rows: Any) -> int:
    return max(int((rows.lengths - rows.prompt_lengths).mean()), 1)


def _measured_speed(dtype: str) -> float:
    """Operations a second of a large matrix product on one device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    taken = []
    for _ in range(_SPEED_TRIES):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(taken)[_SPEED_TRIES // 2]


def check_ends(
    config: Config, present: CorpusConfig, renderer: Renderer, findings: Findings
) -> None:
    """Draws a few greedy answers of the untrained models, to see whether they end."""
    prompts = list(itertools.islice(_prompts(present, renderer), _ANSWERS))
    role = "student" if config.needs == "nothing" else "proxy"
    if prompts:
        findings.attempt(role, lambda: _draw(config, role, prompts, renderer, findings))


def _prompts(present: CorpusConfig, renderer: Renderer) -> Iterator[np.ndarray]:
    for source in present.sources:
        rows = read_source(source, prompts_only=False, drops=Drops())
        for row in itertools.islice(rows, _ANSWERS):
            (encoded,) = renderer.encode_batch([row], source)
            if encoded.drop is None and encoded.prompt_length:
                yield encoded.tokens[: encoded.prompt_length]


def _draw(
    config: Config, role: str, prompts: list[np.ndarray], renderer: Renderer, findings: Findings
) -> None:
    section = getattr(config, role)
    mesh = make_mesh(config.mesh.of("sample"))
    model = load_for_training(section, role=role, seed=config.seed, mesh=mesh)
    if model.config.num_params > _MOST_PARAMS and jax.default_backend() == "cpu":
        return
    settings = DrawSettings(0.0, 1.0, renderer.tokenizer.vocab_size, renderer.end_token_ids)
    draw = make_draw(
        model.config, model.weights, settings, mesh=mesh, seed=0, round_index=0, batch_size=_ANSWERS
    )
    names = [str(number) for number in range(len(prompts))]
    budget = min(_ANSWER_TOKENS, config.corpus.max_length)
    samples = draw(prompts, names, [budget] * len(prompts))
    ended = sum(sample.finished for sample in samples)
    ends = " or ".join(repr(renderer.tokenizer.decode([t])) for t in renderer.end_token_ids)
    said = f"{ended} of {len(samples)} greedy answers of the untrained {role} end with {ends}"
    if ended:
        findings.say("ends", f"{said} within {budget} tokens")
    else:
        findings.warn(
            "ends",
            f"{said} within {budget} tokens. A base model learns it in training; an instruct model "
            "ends its answers, so look at corpus.end_tokens and corpus.template.",
        )
