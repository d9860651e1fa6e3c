"""The phases of a run and their programs, from its config alone."""

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
    """The phases of ``align`` (none where no proxy is used) and of ``distill``.

    Args:
      config: of the run.
      proxy, student: architectures, with ``lora`` set where an adapter is trained.
      corpus: whose rows are counted (default: one row a split).
    """
    found: dict[str, list[Phase]] = {"align": [], "distill": []}
    if config.needs != "nothing":
        found["align"] = alignment_phases(sketch_run("align", config, proxy, student, corpus))
    student_run = sketch_run("distill", config, proxy, student, corpus)
    found["distill"] = method_of(config).phases(student_run)
    return found


def run_programs(config: Config, proxy: ModelConfig, student: ModelConfig) -> list[Program]:
    """The programs of a run in the order of its stages, each once.

    Args:
      config: of the run.
      proxy, student: architectures, with ``lora`` set where an adapter is trained.
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
