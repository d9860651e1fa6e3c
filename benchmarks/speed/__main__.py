"""Measures the library's speed and memory beside its peers and the floor.

    python -m benchmarks.speed --out runs/speed
    python -m benchmarks.speed --quick --only sft_dense_15m,floor_15m --out runs/speed

docs/speed.md describes the cases, how the peers are installed, and how they differ.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed import report
from benchmarks.speed.cases import OURS, TORCH, TUNIX, Case, all_cases
from benchmarks.speed.coordinator import REPOSITORY, WorkerFailed
from benchmarks.speed.run_case import Bench, run_case
from benchmarks.speed.startup import run_startup
from benchmarks.speed.waiting import faster_waiting
from proxykd_jax.errors import UserError

# Large pages are the default: a step on a CPU gets hundreds of MB of fresh memory, and small pages
# are made one by one. With large pages a step of 15M takes 0.89 of the time, PyTorch's 0.94 and
# Tunix's 1.28, so Tunix does not use them.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
# The tools share the device, so each takes memory when it needs it, not most of it at the start.
_SHARED_DEVICE = {
    OURS: {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    TORCH: {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}


def chosen(cases: list[Case], only: str | None) -> list[Case]:
    """The cases that ``--only`` names.

    Raises:
      UserError: there is no such case.
    """
    if only is None:
        return cases
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - {case.name for case in cases})
    if unknown or not names:
        raise UserError(
            f"--only: there is no case {', '.join(unknown) or repr(only)}. "
            f"There are {', '.join(case.name for case in cases)}."
        )
    return [case for case in cases if case.name in names]


def sources_digest() -> str:
    """The digest of the library's and the benchmark's files, to which the figures belong."""
    digest = hashlib.sha256()
    for folder in ("proxykd_jax", "benchmarks/speed"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(str(path.relative_to(REPOSITORY)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 1 for a missed bar, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Speed and memory beside PyTorch, google-tunix and bare matrix products.",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for speed.json and speed.md"
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure only small shapes, in a few minutes"
    )
    parser.add_argument("--only", help="names of cases, separated by commas")
    for tool, folder in ((TORCH, ".venv-peers"), (TUNIX, ".venv-peers-jax")):
        python = REPOSITORY / folder / "bin/python"
        parser.add_argument(f"--{tool}", default=str(python), help=f"the Python of {tool}")
    arguments = parser.parse_args(argv)
    bench = Bench(
        work=arguments.out.resolve() / "work",
        interpreters={OURS: sys.executable, TORCH: arguments.torch, TUNIX: arguments.tunix},
    )
    if _TUNABLES not in os.environ:
        for tool in (OURS, TORCH):
            bench.environments[tool] = {_TUNABLES: _HUGE_PAGES}
    try:
        if arguments.out.exists() and not arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a file; give a folder.")
        # A name that no machine knows is refused before anything starts.
        known = {c.name: c for b in ("cpu", "gpu") for c in all_cases(b, arguments.quick)}
        chosen(list(known.values()), arguments.only)
        device = bench.make_model({"shape": "tiny"})
        backend = device["backend"]
        cases = chosen(all_cases(backend, arguments.quick), arguments.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerFailed as failure:
        print(f"error: this library's own worker does not start: {failure}", file=sys.stderr)
        return 2
    if backend == "gpu":
        for tool, variables in _SHARED_DEVICE.items():
            bench.environments[tool] = {**bench.environments.get(tool, {}), **variables}
    machine = _machine(device, arguments.quick)
    if any(e.tool == TORCH for case in cases for e in case.entries) and backend == "cpu":
        machine["OMP_WAIT_POLICY of PyTorch"] = faster_waiting(bench)
    records: list[report.Record] = []
    for case in cases:
        started = time.perf_counter()
        found = run_startup(bench, case) if case.name == "startup" else run_case(bench, case)
        if sources_digest() != machine["sources"]:
            # Workers import when their case begins, so some figures may belong to other code.
            machine["warning"] = f"the sources changed while {case.name} ran"
            print(f"  warning: {machine['warning']}", flush=True)
            machine["sources"] = sources_digest()
            for record in found:
                record |= {"ok": None, "reason": "the sources changed while it ran"}
        records += found
        for record in found:
            print(report.line(record), flush=True)
        print(f"  {case.name}: {time.perf_counter() - started:.0f} s", flush=True)
        report.write(arguments.out, records, machine)
    return int(any(record["ok"] is False for record in records))


def _machine(device: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "backend": device["backend"],
        "device": device["device"],
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "load before": round(os.getloadavg()[0], 2),
        _TUNABLES: os.environ.get(_TUNABLES, f"{_HUGE_PAGES} (not for Tunix)"),
        "quick": quick,
        "sources": sources_digest(),
    }


def _processor() -> str:
    """The processor's name with the numbers of its generation.

    A cloud's names leave the generation out, and ratios to a peer depend on it.
    """
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().split("\n\n")[0].splitlines() if listed.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return f"{told['model name']}, family {told.get('cpu family')}, model {told.get('model')}"


if __name__ == "__main__":
    raise SystemExit(main())
