"""Checks what a run reads besides corpus and models: a sampling server, and benchmark files."""

from __future__ import annotations

from pathlib import Path

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.places import missing_path, missing_repository
from proxykd_jax.config import Config
from proxykd_jax.errors import UserError
from proxykd_jax.generation.server import ServerClient, UnansweredError
from proxykd_jax.tasks.items import hub_place
from proxykd_jax.texts.files import list_files
from proxykd_jax.training.model import model_origin

_SERVER_WAIT_S = 5.0


def check_server(config: Config, findings: Findings) -> None:
    """Checks that the sampling server, if any, answers and serves the proxy's base model."""
    server = config.align.sampling.server
    if server is None:
        return
    try:
        ServerClient(server, model_origin(config.proxy)).check(retries=0, timeout_s=_SERVER_WAIT_S)
    except UnansweredError as error:
        findings.unchecked.append(f"not checked: {error}")
    except UserError as error:
        findings.problems.append(str(error))
    else:
        findings.say("server", f"{server.url} answers ({server.api}, serves {server.serves})")


def check_benchmarks(config: Config, findings: Findings) -> None:
    """Checks that the files of the benchmarks are present."""
    settings = config.evaluate.benchmarks
    for task, path in settings.paths.items() if settings else ():
        key = f"evaluate.benchmarks.{task}"
        try:
            place = hub_place(path)
            if place is None:
                findings.say("benchmark", f"{task}: {len(list_files(path))} files")
            elif Path(place[0]).exists():
                findings.say("benchmark", f"{task}: {path}")
            else:
                missing_repository(findings, key, place[0])
        except UserError as error:
            if place is None and not Path(path).exists():
                missing_path(findings, key, path)
            else:
                findings.problems.append(f"{key}: {error}")
