"""The checks of a run: ``--dry-run``, ``check``, and the quick ones at the start of ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxykd_jax.checking.endpoints import check_benchmarks, check_server
from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.machine import check_disk, check_ends, check_machine
from proxykd_jax.checking.models import check_model, check_tokenizers
from proxykd_jax.checking.rows import count_rows, judge_counts, present_sources, quick_sample
from proxykd_jax.checking.shapes import check_mesh, check_shapes, count_phases, show_steps
from proxykd_jax.config import Config
from proxykd_jax.texts.template import Renderer


def dry_run(config: Config) -> list[str]:
    """Checks a config against the files that are present, and trains nothing.

    Args:
      config: the config of the run. It may be meant for another machine: a path of which nothing
        exists here is unchecked.

    Returns:
      One sentence for each thing that could not be checked, because it is absent.

    Raises:
      UserError: at least one check failed; one message lists all problems.
    """
    findings = Findings()
    _check(config, findings, name="dry run")
    return findings.unchecked


def full_check(config: Config, *, force: bool = False) -> list[str]:
    """Checks all that a run needs on this machine, also its memory, time and disk.

    Args:
      config: the config of the run.
      force: warn of a corpus that loses many rows or lacks validation rows, instead of refusing it.

    Returns:
      One sentence for each thing that could not be checked.

    Raises:
      UserError: at least one check failed; one message lists all problems.
    """
    findings = Findings(here=True, force=force)
    _check(config, findings, name="check", machine=True)
    return findings.unchecked


def check_start(config: Config, *, force: bool = False) -> None:
    """Checks in seconds what would stop the run later: files, tokenizers, models, first rows.

    Args:
      config: the config of the run.
      force: as in ``full_check``.

    Raises:
      UserError: at least one check failed; one message lists all problems.
    """
    findings = Findings(here=True, force=force, quiet=True)
    present = present_sources(config, findings)
    tokenizer = check_tokenizers(config, findings)
    if tokenizer is not None:
        renderer = findings.attempt("corpus", lambda: Renderer.of(tokenizer, config.corpus))
        if renderer is not None:
            quick_sample(config.corpus, present, renderer, findings)
    check_mesh(config, findings)
    for role in ("proxy", "student"):
        check_model(config, role, tokenizer, findings)
    check_benchmarks(config, findings)
    findings.unchecked.clear()  # hub names: the run downloads them
    findings.close("check")


def judge_corpus(config: Config, counts: Mapping[str, Any], *, force: bool = False) -> None:
    """Refuses a prepared corpus that lost too many rows, or whose validation split is empty.

    Args:
      config: the config of the run.
      counts: ``TokenCorpus.counts``.
      force: as in ``full_check``.

    Raises:
      UserError: the corpus is refused.
    """
    findings = Findings(here=True, force=force, quiet=True)
    judge_counts(config, counts, findings)
    findings.close("check")


def _check(config: Config, findings: Findings, *, name: str, machine: bool = False) -> None:
    findings.say("config", f"{config.name}, preset {config.preset}: every key is valid")
    present = present_sources(config, findings)
    tokenizer = check_tokenizers(config, findings)
    renderer = None
    if tokenizer is not None:
        renderer = findings.attempt("corpus", lambda: Renderer.of(tokenizer, config.corpus))
    rows = count_rows(config, present, renderer, findings)
    check_mesh(config, findings)
    models = {role: check_model(config, role, tokenizer, findings) for role in ("proxy", "student")}
    counted = count_phases(config, rows, models, findings)
    for role, found in models.items():
        if found is not None and (role == "student" or config.needs != "nothing"):
            check_shapes(config, role, found, counted, findings)
    proxy, student = models["proxy"], models["student"]
    if proxy and student and proxy.vocab_size != student.vocab_size and tokenizer is None:
        findings.problems.append(
            f"the proxy has {proxy.vocab_size} embeddings and the student {student.vocab_size}; "
            "soft labels need one vocabulary for both"
        )
    check_server(config, findings)
    check_benchmarks(config, findings)
    if counted is not None:
        show_steps(counted, findings)
        check_disk(config, counted, models, findings)
    if machine and proxy and student and not findings.problems:
        check_machine(config, proxy, student, counted, findings)
        if renderer is not None:
            check_ends(config, present, renderer, findings)
    findings.close(name)
