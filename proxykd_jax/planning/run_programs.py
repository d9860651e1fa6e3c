"""The phases of a run and the programs that they compile, from the config alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proxykd_jax.baselines import method_of
from proxykd_jax.config import Config
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.lora import merged_layer
from proxykd_jax.models.params import flatten, unflatten
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.training.abstract import (
    Cost,
    Program,
    answering_program,
    place,
    weights_read,
)
from proxykd_jax.training.alignment import alignment_phases
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import sampling_program, scoring_program
from proxykd_jax.training.sketch import Corpus, sketch_run
from proxykd_jax.training.stage_run import StageRun


def run_phases(
    config: Config, proxy: ModelConfig, student: ModelConfig, corpus: Corpus | None = None
) -> dict[str, list[Phase]]:
    """The phases of the stages ``align`` and ``distill``.

    Args:
      config: the config of the run.
      proxy, student: architectures, with ``lora`` set if an adapter is trained.
      corpus: the corpus whose rows give the number of steps (default: one row per split).

    Returns:
      The phases in order, under the keys ``align`` and ``distill``. ``align`` is empty if the run
      uses no proxy.

    Raises:
      UserError: a phase does not fit the corpus or the models.
    """
    found: dict[str, list[Phase]] = {"align": [], "distill": []}
    if config.needs != "nothing":
        found["align"] = alignment_phases(sketch_run("align", config, proxy, student, corpus))
    student_run = sketch_run("distill", config, proxy, student, corpus)
    found["distill"] = method_of(config).phases(student_run)
    return found


def run_programs(config: Config, proxy: ModelConfig, student: ModelConfig) -> list[Program]:
    """The programs of a run in the order of its stages; a name that occurs again is left out.

    Args:
      config: the config of the run.
      proxy, student: architectures, with ``lora`` set if an adapter is trained.

    Raises:
      UserError: as ``run_phases``.
    """
    phases = run_phases(config, proxy, student)
    found = [program for phase in phases["align"] for program in phase.programs(phase)]
    run = sketch_run("align", config, proxy, student)
    if config.method.proxy_answers or config.method.reads_scorer_text:
        found.append(sampling_program(run, run.model, None))
    if config.needs == "labels":
        found.append(scoring_program(run))
    found += [program for phase in phases["distill"] for program in phase.programs(phase)]
    taught = sketch_run("distill", config, proxy, student)
    if config.export.proxy == "merged" and config.needs != "nothing":
        found += merging_programs("export_proxy", run)
    found += benchmark_programs(config, {"proxy": run.model, "student": taught.model})
    by_name: dict[str, Program] = {}
    for program in found:
        by_name.setdefault(program.name, program)
    return list(by_name.values())


def benchmark_programs(config: Config, models: Mapping[str, Model]) -> list[Program]:
    """The programs with which the run's models answer its benchmarks, by generating.

    The longest prompts are assumed to have as many tokens as an answer may have.
    """
    benchmarks = config.evaluate.benchmarks
    if benchmarks is None or benchmarks.mode == "loglikelihood":
        return []
    asked = [name.rpartition("=")[2].partition(":")[0] for name in benchmarks.models]
    found = []
    for role, model in models.items():
        if role not in asked:
            continue
        spec = model.spec.config
        longest = min(2 * benchmarks.max_new_tokens, spec.max_positions)
        found.append(
            answering_program(
                f"ask_{role}",
                "evaluate",
                model,
                benchmarks.batch_size,
                budget=LengthBudget(longest, benchmarks.max_new_tokens),
                settings=DrawSettings(0.0, 1.0, spec.vocab_size, (0,)),
                resident=lambda mesh: 0,
            )
        )
    return found


def merging_programs(name: str, run: StageRun) -> list[Program]:
    """The merge of an adapter, tensor by tensor (``hf_weights.save_model``); none without one."""
    model = run.model
    params, adapter = model.weight_shapes
    if adapter is None:
        return []
    assert model.spec.config.lora is not None
    scale = model.spec.config.lora.scale
    kernels, factors = dict(flatten(params)), dict(flatten(adapter))
    merged = {path[:-1] for path in factors}

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        layer = jax.ShapeDtypeStruct((), jnp.int32)
        found = []
        for path in sorted(merged):
            parts = {"kernel": kernels[(*path, "kernel")], **{x: factors[(*path, x)] for x in "ab"}}
            tree = place(unflatten({(*path, key): leaf for key, leaf in parts.items()}), mesh)
            here = dict(flatten(tree))
            arguments = (here[(*path, key)] for key in ("kernel", "a", "b"))
            found.append(merged_layer.lower(*arguments, layer, scale=scale))
        return found

    def resident(mesh: Mesh) -> int:
        """The model without the largest kernel, which is among the arguments of its program."""
        axes = dict(mesh.shape)
        sizes = [
            bytes_per_device(unflatten({(*path, "kernel"): kernels[(*path, "kernel")]}), axes)
            for path in merged
        ]
        return bytes_per_device((params, adapter), axes) - max(sizes)

    moved = functools.partial(weights_read, model)
    return [
        Program(
            name,
            run.stage,
            model.spec.config.num_params,
            0,
            lower,
            lambda axes: bytes_per_device((params, adapter), axes),
            resident,
            lambda axes, rows, lengths: Cost(0.0, moved(axes)),
            lambda rows, lengths: (float(model.spec.config.num_layers),) * len(merged),
        )
    ]
