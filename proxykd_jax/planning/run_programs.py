"""The phases of a run and the programs that they compile, from the config alone."""

from __future__ import annotations

from proxykd_jax.baselines import method_of
from proxykd_jax.config import Config
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.training.abstract import Program
from proxykd_jax.training.alignment import alignment_phases
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
    by_name: dict[str, Program] = {}
    for program in found:
        by_name.setdefault(program.name, program)
    return list(by_name.values())
