"""What ``plan`` does: compiles the programs of a run, weighs and times them, searches what fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.config import AxesConfig, Config, ModelSection, Work, dump_config, make_config
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.ahead import Compiled, Compiler, has_compiler, target_devices
from proxykd_jax.parallel.devices import Device

if TYPE_CHECKING:
    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.training.programs import Lengths, Program

_GIB = 1 << 30
# Of a GPU's memory, what the driver, cuDNN and the buffers of NCCL leave (the commands let XLA take
# as much, see cli.py). A TPU's compiler knows its own limit.
_USABLE = {"gpu": 0.92, "tpu": 1.0}
# The largest batch is looked for up to so many times the config's.
_MOST_TIMES = 32
# The paper's Table 3, hours for 40,000 samples: (kind, billions of parameters, GPUs, hours).
PAPER_HOURS = (
    ("SFT", 7, 4, 1.0),
    ("Distill", 7, 4, 2.0),
    ("SFT", 13, 8, 1.8),
    ("Pref", 13, 8, 9.0),
    ("SFT", 70, 8, 5.5),
    ("Pref", 70, 8, 28.0),
)
_BOUNDS = ("flops", "memory", "link")
_PREFERENCE = ("sample", "reference", "round")


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
      name, work, role: of the program.
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
    role: str
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
    planner = _Planner(request)
    for program in planner.programs:
        axes = planner.axes_of(request.config.mesh.of(program.work))
        stage = planner.look(program, axes, program.rows)
        print(f"compiled {program.name} ({_mesh(axes)}, {program.rows} rows)", flush=True)
        found.append(planner.with_largest_batch(program, stage))
    return found


class _Planner:
    def __init__(self, request: Request) -> None:
        from proxykd_jax.training.programs import Lengths, programs

        self._request = request
        try:
            self._devices = target_devices(request.device, request.count)
        except ValueError as error:
            raise UserError(f"--count: {error}") from None
        self._compile = Compiler(request.device, request.cache)
        self._lengths: Lengths = Lengths(request.prompt, request.answer)
        models = {
            role: _architecture(getattr(request.config, role), role)
            for role in ("proxy", "student")
        }
        found = programs(request.config, models["proxy"], models["student"])
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

        request, device = self._request, self._request.device
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
        batches = request.samples / rows
        return StagePlan(
            program.name,
            program.work,
            program.role,
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
        room = self._request.limit - stage.peak_bytes
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

    def meshes(self) -> list[dict[str, int]]:
        """Arrangements worth a look: of all axes, or of one with the rest spread over another."""
        count = self._request.count
        sizes = [n for n in (2**k for k in range(12)) if count % n == 0 and n <= count]
        found = [
            {"data": data, "fsdp": fsdp, "tensor": tensor}
            for data, fsdp, tensor in itertools.product(sizes, repeat=3)
            if data * fsdp * tensor == count and tensor <= 8 and 1 in (data, fsdp, tensor)
        ]
        # Mixtures of two large axes are between the pure ones in time and memory: left to the user.
        return [axes for axes in found if sorted(axes.values())[1] <= 1 or axes["tensor"] == 2]


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


def _architecture(section: ModelSection, role: str) -> ModelConfig:
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


# --- a config that fits ---------------------------------------------------------------------------


def fit(request: Request, stages: list[StagePlan]) -> str:
    """The config with the meshes and batches that are fastest among those that fit, as YAML.

    The batch of a training step is what the optimizer sees and stays: where its rows do not fit at
    once, ``microbatch_size`` cuts it.

    Raises:
      UserError: nothing was found that fits.
    """
    planner = _Planner(request)
    chosen: dict[Work, list[StagePlan]] = {}
    for work in dict.fromkeys(program.work for program in planner.programs):
        own = [program for program in planner.programs if program.work == work]
        known = [stage for stage in stages if stage.work == work]
        chosen[work] = _best(planner, own, known)
        print(f"{work}: {_mesh(chosen[work][0].axes)}", flush=True)
    data = request.config.model_dump(mode="json")
    for work, found in chosen.items():
        if work == "align":
            data["mesh"] |= found[0].axes
        else:
            data["mesh"][work] = found[0].axes
        for stage in found:
            _set_batch(data, stage, request.config)
    return dump_config(make_config(data))


def _best(planner: _Planner, own: list[Program], known: list[StagePlan]) -> list[StagePlan]:
    tried = [known] if len(known) == len(own) else []
    for axes in planner.meshes():
        if known and axes == known[0].axes:
            continue
        found = []
        for program in own:
            stage = _fitting(planner, program, axes)
            if stage is None:
                break
            found.append(stage)
        else:
            tried.append(found)
    fitting = [found for found in tried if all(stage.fits for stage in found)]
    if not fitting:
        names = ", ".join(program.name for program in own)
        raise UserError(f"{names}: no mesh of these devices has the memory.")
    best = min(fitting, key=lambda found: sum(stage.hours for stage in found))
    return [
        stage if stage.largest_batch else planner.with_largest_batch(program, stage)
        for program, stage in zip(own, best, strict=True)
    ]


def _fitting(planner: _Planner, program: Program, axes: dict[str, int]) -> StagePlan | None:
    """The program on a mesh with as many of its rows as fit, halved until they do."""
    unit = axes["data"] * axes["fsdp"]
    rows = program.rows
    while rows >= unit and rows % unit == 0:
        try:
            stage = planner.look(program, axes, rows)
        except UserError:
            return None  # an axis does not divide an array
        if stage.fits:
            return stage
        rows //= 2
    return None


def _set_batch(data: dict[str, Any], stage: StagePlan, config: Config) -> None:
    if stage.name == "sample":
        data["align"]["sampling"]["batch_size"] = stage.batch
    elif stage.name == "score":
        data["score"]["batch_size"] = stage.batch
    else:
        section = "distill" if stage.name == "distill" else "align"
        whole = getattr(config, section).batch_size
        already = data[section]["microbatch_size"] or whole
        rows = math.gcd(whole, min(stage.batch, already))
        data[section]["microbatch_size"] = None if rows == whole else rows


# --- what is printed ------------------------------------------------------------------------------


def render(request: Request, stages: list[StagePlan]) -> str:
    """The plan as text."""
    device = request.device
    lines = [
        f"{request.config.name} on {request.count} x {device.title}, rows of "
        f"{request.config.corpus.max_length} tokens; a program may take "
        f"{request.limit / _GIB:.1f} of {device.memory_bytes / _GIB:.1f} GiB a device",
    ]
    if not has_compiler(device):
        lines.append(
            "the compiler of this device is not installed (pip install 'proxykd_jax[plan]'): "
            "compiled for CPUs in its place. Arguments are exact; temporaries and peaks are no "
            "estimate, and whether it fits is not known."
        )
    header = (
        f"{'stage':<10}{'mesh':<11}{'rows':>5}{'peak':>8}{'args':>8}{'temps':>8}{'outs':>7}"
        f"{'beside':>8}  {'fits':<5}{'most':>6}{'PFLOP':>9}{'GB sent':>9}{'floor s':>9}  "
        f"{'bound by':<9}{'hours':>7}"
    )
    lines += ["", header]
    for stage in stages:
        big = stage.largest
        bound = _BOUNDS[stage.floor_seconds.index(max(stage.floor_seconds))]
        fits = ("yes" if stage.fits else "NO") if stage.estimate else "?"
        most = "?" if stage.largest_batch is None else str(stage.largest_batch)
        sent = "?" if stage.collective_bytes is None else f"{stage.collective_bytes / 1e9:.1f}"
        lines.append(
            f"{stage.name:<10}{_mesh(stage.axes):<11}{stage.batch:>5}"
            f"{stage.peak_bytes / _GIB:>8.1f}{big.argument_bytes / _GIB:>8.1f}"
            f"{big.temporary_bytes / _GIB:>8.1f}{big.output_bytes / _GIB:>7.1f}"
            f"{stage.resident_bytes / _GIB:>8.1f}  {fits:<5}{most:>6}{stage.flops / 1e15:>9.2f}"
            f"{sent:>9}{max(stage.floor_seconds):>9.2f}  {bound:<9}{stage.hours:>7.2f}"
        )
    lines += [
        "",
        "mesh: data x fsdp x tensor. peak, args, temps, outs, beside: GiB a device; outs that take "
        "the place of donated arguments are in args too; beside: held while the program runs.",
        f"hours: {request.samples} samples of {request.prompt} + {request.answer} tokens (prompt + "
        f"answer) at {request.utilisation:.0%} of the peak that bounds the stage; nothing here was "
        "timed.",
        *_beside_the_paper(request, stages),
    ]
    return "\n".join(lines)


def _beside_the_paper(request: Request, stages: list[StagePlan]) -> list[str]:
    """Hours by the names of the paper's Table 3."""
    hours = {stage.name: stage.hours for stage in stages}
    ours = {
        ("proxy", "SFT"): hours.get("warmup"),
        ("proxy", "Pref"): (
            sum(hours[name] for name in _PREFERENCE if name in hours)
            if {"sample", "round"} <= hours.keys()
            else None
        ),
        ("student", "Distill"): hours.get("distill"),
    }
    lines = []
    for (role, kind), value in ours.items():
        if value is None:
            continue
        billions = _architecture(getattr(request.config, role), role).num_params / 1e9
        paper = [row for row in PAPER_HOURS if row[0] == kind and abs(row[1] / billions - 1) < 0.1]
        beside = "".join(
            f"; the paper's {size}B on {gpus} GPUs: {taken}" for _, size, gpus, taken in paper
        )
        lines.append(f"{kind}, {billions:.1f}B on {request.count}: {value:.2f} h{beside}")
    return lines


def _mesh(axes: dict[str, int]) -> str:
    return f"{axes['data']}x{axes['fsdp']}x{axes['tensor']}"
