"""Common parts of all commands: arguments, help for the keys, errors as sentences, quiet libraries.

Imports only pydantic and yaml, so that ``--help`` answers quickly.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from proxykd_jax.artifacts import verification
from proxykd_jax.config import dump_config, load_config
from proxykd_jax.config.keys import describe, often_set, stage_keys
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.parallel.launchers import Launch, find_launch
from proxykd_jax.peers import is_first, sigterm_stops
from proxykd_jax.small_files import check_folder
from proxykd_jax.status import LINE

USER_ERROR, INTERRUPTED = 2, 130
FORCE = {"force": "start although more than a fifth of the rows is lost or validation has no rows"}
# EX_TEMPFAIL of sysexits.h: schedulers restart the command, which continues the run.
TRY_AGAIN = 75
# What other libraries write to stderr though nothing is wrong, and the variables that stop it. They
# are read when a library is imported. Errors are still shown.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA and TensorFlow: the CPU's features
    # TensorFlow says that oneDNN is on before it reads the level above, so it is switched off. We
    # only read files with TensorFlow, and jax does not read this variable.
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # PyTorch was not found
    "TRANSFORMERS_VERBOSITY": "error",
    "GRPC_VERBOSITY": "ERROR",
}
# What a disk or its owner refuses; no error of the program.
_REFUSED_BY_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
}


def run_command(
    stage: str,
    main: Callable[..., Any],
    summary: str,
    argv: Sequence[str] | None = None,
    *,
    lists: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> int:
    """Runs one stage from the command line.

    Args:
      stage: its name, for example ``align``.
      main: the stage's function, called with the config, a tuple for each of ``lists`` and a
        bool for each of ``flags``.
      summary: one sentence for ``--help``.
      argv: arguments (default: the process's).
      lists: more options by name, with their help; each may be repeated, or hold several values
        separated by commas.
      flags: options without a value by name, with their help; ``main`` gets True or False.

    Returns:
      The exit code: 0; 2 after a user error; 130 after an interrupt; 75 if the same command should
      be run again, because the run was asked to stop (SIGTERM) or another of its processes was
      lost.
    """
    parser = argument_parser(stage, summary)
    for name, meaning in (lists or {}).items():
        parser.add_argument(f"--{name}", action="append", default=[], help=meaning)
    for name, meaning in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    arguments = parser.parse_args(argv)
    given: dict[str, Any] = {name: getattr(arguments, name) for name in flags or {}}
    given |= {
        name: tuple(part for value in getattr(arguments, name) for part in value.split(",") if part)
        for name in lists or {}
    }
    if arguments.strict and not arguments.dry_run:
        parser.error("--strict goes with --dry-run")

    def work() -> int:
        config = load_config(arguments.config, arguments.set)
        check_folder(config.folder, "runs_dir", writable=not arguments.dry_run)
        with verification(config.verify):
            if arguments.dry_run:
                from proxykd_jax.checking import dry_run

                unchecked = dry_run(config)
                return USER_ERROR if unchecked and arguments.strict else 0
            main(config, **given)
        return 0

    if arguments.print_config:
        try:
            sys.stdout.write(dump_config(load_config(arguments.config, arguments.set)))
        except UserError as error:
            return _report(error)
        return 0
    return run_work(work)


def run_work(work: Callable[[], int]) -> int:
    """Does the work, in one process or together with others, and returns the exit code.

    A user error, an interrupt and a stop give a sentence and a code as in ``run_command``.
    """
    _quieten()
    work = _disk_errors_told(work)
    # The share of GPU memory that plans assume; XLA's default is 75 %. Read when jax first starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    try:
        launch = find_launch()
    except UserError as error:
        return _report(error)
    if launch is None:
        with sigterm_stops():
            return _ended(work)
    return _as_one_of_several(launch, work)


def run_alone(work: Callable[[], int]) -> int:
    """``run_work`` for what one process does alone, also where a launcher started several."""
    _quieten()
    return _ended(_disk_errors_told(work))


def _quieten() -> None:
    """Silences other libraries, except where the user has set the variable."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _disk_errors_told(work: Callable[[], int]) -> Callable[[], int]:
    """The same work; what the disk refuses is a sentence."""

    def told() -> int:
        try:
            return work()
        except OSError as error:
            if error.errno not in _REFUSED_BY_DISK:
                raise
            where = "the disk" if error.filename is None else error.filename
            raise UserError(f"{where} cannot be used: {error.strerror}.") from error

    return told


def _ended(work: Callable[[], int]) -> int:
    """The exit code of work; prints a sentence for user errors, interrupts and stops."""
    try:
        return work()
    except (UserError, Stopped, KeyboardInterrupt) as error:
        return _report(error)


def _report(error: BaseException) -> int:
    LINE.clear()
    sys.stdout.flush()
    text, code = f"error: {error}", USER_ERROR
    if isinstance(error, Stopped):
        text, code = str(error), TRY_AGAIN
    elif isinstance(error, KeyboardInterrupt):
        text, code = "interrupted; the same command continues from the last checkpoint", INTERRUPTED
    if is_first():
        print(text, file=sys.stderr)
    return code


def _as_one_of_several(launch: Launch, work: Callable[[], int]) -> int:
    """``_ended`` in a process that starts, works and ends together with others."""
    from proxykd_jax.parallel.supervisor import split_off_worker

    code = split_off_worker(launch)
    if code is not None:
        return code
    from proxykd_jax.parallel import processes

    try:
        with sigterm_stops():
            processes.start(launch)
            code = work()
    except Stopped as error:
        code = _report(error)
    except UserError as error:
        processes.fail(USER_ERROR, error)
    except KeyboardInterrupt as error:
        processes.fail(INTERRUPTED, error)
    except BaseException as error:
        processes.fail(1, error)
    processes.finish(code)
    return code


class CommandParser(argparse.ArgumentParser):
    """Takes the file with or without ``--config``, and suggests the option that was meant."""

    def parse_args(self, args=None, namespace=None):
        """See ``argparse``; exits with code 2 and a sentence if an argument is wrong."""
        found, rest = self.parse_known_args(args, namespace)
        # Before Python 3.12.8 argparse leaves over a file that stands behind an option.
        files = [found.file] if found.file else []
        files += [part for part in rest if not part.startswith("-")]
        unknown = [part for part in rest if part.startswith("-")]
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            self.error(f"there is no option {unknown[0]}{did_you_mean(unknown[0], options)}")
        if found.config:
            files.insert(0, found.config)
        if len(files) > 1:
            self.error(f"one file is expected, and these are {len(files)}: {', '.join(files)}")
        if not files and found.required:
            self.error(f"name the {found.what}")
        found.config = files[0] if files else None
        return found


class _Help(argparse.Action):
    """``--help``: the options and the keys that are often set, all keys, or those like a word."""

    def __init__(self, stage: str, **options: Any) -> None:
        super().__init__(**options)
        self._stage = stage

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        word: Any,
        option_string: str | None = None,
    ) -> None:
        rows = stage_keys(self._stage)
        if word is None:
            often = often_set(self._stage)
            title = f"keys of the config that are often set (--help all: all {len(rows)} keys)"
            rows = often
        elif word == "all":
            title = "keys of the config"
        else:
            title, keys = f"keys of the config with {word}", [row[0] for row in rows]
            rows = [row for row in rows if word in row[0]]
            if not rows:
                parts = [*keys, *(part for key in keys for part in key.split("."))]
                parser.error(f"{parser.prog} has no key like {word}{did_you_mean(word, parts)}")
        if word is None or word == "all":
            print(parser.format_help())
        print(f"{title}; if two defaults are given, the preset decides:\n\n{describe(rows)}")
        parser.exit()


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``"; did you mean 'align'?"``, or nothing if no known word is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def file_parser(
    command: str,
    summary: str,
    names: Sequence[str],
    what: str,
    *,
    required: bool = True,
    add_help: bool = True,
) -> CommandParser:
    """A parser for a command that is given one file, or one folder, as ``config`` in its results.

    Args:
      command: its name.
      summary: one sentence for ``--help``.
      names: names of the option that may stand before the file.
      what: what the file is.
      required: whether the file must be given.
      add_help: as in ``argparse``.
    """
    parser = CommandParser(
        prog=program(command), description=summary, allow_abbrev=False, add_help=add_help
    )
    parser.set_defaults(required=required, what=what)
    parser.add_argument("file", nargs="?", metavar="FILE", help=what)
    parser.add_argument(*names, dest="config", metavar="FILE", help="the same")
    return parser


def base_parser(
    command: str,
    summary: str,
    *,
    required: bool = True,
    names: Sequence[str] = ("--config",),
    what: str = "YAML file of the run",
) -> CommandParser:
    """A parser for a command with a config: ``config`` (its file, or None), ``set`` and the help.

    Args:
      command, summary, names, what, required: as in ``file_parser``.
    """
    parser = file_parser(command, summary, names, what, required=required, add_help=False)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, for example --set align.num_rounds=2 (may be repeated)",
    )
    parser.add_argument(
        "-h",
        "--help",
        action=_Help,
        stage=command,
        nargs="?",
        metavar="all|WORD",
        help="this help; all: with every key of the config; WORD: the keys whose names hold it",
    )
    return parser


def program(command: str) -> str:
    """How this command was called: as a module, or as ``proxykd``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = f"proxykd_jax.{command}"
    return (
        f"python -m {module}" if spec is not None and spec.name == module else f"proxykd {command}"
    )


def argument_parser(stage: str, summary: str) -> argparse.ArgumentParser:
    """The parser of a stage."""
    parser = base_parser(stage, summary)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, files, tokenizers and shapes; show an example with its mask, steps, "
        "tokens and memory; train nothing",
    )
    parser.add_argument(
        "--strict", action="store_true", help="with --dry-run: exit 2 if anything was not checked"
    )
    return parser
