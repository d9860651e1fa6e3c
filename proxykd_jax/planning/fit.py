"""Searches the meshes and batch sizes of a run: which fit on the devices, and which is fastest."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from proxykd_jax.config import Config, Work, dump_config, make_config
from proxykd_jax.errors import UserError
from proxykd_jax.planning.look import Planner, Request, StagePlan, mesh_name

if TYPE_CHECKING:
    from proxykd_jax.training.abstract import Program


def fit(request: Request, stages: list[StagePlan]) -> str:
    """Finds meshes and batch sizes that fit, and writes the fastest into the run's config.

    The ``batch_size`` of a training section stays as it is, because the optimizer sees it. If its
    rows do not fit at once, ``microbatch_size`` is set.

    Args:
      request: the run and the devices.
      stages: plans that were already made for the config's own meshes; they are not made again.

    Returns:
      The config as YAML.

    Raises:
      UserError: no mesh was found that fits, or a model's config.json is missing.
    """
    planner = Planner(request)
    chosen: dict[Work, list[StagePlan]] = {}
    programs = [program for program in planner.programs if program.rows]
    for work in dict.fromkeys(program.work for program in programs):
        own = [program for program in programs if program.work == work]
        known = [stage for stage in stages if stage.work == work and stage.batch]
        chosen[work] = _best(planner, own, known)
        print(f"{work}: {mesh_name(chosen[work][0].axes)}", flush=True)
    data = request.config.model_dump(mode="json")
    for work, found in chosen.items():
        if work == "align":
            data["mesh"] |= found[0].axes
        else:
            data["mesh"][work] = found[0].axes
        for stage in found:
            _set_batch(data, stage, request.config)
    return dump_config(make_config(data))


def _best(planner: Planner, own: list[Program], known: list[StagePlan]) -> list[StagePlan]:
    tried = []
    if len(known) == len(own) and all(stage.fits for stage in known):
        tried.append(known)
    for axes in _meshes(planner.request.count):
        if known in tried and axes == known[0].axes:
            continue
        found = []
        for program in own:
            stage = _fitting(planner, program, axes)
            if stage is None:
                break
            found.append(stage)
        else:
            tried.append(found)
    if not tried:
        names = ", ".join(program.name for program in own)
        raise UserError(
            f"{names}: does not fit in the memory of these devices on any mesh that was tried."
        )
    best = min(tried, key=lambda found: sum(stage.hours for stage in found))
    return [
        stage if stage.largest_batch else planner.with_largest_batch(program, stage)
        for program, stage in zip(own, best, strict=True)
    ]


def _fitting(planner: Planner, program: Program, axes: dict[str, int]) -> StagePlan | None:
    """Plans a program on a mesh, and halves its rows until it fits; None if it never does."""
    unit = axes["data"] * axes["fsdp"]
    rows = program.rows
    try:
        if program.held(axes) > planner.request.limit:
            return None
    except UserError:
        return None  # an axis does not divide an array
    while rows >= unit and rows % unit == 0:
        stage = planner.look(program, axes, rows)
        if stage.fits:
            return stage
        if program.whole:
            return None
        rows //= 2
    return None


def _set_batch(data: dict[str, Any], stage: StagePlan, config: Config) -> None:
    if stage.name == "sample":
        data["align"]["sampling"]["batch_size"] = stage.batch
    elif stage.name == "score":
        data["score"]["batch_size"] = stage.batch
    elif stage.work == "evaluate":
        data["evaluate"]["benchmarks"]["batch_size"] = stage.batch
    elif stage.name == "answer":
        data["method"]["sample_batch_size"] = stage.batch
    else:
        section = "distill" if stage.work == "distill" else "align"
        whole = getattr(config, section).batch_size
        already = data[section]["microbatch_size"] or whole
        rows = math.gcd(whole, min(stage.batch, already))
        data[section]["microbatch_size"] = None if rows == whole else rows


def _meshes(count: int) -> list[dict[str, int]]:
    """The meshes that are tried: one axis above 1, or a tensor axis of 2 with one other axis.

    A mesh with two large axes lies between the two pure meshes in time and memory. The search
    leaves such meshes to the user.
    """
    sizes = [2**k for k in range(12) if count % 2**k == 0]
    found = [
        {"data": data, "fsdp": fsdp, "tensor": tensor}
        for data, fsdp, tensor in itertools.product(sizes, repeat=3)
        if data * fsdp * tensor == count and tensor <= 8
    ]
    return [axes for axes in found if sorted(axes.values())[1] == 1 or axes["tensor"] == 2]
