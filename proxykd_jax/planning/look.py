"""Compiles the programs of a run for devices that are not present: their memory and their time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.config import AxesConfig, Config, ModelSection, Work
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.ahead import Compiled, Compiler, has_compiler, target_devices
from proxykd_jax.parallel.devices import Device

if TYPE_CHECKING:
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.training.abstract import Lengths, Program

# The share of a device's memory that a program can use. On a GPU the driver, cuDNN and NCCL's
# buffers take the rest; the commands give XLA the same share (cli.py). A TPU's compiler knows its
# own limit.
_USABLE = {"gpu": 0.92, "tpu": 1.0}
# The search for the largest batch ends at this multiple of the config's batch.
_MOST_TIMES = 32
BOUNDS = ("flops", "memory", "link")


@dataclass(frozen=True)
class Request:
    """What the user asks ``plan`` for.

    Attributes:
      config: the config of the run.
      device, count: the kind of device, and how many of them.
      stages: names of the stages to plan; all stages if empty.
      prompt, answer: mean tokens of a prompt and of an answer; they enter the time, not the memory.
      samples: rows of the corpus that ``hours`` are for.
      utilisation: the assumed share of the device's peaks, in (0, 1].
      cache: folder of the results of earlier compilations; None: no cache.
    """

    config: Config
    device: Device
    count: int
    stages: tuple[str, ...]
    prompt: int
    answer: int
    samples: int
    utilisation: float
    cache: Path | None

    @property
    def limit(self) -> float:
        """Bytes of a device's memory that a program can use."""
        return self.device.memory_bytes * _USABLE["gpu" if self.device.gpu else "tpu"]


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage on one mesh with one batch.

    Attributes:
      name, work, num_params: as in ``training.abstract.Program``.
      axes: sizes of the mesh's axes.
      batch: rows that are computed at once, over all devices.
      compiled: the compiler's report on each program of the stage.
      resident_bytes: what a device holds in addition to the arguments of the programs.
      fits: whether ``peak_bytes`` is within ``Request.limit`` and the compiler refused no program.
      flops: operations of one batch, all devices together.
      collective_bytes: bytes that a device sends or receives for one batch; None if the compiler
        does not show its program.
      floor_seconds: the least time of one batch at the device's full peaks, as three numbers:
        limited by arithmetic, by memory bandwidth and by the link.
      hours: time for ``Request.samples`` at ``Request.utilisation``.
      estimate: False if the device's own compiler is missing; then temporaries and peaks mean
        nothing.
      largest_batch: the most rows that fit at once; None if they were not searched.
    """

    name: str
    work: Work
    num_params: int
    axes: dict[str, int]
    batch: int
    compiled: tuple[Compiled, ...]
    resident_bytes: int
    fits: bool
    flops: float
    collective_bytes: float | None
    floor_seconds: tuple[float, float, float]
    hours: float
    estimate: bool
    largest_batch: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The most bytes that a device holds at once."""
        return self.resident_bytes + max(found.peak_bytes for found in self.compiled)

    @property
    def largest(self) -> Compiled:
        """The compiler's report on the program with the highest peak."""
        return max(self.compiled, key=lambda found: found.peak_bytes)

    def figures(self) -> dict[str, Any]:
        """The values that ``--json`` writes, by name."""
        return {
            "peak_bytes": self.peak_bytes,
            "argument_bytes": self.largest.argument_bytes,
            "temporary_bytes": self.largest.temporary_bytes,
            "output_bytes": self.largest.output_bytes,
            "alias_bytes": self.largest.alias_bytes,
            "resident_bytes": self.resident_bytes,
            "fits": self.fits,
            "batch": self.batch,
            "largest_batch": self.largest_batch,
            "mesh": self.axes,
            "flops": self.flops,
            "collective_bytes": self.collective_bytes,
            "floor_seconds": dict(
                zip(("flops", "memory", "link"), self.floor_seconds, strict=True)
            ),
            "hours": self.hours,
            "temporaries_estimated": self.estimate,
        }


def plan(request: Request, *, searches: bool = True) -> list[StagePlan]:
    """Compiles the stages of a run on the config's own meshes, and searches their largest batches.

    Prints a line after each compilation.

    Args:
      request: the run and the devices.
      searches: whether the largest batches are searched, which takes two more compilations each.

    Returns:
      One plan per stage, in the order of the run.

    Raises:
      UserError: a model's config.json is missing, or a mesh does not fit the models or the
        devices.
    """
    found = []
    planner = Planner(request)
    for program in planner.programs:
        axes = planner.axes_of(request.config.mesh.of(program.work))
        stage = planner.look(program, axes, program.rows)
        print(
            f"compiled {program.name} ({mesh_name(axes)}, {program.rows} rows): "
            f"{stage.peak_bytes / (1 << 30):.1f} GiB, {stage.hours:.2f} h",
            flush=True,
        )
        found.append(planner.with_largest_batch(program, stage) if searches else stage)
    return found


class Planner:
    """Plans the programs of a run on any mesh and with any batch.

    Args:
      request: the run and the devices.

    Raises:
      UserError: a model's config.json is missing, the run has no stage of a requested name, or the
        compiler knows no machine with this number of devices.
    """

    def __init__(self, request: Request) -> None:
        from proxykd_jax.planning.run_programs import run_programs
        from proxykd_jax.training.abstract import Lengths

        self.request = request
        try:
            self._devices = target_devices(request.device, request.count)
        except ValueError as error:
            raise UserError(f"--count: {error}") from None
        self._compile = Compiler(request.device, request.cache)
        self._lengths: Lengths = Lengths(request.prompt, request.answer)
        models = {
            role: architecture(getattr(request.config, role), role) for role in ("proxy", "student")
        }
        found = run_programs(request.config, models["proxy"], models["student"])
        names = [program.name for program in found]
        unknown = [name for name in request.stages if name not in names]
        if unknown:
            raise UserError(f"--stage {unknown[0]}: this run has {', '.join(names)}.")
        wanted = request.stages or names
        self.programs: list[Program] = [program for program in found if program.name in wanted]

    def axes_of(self, axes: AxesConfig) -> dict[str, int]:
        """Sizes of a mesh's axes, with a number in place of ``rest``.

        Raises:
          UserError: the product of the sizes is not the number of devices.
        """
        return dict(self._mesh_of(axes).shape)

    def _mesh_of(self, axes: AxesConfig) -> Any:
        from proxykd_jax.parallel.mesh import arrange

        return arrange(axes, self._devices)

    def look(self, program: Program, axes: dict[str, int], rows: int) -> StagePlan:
        """Compiles a program on a mesh with a number of rows.

        Args:
          program: one of ``programs``.
          axes: sizes of the mesh's axes.
          rows: rows that are computed at once, over all devices.

        Raises:
          UserError: the rows or an array cannot be split over the mesh.
        """
        from proxykd_jax.parallel.sharding import check_rows

        request, device = self.request, self.request.device
        mesh = self._mesh_of(AxesConfig(**axes))
        check_rows(rows, mesh, f"{program.name}: batch")  # 0 rows can always be split
        compiled = tuple(self._compile(lowered) for lowered in program.lower(mesh, rows))
        resident = program.resident(mesh)
        cost = program.cost(axes, rows, self._lengths)
        exchanged = _exchanged(compiled, program.runs(rows, self._lengths))
        floor = (
            cost.flops / (request.count * device.flops),
            cost.bytes_moved / device.bandwidth,
            (exchanged or 0.0) / device.link,
        )
        peak = resident + max(found.peak_bytes for found in compiled)
        refused = any(found.refused for found in compiled)
        batches = request.samples * program.times / rows if rows else 0.0
        return StagePlan(
            program.name,
            program.work,
            program.num_params,
            axes,
            rows,
            compiled,
            resident,
            peak <= request.limit and not refused,
            cost.flops,
            exchanged,
            floor,
            batches * max(floor) / request.utilisation / 3600,
            has_compiler(device),
        )

    def with_largest_batch(self, program: Program, stage: StagePlan) -> StagePlan:
        """Finds the largest batch that fits.

        Memory grows almost linearly with the batch. Two compilations give the slope, and a third
        one checks the batch that the slope predicts.
        """
        if not stage.estimate or not stage.batch:
            return stage
        unit = stage.axes["data"] * stage.axes["fsdp"]
        rows = stage.batch
        other = 2 * rows if stage.fits else rows // 2
        if other % unit or other < unit:
            return dataclasses.replace(stage, largest_batch=rows if stage.fits else 0)
        second = self.look(program, stage.axes, other)
        slope = (second.peak_bytes - stage.peak_bytes) / (other - rows)
        room = self.request.limit - stage.peak_bytes
        most = rows * _MOST_TIMES
        guess = most if slope <= 0 else min(int(rows + room / slope), most)
        guess = guess // unit * unit
        best = max((s.batch for s in (stage, second) if s.fits), default=0)
        # If the predicted batch does not fit, try 90 % and 75 % of it. Each try is a compilation.
        for tried in (guess, int(guess * 0.9) // unit * unit, int(guess * 0.75) // unit * unit):
            if tried <= best:
                break
            if self.look(program, stage.axes, tried).fits:
                best = tried
                break
        return dataclasses.replace(stage, largest_batch=best)


def _exchanged(compiled: tuple[Compiled, ...], runs: tuple[float, ...]) -> float | None:
    """Bytes that a device exchanges for a batch; an all-reduce sends its data twice."""
    total = 0.0
    for found, times in zip(compiled, runs, strict=True):
        if found.collectives is None:
            return None
        total += times * sum(
            size * (2 if kind == "all-reduce" else 1) for kind, size in found.collectives.items()
        )
    return total


def architecture(section: ModelSection, role: str) -> ModelConfig:
    """The architecture of a model of the run, read from its ``config.json``.

    Args:
      section: the model's section of the config.
      role: the section's name, ``proxy`` or ``student``, for the error message.

    Returns:
      The architecture, with ``lora`` set if an adapter is trained.

    Raises:
      UserError: no ``config.json`` is on this machine.
    """
    from proxykd_jax.models.hf_config import read_config
    from proxykd_jax.models.hf_weights import cut_config
    from proxykd_jax.training.model import lora_config, model_origin

    origin = model_origin(section)
    folder = origin if (Path(origin) / "config.json").is_file() else section.config
    if folder is None:
        raise UserError(
            f"{role}: {origin} is not on this machine; name a folder with its config.json in "
            f"{role}.config."
        )
    found = read_config(folder)
    if section.init:
        found = cut_config(found, section.init.first_layers)
    return found.replace(lora=lora_config(section)) if section.trainable == "lora" else found


def mesh_name(axes: dict[str, int]) -> str:
    """The sizes of the axes in the order data, fsdp, tensor; for example ``1x8x1``."""
    return f"{axes['data']}x{axes['fsdp']}x{axes['tensor']}"
