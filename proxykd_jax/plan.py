"""Will it fit, and how long will it take: every stage compiled for devices that are not here.

Run it as ``python -m proxykd_jax.plan --config FILE --device a100-80gb --count 8``. From abstract
shapes alone; weights and data need not be there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.cli import USER_ERROR, base_parser
from proxykd_jax.config import load_config
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.devices import DEVICES

if TYPE_CHECKING:
    from proxykd_jax.planning import Request

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "proxykd_jax" / "plan"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = base_parser(
        "plan", "Compile every stage of a run for devices that are not here: memory and time."
    )
    add = found.add_argument
    add("--device", required=True, choices=sorted(DEVICES), help="what to compile for")
    add("--count", type=int, required=True, metavar="N", help="how many of them")
    add("--stage", action="append", metavar="NAME", help="only this stage (may be repeated)")
    add("--json", metavar="FILE", help="write the figures there")
    add("--fit", metavar="FILE", help="search meshes and batches; write a config that fits")
    add("--prompt-tokens", type=int, metavar="N", help="mean prompt (default: half a full row)")
    add("--answer-tokens", type=int, metavar="N", help="mean answer (default: half a full row)")
    add("--samples", type=int, default=40_000, metavar="N", help="for the hours (paper: 40,000)")
    add(
        "--utilisation", type=float, default=0.4, metavar="U",
        help="share of the peaks that is reached, for the hours (default 0.4)",
    )  # fmt: skip
    add("--no-cache", action="store_true", help="compile anew what was compiled before")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Plans, prints, writes; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        request = _request(arguments)
        from proxykd_jax.parallel.ahead import prepare_process

        prepare_process(request.count)
        from proxykd_jax.planning import fit, plan, render

        stages = plan(request)
        print(render(request, stages), flush=True)
        if arguments.json:
            figures = {stage.name: stage.figures() for stage in stages}
            write_bytes(Path(arguments.json), (json.dumps(figures, indent=2) + "\n").encode())
        if arguments.fit:
            write_bytes(Path(arguments.fit), fit(request, stages).encode())
            print(f"wrote {arguments.fit}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _request(arguments: argparse.Namespace) -> Request:
    from proxykd_jax.planning import Request

    if arguments.count < 1 or arguments.samples < 1:
        raise UserError("--count and --samples must be at least 1.")
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation is a share in (0, 1], not {arguments.utilisation}.")
    config = load_config(arguments.config, arguments.set)
    half = config.corpus.max_length // 2
    return Request(
        config,
        DEVICES[arguments.device],
        arguments.count,
        stages=tuple(arguments.stage or ()),
        prompt=arguments.prompt_tokens or half,
        answer=arguments.answer_tokens or half,
        samples=arguments.samples,
        utilisation=arguments.utilisation,
        cache=None if arguments.no_cache else _CACHE.expanduser(),
    )


if __name__ == "__main__":
    sys.exit(main())
