"""``proxykd COMMAND``: every command by its name. ``python -m proxykd_jax`` is the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from proxykd_jax import (
    __version__,
    align,
    chat,
    check,
    collect,
    distill,
    evaluate,
    export,
    init,
    plan,
    prepare,
    push,
    report,
    run,
    score,
    tables,
    verify,
)
from proxykd_jax.cli import USER_ERROR, did_you_mean

# In the order of the flow, and then what stands beside it. A command is a module with ``SUMMARY``
# and ``command(argv)``, which imports nothing heavy before it has read its arguments.
_MODULES = (
    *(collect, prepare, align, score, distill, evaluate, export, report),
    *(init, run, check, plan, verify, chat, push, tables),
)
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    Args:
      argv: the command's name and its arguments (default: the process's).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {found.SUMMARY}" for name, found in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="proxykd",
        usage="proxykd COMMAND [FILE] [options]",
        description="Proxy-KD: distil a black-box model through an aligned white-box proxy.",
        epilog=f"commands:\n{listed}\n\nproxykd COMMAND --help shows the options and keys of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"proxykd {__version__}")
    if given and given[0] in COMMANDS:
        return COMMANDS[given[0]].command(given[1:])
    if not given:
        parser.print_help(sys.stderr)
        return USER_ERROR
    if not given[0].startswith("-"):
        parser.error(f"there is no command {given[0]}{did_you_mean(given[0], list(COMMANDS))}")
    parser.parse_args(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
