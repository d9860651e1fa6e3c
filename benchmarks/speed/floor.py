"""The floor is the matrix products of an SFT step alone; and the machine's peak."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed.ours_models import device_peak
from benchmarks.speed.protocol import Program
from benchmarks.speed.shapes import Shape, shape_of
from proxykd_jax.models.causal_blocks import query_blocks

Product = tuple[str, tuple[int, ...], tuple[int, ...], int]


def step_products(shape: Shape, batch: int, length: int) -> list[Product]:
    """(einsum, left shape, right shape, number of times) of a full fine-tuning step.

    Each linear layer has one forward product and two backward ones: towards the input and towards
    the weights. Attention has scores and values forward, and two backward products for each, over
    blocks of queries that see no later keys. The vocabulary is projected at every position.
    """
    rows = batch * length
    linear = [(size, shape.layers) for size in shape.linear().values()]
    linear.append(((shape.dim, shape.vocab), 1))
    found: list[Product] = []
    for (size_in, size_out), count in linear:
        found.append(("rd,do->ro", (rows, size_in), (size_in, size_out), count))
        found.append(("ro,do->rd", (rows, size_out), (size_in, size_out), count))
        found.append(("rd,ro->do", (rows, size_in), (rows, size_out), count))
    heads, width = batch * shape.heads, shape.head_dim
    block = length // query_blocks(length)
    for seen in range(block, length + 1, block):
        queries, keys = (heads, block, width), (heads, seen, width)
        scores = (heads, block, seen)
        # These are q k^T forward, and grad_out v^T backward.
        found.append(("hqc,hkc->hqk", queries, keys, 2 * shape.layers))
        # These are scores v forward, and the products towards q, k and v backward.
        found.append(("hqk,hkc->hqc", scores, keys, 2 * shape.layers))
        found.append(("hqk,hqc->hkc", scores, queries, 2 * shape.layers))
    return found


def products(task: dict[str, Any]) -> Program:
    """Computes all products of ``step_products`` for each of the task's ``steps``."""
    shape = shape_of(task)
    work = []
    flops = 0.0
    for index, (equation, left, right, count) in enumerate(
        step_products(shape, task["batch_size"], task["length"])
    ):
        keys = jax.random.split(jax.random.key(index))
        arrays = [
            jax.random.normal(key, size, shape.dtype)
            for key, size in zip(keys, (left, right), strict=True)
        ]
        call = jax.jit(lambda a, b, equation=equation: jnp.einsum(equation, a, b))
        work.append((call, arrays, count))
        contracted = set(equation.split("->")[0].replace(",", "")) - set(equation.split("->")[1])
        sizes = dict(zip(equation.split(",")[0], left, strict=True))
        sizes |= dict(zip(equation.split(",")[1].split("->")[0], right, strict=True))
        total = 2.0 * count
        for axis in set(equation.split("->")[1]) | contracted:
            total *= sizes[axis]
        flops += total

    def run() -> None:
        for call, (left, right), count in work * task["steps"]:
            for _ in range(count):
                out = call(left, right)
            out.block_until_ready()

    run()
    return Program(run=run, flops=flops * task["steps"], units=1.0, peak=device_peak())


def peak(task: dict[str, Any]) -> Program:
    """Measures the fastest square product of a few sizes, ten started at once.

    The FLOPs a second are in ``extra``.
    """
    dtype = task.get("dtype", "float32")
    times, best = 10, 0.0
    for size in task["sizes"]:
        left = jax.random.normal(jax.random.key(0), (size, size), dtype)
        call = jax.jit(lambda a: a @ a)
        call(left).block_until_ready()
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(times):
                out = call(left)
            out.block_until_ready()
            best = max(best, times * 2.0 * size**3 / (time.perf_counter() - started))
    return Program(run=lambda: None, extra={"peak_flops": best, "dtype": dtype})
