"""Common parts of all commands: arguments, help for every key, errors as sentences.

Imports only pydantic and yaml, so that ``--help`` answers quickly.
"""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from proxykd_jax.config import Config, dump_config, load_config
from proxykd_jax.config.load import _section_classes
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.config.section import is_path
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.parallel.launchers import Launch, find_launch
from proxykd_jax.peers import is_first, sigterm_stops

USER_ERROR, INTERRUPTED = 2, 130
FORCE = {"force": "start although more than a fifth of the rows is lost or validation has no rows"}
# EX_TEMPFAIL of sysexits.h: schedulers restart the command, which continues the run.
TRY_AGAIN = 75


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


def _ended(work: Callable[[], int]) -> int:
    """The exit code of work; prints a sentence for user errors, interrupts and stops."""
    try:
        return work()
    except (UserError, Stopped, KeyboardInterrupt) as error:
        return _report(error)


def _report(error: BaseException) -> int:
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


def base_parser(
    command: str,
    summary: str,
    *,
    required: bool = True,
    names: Sequence[str] = ("--config",),
    what: str = "YAML file of the run",
) -> argparse.ArgumentParser:
    """A parser for the arguments of every command; its help lists every key of the config.

    Args:
      command: its name.
      summary: one sentence for ``--help``.
      required: whether a run can only be named by its config.
      names, what: names and help of the option for the file.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m proxykd_jax.{command}",
        description=summary,
        epilog=_KeysOnDemand(),  # type: ignore[arg-type]
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(*names, required=required, metavar="FILE", help=what)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, for example --set align.num_rounds=2 (may be repeated)",
    )
    return parser


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


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _format_text(self, text: Any) -> str:
        return super()._format_text(str(text))


class _KeysOnDemand:
    """The list of keys, built only when help is requested."""

    def __str__(self) -> str:
        return describe_keys()

    def __contains__(self, text: str) -> bool:
        return False


def describe_keys() -> str:
    """Every key of the config with its type, default and meaning, one paragraph per key."""
    lines = ["keys of the config file (if two defaults are given, the preset decides):", ""]
    for key, kind, default, meaning in config_keys():
        lines.append(f"  {key}  [{kind}]{f'  default {default}' if default else ''}")
        lines.append(f"      {meaning}")
    return "\n".join(lines)


def config_keys(root: type[BaseModel] = Config) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a schema, in its order."""
    yield from _keys_of(root, "")


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        classes = list(_section_classes(field.annotation))
        inner = classes[0] if classes else None
        if len(classes) > 1:
            yield from _keys_of_several(classes, key, field.description or "")
            continue
        if inner is None:
            # A field keeps the metadata of its outermost type beside the type.
            metadata = tuple(field.metadata)
            annotation = Annotated[field.annotation, *metadata] if metadata else field.annotation
            yield key, _kind(annotation), _default(key, field), field.description or ""
            continue
        is_list = typing.get_origin(field.annotation) is tuple
        if is_list:
            yield (
                key,
                "list of sections",
                "" if field.is_required() else "none",
                (field.description or ""),
            )
        yield from _keys_of(inner, f"{key}[]." if is_list else f"{key}.")


def _keys_of_several(
    classes: list[type[BaseModel]], key: str, meaning: str
) -> Iterator[tuple[str, str, str, str]]:
    """The keys of a section that is one of several classes, selected by ``name``."""
    names = [section.model_fields["name"].default for section in classes]
    yield f"{key}.name", "|".join(names), names[0], meaning
    for name, section in zip(names, classes, strict=True):
        for inner, kind, default, about in _keys_of(section, f"{key}."):
            if inner != f"{key}.name":
                yield f"{inner} ({name})", kind, default, about


def _kind(annotation: Any) -> str:
    if is_path(annotation):
        return "path"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(_show(a) for a in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if arguments:
        return "|".join(_kind(a) for a in arguments)
    names = {"NoneType": "null", "str": "text", "bool": "true|false", "float": "number"}
    return names.get(annotation.__name__, annotation.__name__)


def _default(key: str, field: Any) -> str:
    found = {}
    for preset, values in PRESETS.items():
        node: Any = values
        for part in key.split("."):
            node = (
                node.get(part, PydanticUndefined) if isinstance(node, dict) else (PydanticUndefined)
            )
        if node is not PydanticUndefined:
            found[preset] = node
    if found:
        return ", ".join(f"{_show(value)} ({preset})" for preset, value in found.items())
    return "" if field.is_required() else _show(field.default)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return str(value)
