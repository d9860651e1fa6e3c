"""The command line: which cells are measured, in which order; records on disk part by part."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code
from benchmarks.paper_tables import vectorise
from proxykd_jax.artifacts import digest_value, read_json, write_json
from proxykd_jax.errors import UserError

QUICK_SEEDS, FULL_SEEDS = 4, 8
DEVICES = 2
# --quick leaves out the methods that each need a program of their own.
QUICK_WITHOUT = (
    "minillm",
    "on_policy",
    "on_policy_mix",
    "proxy_kd_mix",
    "random_labels",
    "soda",
    "gad",
)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    from benchmarks.paper_tables.settings import PRESETS, REGIMES

    made = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_tables",
        description="Make the paper's tables in miniature: every method over many seeds. The "
        "teacher is a black box to the methods and known to the evaluator.",
    )
    made.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    made.add_argument(
        "--quick",
        action="store_true",
        help=f"measure only the main regime and preset, on {QUICK_SEEDS} seeds",
    )
    made.add_argument("--seeds", type=int, help=f"number of seeds (default {FULL_SEEDS})")
    made.add_argument("--first-seed", type=int, default=0, help="the first seed (default 0)")
    made.add_argument("--regime", choices=REGIMES, help="measure only this one (default: all)")
    made.add_argument("--preset", choices=PRESETS, help="measure only this one (default: both)")
    made.add_argument(
        "--sweeps",
        action="store_true",
        help="also make one change at a time: alpha, weights, tails, corpus, rounds, beta, losses",
    )
    made.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME",
        help="also make this change, by its name in the tables; may be repeated",
    )
    made.add_argument("--methods", help="students to train, separated by commas (default: all)")
    return made


def main(argv: Sequence[str] | None = None, sizes: Any = None) -> int:
    """Runs the command line and returns the exit code. ``sizes`` are for tests."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    return exit_code(lambda: _run(arguments, sizes, given))


def _run(arguments: argparse.Namespace, sizes: Any, argv: list[str]) -> None:
    from benchmarks.paper_tables import settings as s
    from benchmarks.paper_tables import sweeps, tables
    from benchmarks.paper_tables.metrics import Record

    started = time.perf_counter()
    sizes = s.Sizes() if sizes is None else sizes
    count = arguments.seeds or (QUICK_SEEDS if arguments.quick else FULL_SEEDS)
    if count < 1 or arguments.first_seed < 0:
        raise UserError(
            f"--seeds {count} --first-seed {arguments.first_seed}: give at least one seed, from 0 "
            "on."
        )
    seeds = list(range(arguments.first_seed, arguments.first_seed + count))
    quick = arguments.quick
    regimes = [arguments.regime] if arguments.regime else [s.MAIN_REGIME] if quick else s.REGIMES
    presets = [arguments.preset] if arguments.preset else ["paper"] if quick else s.PRESETS
    names = _method_names(arguments.methods, quick)
    changes = _change_names(arguments)
    # A change is compared with the same student without it.
    names = list(dict.fromkeys([*names, *sweeps.students(changes, presets)]))
    settings = {
        "presets": list(presets),
        "seeds": seeds,
        "methods": names,
        "quick": quick,
        "sweeps": changes,
    }
    records: list[Record] = []
    for regime in regimes:
        records += _regime(arguments.out, {"regime": regime, **settings}, sizes)
    notes = [
        f"Seeds {seeds[0]} to {seeds[-1]}: each has its own world, data, split, initialisation and "
        f"pre-training. {sizes.num_corpus} prompts with one sampled answer of the teacher each, "
        f"{sizes.num_test} test prompts. {time.perf_counter() - started:.0f} s in all (what lay on "
        "disk not counted).",
        "",
        tables.READING,
    ]
    command = shlex.join(["python", "-m", "benchmarks.paper_tables", *argv])
    cells = [(regime, preset) for regime in regimes for preset in presets]
    print(tables.write_all(arguments.out, records, cells, command=command, notes=notes))


def _method_names(asked: str | None, quick: bool) -> list[str]:
    from benchmarks.paper_tables.methods import BLACK_BOX, METHODS

    if asked is None:
        return [name for name in METHODS if not (quick and name in QUICK_WITHOUT)]
    names = asked.split(",")
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: {name!r} is none of {', '.join(METHODS)}.")
    return list(dict.fromkeys([BLACK_BOX, *names]))


def _change_names(arguments: argparse.Namespace) -> list[str]:
    from benchmarks.paper_tables import sweeps

    known = sweeps.all_names()
    for name in arguments.sweep:
        if name not in known:
            raise UserError(f"--sweep: {name!r} is none of {'; '.join(known)}.")
    return [name for name in known if arguments.sweeps or name in arguments.sweep]


def _regime(out: Path, settings: dict[str, Any], sizes: Any) -> list[Any]:
    """All records of a regime; parts that are not on disk are measured and written there."""
    from benchmarks.paper_tables.metrics import Record

    identity = {**settings, "sizes": digest_value(repr(sizes))}
    records: list[Record] = []
    for part, measure in _parts(settings, sizes):
        path = out / "records" / f"{settings['regime']}-{part}.json"
        if not path.exists():
            measured = [record.to_json() for record in measure()]
            write_json(path, {"settings": identity, "records": measured})
        found = read_json(path)
        if found["settings"] != identity:
            raise UserError(
                f"{path} is of {found['settings']}, not of {identity}. Choose another --out or "
                "remove it."
            )
        records += [Record(**record) for record in found["records"]]
    return records


def _parts(settings: dict[str, Any], sizes: Any) -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """(name, what measures it) of each part; nothing is made before a part asks for it."""
    from benchmarks.miniature import pretrain
    from benchmarks.paper_tables import methods as m
    from benchmarks.paper_tables import settings as s
    from benchmarks.paper_tables import sweeps
    from benchmarks.paper_tables.study import CURVES, Study

    regime, presets, names = (settings[key] for key in ("regime", "presets", "methods"))
    quick = settings["quick"]
    say = functools.partial(print, flush=True)
    study = Study(s.Setting(regime, presets[0], sizes), settings["seeds"], say)
    yield "proxies", lambda: study.start_records() + study.proxy_records()
    curves = () if quick else CURVES
    cell = functools.cache(
        lambda preset: study if preset == presets[0] else study.with_changes(preset=preset)
    )

    def students(preset: str) -> list[Any]:
        first = preset == presets[0]
        wanted = [name for name in names if first or name in m.OF_PRESET]
        return cell(preset).student_records(wanted, curves=curves)

    def changed(preset: str) -> list[Any]:
        return sweeps.records(cell(preset), settings["sweeps"])

    for preset in presets:
        yield preset, functools.partial(students, preset)
        if settings["sweeps"]:
            yield f"{preset}-sweeps", functools.partial(changed, preset)
    if quick or regime != s.MAIN_REGIME:
        return

    # Fig. 3's small proxy and Table 5's pair belong to the main regime alone.
    def small() -> list[Any]:
        its = study.with_changes(proxy_model=s.SMALL_PROXY)
        return its.proxy_records("small") + its.student_records([m.PROXY_KD], prefix="small/")

    def qwen() -> list[Any]:
        its = study.with_changes(
            proxy_model=pretrain.PROXY.replace(**s.QWEN),
            student_model=pretrain.STUDENT.replace(**s.QWEN),
        )
        students = its.student_records(CURVES, prefix="qwen/", curves=CURVES)
        return its.proxy_records("qwen") + students

    yield "small", small
    yield "qwen", qwen


if __name__ == "__main__":
    vectorise.use_devices(DEVICES)
    raise SystemExit(main())
