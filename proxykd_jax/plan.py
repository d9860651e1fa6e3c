"""Tells whether a run fits on devices that are not present, and how long it takes.

Run it as ``proxykd plan --config FILE --device a100-80gb --count 8``. It compiles
every stage from abstract shapes, so it needs neither weights nor data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.cli import CommandParser, base_parser, run_alone
from proxykd_jax.config import ConfigLike, as_config, load_config
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.devices import DEVICES

if TYPE_CHECKING:
    from proxykd_jax.planning import StagePlan

SUMMARY = "Compile every stage of a run for devices that are not present; print memory and time."
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "proxykd_jax" / "plan"


def main(
    config: ConfigLike,
    device: str,
    count: int,
    *,
    stages: Sequence[str] = (),
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    samples: int = 40_000,
    utilisation: float = 0.4,
    use_cache: bool = True,
    fit_to: str | Path | None = None,
) -> list[StagePlan]:
    """Prints the plan of a run, and writes a config that fits if asked to.

    It must run before jax is imported, because it gives jax the devices to compile for.

    Args:
      config: the run, see ``as_config``.
      device: name of the device, one of ``DEVICES``.
      count: number of devices.
      stages: names of the stages to plan (default: all).
      prompt_tokens, answer_tokens: tokens of a mean prompt and a mean answer (default: half of
        ``corpus.max_length`` each).
      samples: number of rows that the hours are for.
      utilisation: assumed share of the device's peak, in (0, 1], for the hours.
      use_cache: whether results of earlier compilations are used.
      fit_to: file for a config with the fastest meshes and batches that fit.

    Returns:
      One plan per stage, in the order of the run.

    Raises:
      UserError: an argument is out of range, jax was imported before, a model's config.json is
        missing, or a mesh does not fit the models or the devices.
    """
    if device not in DEVICES:
        raise UserError(f"{device} is no device that plan knows: {', '.join(sorted(DEVICES))}.")
    if count < 1 or samples < 1:
        raise UserError("--count and --samples must be at least 1.")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is a share in (0, 1], not {utilisation}.")
    config = as_config(config)
    from proxykd_jax.parallel.ahead import prepare_process

    prepare_process(count)
    from proxykd_jax.planning import Request, fit, plan, render

    half = config.corpus.max_length // 2
    request = Request(
        config,
        DEVICES[device],
        count,
        stages=tuple(stages),
        prompt=prompt_tokens or half,
        answer=answer_tokens or half,
        samples=samples,
        utilisation=utilisation,
        cache=_CACHE.expanduser() if use_cache else None,
    )
    found = plan(request)
    print(render(request, found), flush=True)
    if fit_to:
        write_bytes(Path(fit_to), fit(request, found).encode())
        print(f"wrote {fit_to}")
    return found


def parser() -> CommandParser:
    """The command's arguments."""
    found = base_parser("plan", SUMMARY)
    add = found.add_argument
    add("--device", required=True, choices=sorted(DEVICES), help="device to compile for")
    add("--count", type=int, required=True, metavar="N", help="number of devices")
    add("--stage", action="append", metavar="NAME", help="only this stage (may be repeated)")
    add("--json", metavar="FILE", help="write the figures of each stage to FILE")
    add(
        "--fit", metavar="FILE",
        help="search meshes and batches; write a config with the fastest that fit to FILE",
    )  # fmt: skip
    half = "(default: half of corpus.max_length)"
    add("--prompt-tokens", type=int, metavar="N", help=f"tokens of a mean prompt {half}")
    add("--answer-tokens", type=int, metavar="N", help=f"tokens of a mean answer {half}")
    add(
        "--samples", type=int, default=40_000, metavar="N",
        help="samples that the hours are for (default 40000, as in the paper)",
    )  # fmt: skip
    add(
        "--utilisation", type=float, default=0.4, metavar="U",
        help="assumed share of the device's peak, for the hours (default 0.4)",
    )  # fmt: skip
    add("--no-cache", action="store_true", help="compile again what is in the cache")
    return found


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    arguments = parser().parse_args(argv)

    def work() -> int:
        stages = main(
            load_config(arguments.config, arguments.set),
            arguments.device,
            arguments.count,
            stages=arguments.stage or (),
            prompt_tokens=arguments.prompt_tokens,
            answer_tokens=arguments.answer_tokens,
            samples=arguments.samples,
            utilisation=arguments.utilisation,
            use_cache=not arguments.no_cache,
            fit_to=arguments.fit,
        )
        if arguments.json:
            figures = {stage.name: stage.figures() for stage in stages}
            write_bytes(Path(arguments.json), (json.dumps(figures, indent=2) + "\n").encode())
        return 0

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # otherwise XLA reports how it saved memory
    return run_alone(work)


if __name__ == "__main__":
    sys.exit(command())
