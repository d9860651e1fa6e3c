"""The phases of a run and the programs that they compile, from the config alone."""

from __future__ import annotations

from collections.abc import Mapping

from proxykd_jax.baselines import method_of
from proxykd_jax.config import Config
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.training.abstract import Program, answering_program
from proxykd_jax.training.alignment import alignment_phases
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import sampling_program, scoring_program
from proxykd_jax.training.sketch import Corpus, sketch_run


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
