"""Runs the programs of a run on the devices at hand, and compares them with what ``plan`` says.

    python -m proxykd_jax.plan --config FILE --device h100 --count 1 --json plan.json
    python -m benchmarks.planned_and_measured --config FILE --plan plan.json --json FILE

Every program of the recipe runs with random weights and random rows of the greatest length. It
needs the models' config.json, but no weights and no data. Each program has its own process, because
a device reports the most memory that it ever held. With ``--plan`` the planned figures stand beside
the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.config import Config, load_config
from proxykd_jax.errors import UserError

_GIB = 1 << 30


def measure(config: Config, stage: str, steps: int) -> dict[str, Any]:
    """Runs the program of one stage on the devices at hand.

    Args:
      config: of the run.
      stage: the name of the program, see ``planning.run_programs``.
      steps: number of runs that are timed, after two that are not.

    Returns:
      The peak bytes of a device, the ``batch`` of rows computed at once, the ``rows`` of a run (a
      step may take several micro-batches), the median seconds, the FLOPs and the tokens a second.

    Raises:
      UserError: the run has no such program.
    """
    import jax

    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.planning.look import architecture
    from proxykd_jax.planning.run_programs import run_programs
    from proxykd_jax.training.abstract import Lengths

    models = {role: architecture(getattr(config, role), role) for role in ("proxy", "student")}
    found = {p.name: p for p in run_programs(config, models["proxy"], models["student"])}
    if stage not in found:
        raise UserError(f"--stage {stage}: this run has {', '.join(found)}.")
    program = found[stage]
    mesh = make_mesh(config.mesh.of(program.work))
    half = config.corpus.max_length // 2
    lengths = Lengths(half, half)
    started = time.perf_counter()
    lowered = program.lower(mesh, program.rows)
    if stage == "sample":
        seconds = _time_sampling(config, models["proxy"], lowered[0], mesh, half)
        compiling = None
    else:
        compiled = [one.compile() for one in lowered]
        compiling = time.perf_counter() - started
        times = [_time(one, low, models, steps) for one, low in zip(compiled, lowered, strict=True)]
        runs = program.runs(_rows(lowered[0]), lengths)
        seconds = sum(n * t for n, t in zip(runs, times, strict=True))
    rows = _rows(lowered[0])
    cost = program.cost(dict(mesh.shape), rows, lengths)
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    tokens = rows * (half if stage == "sample" else lengths.row)
    return {
        "device": jax.devices()[0].device_kind,
        "count": mesh.size,
        "batch": program.rows,
        "rows": rows,
        "peak_bytes": max(found.get("peak_bytes_in_use", 0) for found in stats),
        "resident_bytes": program.resident(mesh),
        "seconds": seconds,
        "compile_seconds": compiling,
        "flops": cost.flops,
        "flops_a_second": cost.flops / seconds / mesh.size,
        "tokens_a_second": tokens / seconds,
    }


def _rows(lowered: Any) -> int:
    """The number of rows (or pairs) that a run of a program computes."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(lowered.args_info)
    return next(leaf.shape[0] for path, leaf in leaves if _name(path[-1]) == "tokens_BL")


def _time(compiled: Any, lowered: Any, models: dict[str, Any], steps: int) -> float:
    """The median seconds of a program. Its result replaces what it donates, as in training."""
    import jax

    vocab_size = min(model.vocab_size for model in models.values())
    arguments, named = _random(lowered, compiled, vocab_size)
    donated = any(leaf.donated for leaf in jax.tree.leaves(lowered.args_info))
    times = []
    for index in range(steps + 2):
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(*arguments, **named))
        if index >= 2:
            times.append(time.perf_counter() - started)
        if donated:
            arguments = (out[0], *arguments[1:])
    return statistics.median(times)


def _time_sampling(config: Config, model: Any, prefill: Any, mesh: Any, half: int) -> float:
    """The seconds of a batch of answers, each as long as its budget."""
    import numpy as np

    from proxykd_jax.generation.decode import DrawSettings
    from proxykd_jax.generation.sampler import Prompt, sample

    (weights, *_), _ = _random(prefill, prefill.compile(), model.vocab_size)
    rows = config.align.sampling.batch_size
    budget = min(config.align.sampling.max_new_tokens or half, half)
    prompts = list(np.random.default_rng(0).integers(3, model.vocab_size, (rows, half)))

    def draw(seed: int) -> float:
        started = time.perf_counter()
        sample(
            weights,
            [
                Prompt(prompt.astype(np.int32), str(row), budget)
                for row, prompt in enumerate(prompts)
            ],
            config=model,
            settings=DrawSettings(1.0, 1.0, model.vocab_size, ()),
            seed=seed,
            round_index=1,
            batch_size=rows,
            mesh=mesh,
        )
        return time.perf_counter() - started

    draw(0)
    return min(draw(1), draw(2))


# --- random arguments -----------------------------------------------------------------------------


def _random(lowered: Any, compiled: Any, vocab_size: int) -> Any:
    """Makes (args, kwargs) of a program on the devices where it wants them."""
    import jax

    shardings = compiled.input_shardings
    leaves, structure = jax.tree_util.tree_flatten_with_path(lowered.args_info)
    # Arguments that the program does not read are left out of what was compiled.
    places = iter(jax.tree.leaves(shardings))
    kept = getattr(compiled._executable, "_kept_var_idx", range(len(leaves)))
    values = []
    for index, (path, info) in enumerate(leaves):
        place = next(places) if index in kept else None
        make = _value_of([_name(key) for key in path], info.shape, info.dtype, vocab_size, index)
        values.append(jax.jit(make, out_shardings=place)())
    return jax.tree.unflatten(structure, values)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _value_of(
    names: list[str], shape: tuple[int, ...], dtype: Any, vocab_size: int, salt: int
) -> Callable[[], Any]:
    """A function that makes the value of an argument of that name."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def numbers() -> Any:
        """Hashed positions, uint32; only the result is ever in memory."""
        number = jnp.full(shape, salt, jnp.uint32)
        for axis in range(len(shape)):
            number = (number + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * np.uint32(
                0x9E3779B1
            )
            number = (number ^ (number >> 15)) * np.uint32(0x85EBCA77)
        return number ^ (number >> 13)

    def floats() -> Any:
        uniform = numbers().astype(jnp.float32) / 2.0**32 - 0.5
        return (uniform * 0.07).astype(dtype)  # The standard deviation is 0.02.

    last = names[-1]
    kinds: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(
            ("tokens_BL", "labels_BL", "topk_ids_BLK"),
            lambda: (numbers() % vocab_size).astype(dtype),
        ),
        "mask_BL": lambda: jax.lax.broadcasted_iota(jnp.int32, shape, 1) >= shape[1] // 2,
        "positions_BL": lambda: jax.lax.broadcasted_iota(dtype, shape, 1),
        **dict.fromkeys(("topk_logps_BLK", "tail_logps_BL"), lambda: jnp.full(shape, -2.4, dtype)),
        **dict.fromkeys(
            ("reference_chosen_B", "reference_rejected_B"), lambda: jnp.full(shape, -5e3, dtype)
        ),
        "codes": lambda: numbers().astype(dtype),
        "scales": lambda: jnp.full(shape, 0.02, dtype),
    }
    if "opt_state" in names or last == "step":
        return lambda: jnp.zeros(shape, dtype)
    if last in kinds:
        return kinds[last]
    if dtype == jnp.bool_ or not jnp.issubdtype(dtype, jnp.floating) or "norm" in " ".join(names):
        return lambda: jnp.ones(shape, dtype)
    if last.endswith("_BS"):  # These are sample weights.
        return lambda: jnp.ones(shape, dtype)
    return floats


# --- command line ---------------------------------------------------------------------------------


def _in_process(argv: list[str], stage: str, timeout: float) -> dict[str, Any] | str:
    """The figures of a stage from a process of its own, or the last error that it printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.planned_and_measured", *argv]
        command += ["--stage", stage, "--json", str(file)]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return f"not finished in {timeout:.0f} s"
        if done.returncode or not file.exists():
            lines = [
                line for line in done.stderr.splitlines() if "Error" in line or "error" in line
            ]
            return lines[-1][:300] if lines else f"exit code {done.returncode}"
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def render(name: str, found: dict[str, Any] | str, planned: dict[str, Any] | None) -> str:
    """A line of the table."""
    if isinstance(found, str):
        return f"{name:10} {found}"
    peak = (found["peak_bytes"] + found["resident_bytes"]) / _GIB
    line = f"{name:10} rows {found['batch']:4} at once: peak {peak:6.2f} GiB"
    if planned:
        line += f" (planned {planned['peak_bytes'] / _GIB:6.2f})"
    line += f"  {found['rows']:4} rows {found['seconds']:8.3f} s"
    if planned:
        floor = max(planned["floor_seconds"].values()) * found["rows"] / found["batch"]
        line += f" (floor {floor:8.3f})"
    return line + (
        f"  {found['flops_a_second'] / 1e12:6.1f} TFLOP/s  {found['tokens_a_second']:9.0f} tokens/s"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planned_and_measured",
        description="Run the programs of a recipe with random weights and compare with plan.",
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], help="key=value over the file")
    parser.add_argument("--plan", type=Path, help="file that plan wrote with --json")
    parser.add_argument("--stages", help="names, separated by commas (default: the plan's)")
    parser.add_argument("--stage", help="measure this stage in this process")
    parser.add_argument("--steps", type=int, default=5, help="number of timed runs")
    parser.add_argument("--timeout", type=float, default=600.0, help="most seconds of a stage")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.set)
        if arguments.stage:
            figures = measure(config, arguments.stage, arguments.steps)
            if arguments.json:
                write_bytes(arguments.json, json.dumps(figures, indent=2).encode())
            print(render(arguments.stage, figures, None))
            return 0
        planned = json.loads(arguments.plan.read_text()) if arguments.plan else {}
        names = arguments.stages.split(",") if arguments.stages else list(planned)
        if not names:
            raise UserError("give --stages, or --plan with what plan wrote.")
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    passed = ["--config", arguments.config, "--steps", str(arguments.steps)]
    passed += [word for pair in arguments.set for word in ("--set", pair)]
    found = {}
    for name in names:
        found[name] = _in_process(passed, name, arguments.timeout)
        print(render(name, found[name], planned.get(name)), flush=True)
        if arguments.json:
            write_bytes(arguments.json, json.dumps(found, indent=2).encode())
    return int(any(isinstance(figures, str) for figures in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
