"""The programs of a run compiled, weighed and timed for devices that are not here."""

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

# Of a GPU's memory, what the driver, cuDNN and the buffers of NCCL leave (the commands let XLA take
# as much, see cli.py). A TPU's compiler knows its own limit.
_USABLE = {"gpu": 0.92, "tpu": 1.0}
# The largest batch is looked for up to so many times the config's.
_MOST_TIMES = 32
BOUNDS = ("flops", "memory", "link")


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
      config: of the run.
      device, count: what it shall run on.
      stages: names to look at; empty for all.
      prompt, answer: mean tokens, for the time.
      samples: rows that ``hours`` are for.
      utilisation: share of the device's peaks that is reached.
      cache: folder of earlier results.
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
        """Bytes of a device that a program may take."""
        return self.device.memory_bytes * _USABLE["gpu" if self.device.gpu else "tpu"]


@dataclass(frozen=True)
class StagePlan:
    """What was found of a stage.

    Attributes:
      name, work, num_params: of the program.
      axes: the mesh.
      batch: rows at once.
      compiled: the compiler's words on each of its programs.
      resident_bytes: held by a device beside the arguments.
      fits: whether ``peak_bytes`` is below what a device has.
      largest_batch: rows at once that still fit; None where not looked for.
      flops: of one batch, all devices together.
      collective_bytes: that a device exchanges for a batch; None where the compiler hides it.
      floor_seconds: of a batch, at the device's full peaks: arithmetic, memory, link.
      hours: for the samples asked for, at the utilisation asked for.
      estimate: False where the device's own compiler was not there: temporaries say nothing.
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
        """The most that a device holds at once."""
        return self.resident_bytes + max(found.peak_bytes for found in self.compiled)

    @property
    def largest(self) -> Compiled:
        """The program that needs the most."""
        return max(self.compiled, key=lambda found: found.peak_bytes)

    def figures(self) -> dict[str, Any]:
        """For ``--json``."""
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


def plan(request: Request) -> list[StagePlan]:
    """Compiles the stages of a run.

    Raises:
      UserError: a config.json is missing, or a mesh does not fit the models or the devices.
    """
    found = []
    planner = Planner(request)
    for program in planner.programs:
        axes = planner.axes_of(request.config.mesh.of(program.work))
        stage = planner.look(program, axes, program.rows)
        print(f"compiled {program.name} ({mesh_name(axes)}, {program.rows} rows)", flush=True)
        found.append(planner.with_largest_batch(program, stage))
    return found


class Planner:
    """Compiles programs of a run on meshes and with batches that it is asked for.

    Args:
      request: what is asked.

    Raises:
      UserError: a config.json is missing, or there is no such stage or number of devices.
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
        """Sizes of the axes, ``rest`` resolved.

        Raises:
          UserError: they do not multiply to the number of devices.
        """
        return dict(self._mesh_of(axes).shape)

    def _mesh_of(self, axes: AxesConfig) -> Any:
        from proxykd_jax.parallel.mesh import arrange

        return arrange(axes, self._devices)

    def look(self, program: Program, axes: dict[str, int], rows: int) -> StagePlan:
        """A program on a mesh with so many rows."""
        from proxykd_jax.parallel.sharding import check_rows

        request, device = self.request, self.request.device
        mesh = self._mesh_of(AxesConfig(**axes))
        check_rows(rows, mesh, f"{program.name}: batch")
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
        batches = request.samples * program.times / rows
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
        """Finds the largest batch: memory is near linear in it, so two looks say where to look, and
        a third confirms."""
        if not stage.estimate:
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
        # Where the estimate was too bold, a little less is tried; each look is a compilation.
        for tried in (guess, int(guess * 0.9) // unit * unit, int(guess * 0.75) // unit * unit):
            if tried <= best:
                break
            if self.look(program, stage.axes, tried).fits:
                best = tried
                break
        return dataclasses.replace(stage, largest_batch=best)


def _exchanged(compiled: tuple[Compiled, ...], runs: tuple[float, ...]) -> float | None:
    """Bytes that a device exchanges; what is reduced goes round twice."""
    total = 0.0
    for found, times in zip(compiled, runs, strict=True):
        if found.collectives is None:
            return None
        total += times * sum(
            size * (2 if kind == "all-reduce" else 1) for kind, size in found.collectives.items()
        )
    return total


def architecture(section: ModelSection, role: str) -> ModelConfig:
    """A model of the config, from its ``config.json``.

    Raises:
      UserError: there is none on this machine.
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
    """``data x fsdp x tensor``."""
    return f"{axes['data']}x{axes['fsdp']}x{axes['tensor']}"
