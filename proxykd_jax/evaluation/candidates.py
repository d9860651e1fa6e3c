"""The models that answer or are measured: a run's, a folder, a server, or collected outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from proxykd_jax.artifacts import MANIFEST, digest_file, read_manifest, stage_identity
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.errors import UserError
from proxykd_jax.training.model import Model, load_for_training, model_identity
from proxykd_jax.training.restore import Which, finished_step, load_aligned_proxy, load_student

KNOWN = (
    "student, student:best, student:last, student:before, student:exported, proxy, proxy:best, "
    "proxy:last, proxy:raw, proxy:warmup, proxy:round_N, proxy:exported, the folder of a model, "
    "http://host:port#model, or a .jsonl file of collected outputs"
)
_NAMED = re.compile(r"([\w.-]+)=(.+)")
_SERVER = re.compile(r"(https?://[^/?#@\s]+(?:/[^?#@\s]*)?)#(\S+)")


@dataclass(frozen=True)
class Candidate:
    """A model that can be measured.

    Attributes:
      identity: identifies the model; an equal identity is not measured again.
      load: loads it onto the mesh.
      tokenizer: folder of its own tokenizer; None for the run's.
    """

    identity: dict[str, Any]
    load: Callable[[Mesh], Model]
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Server:
    """A model on an OpenAI-compatible server."""

    url: str
    model: str

    @property
    def identity(self) -> dict[str, Any]:
        """The name of the model; the server's address may change."""
        return {"endpoint": self.model}


@dataclass(frozen=True)
class Collected:
    """A file of outputs that another program collected."""

    path: Path

    @property
    def identity(self) -> dict[str, Any]:
        """The file's digest."""
        return {"outputs": digest_file(self.path)}


def from_section(config: Config, role: str, section: ModelSection) -> Candidate:
    """The untrained model that a section of the config names."""
    identity = {
        "model": model_identity(section),
        "first_layers": section.init.first_layers if section.init else None,
        "dtype": section.dtype,
    }
    return Candidate(
        identity, lambda mesh: load_for_training(section, role=role, seed=config.seed, mesh=mesh)
    )


def named_candidate(config: Config, text: str) -> tuple[str, Candidate | Server | Collected]:
    """(name, model) of an entry of ``evaluate.benchmarks.models``.

    Raises:
      UserError: it names nothing that exists.
    """
    match = _NAMED.fullmatch(text)
    name, what = (match[1], match[2]) if match else (None, text)
    server = _SERVER.fullmatch(what)
    if server:
        return name or _plain(server[2]), Server(server[1], server[2])
    if what.startswith(("http://", "https://")):
        raise UserError(
            f"evaluate.benchmarks.models: {what} names no model; write http://host:port#model, "
            "without /v1."
        )
    if what.endswith(".jsonl"):
        if not Path(what).is_file():
            raise UserError(f"evaluate.benchmarks.models: the file {what} does not exist.")
        return name or _plain(Path(what).stem), Collected(Path(what))
    role, _, which = what.partition(":")
    if role == "student" and not Path(what).is_dir():
        return name or _plain(what), _student(config, which)
    if role == "proxy" and not Path(what).is_dir():
        return name or _plain(what), _proxy(config, which)
    if not Path(what).expanduser().is_dir():
        raise UserError(f"evaluate.benchmarks.models: {what} is none of these: {KNOWN}.")
    return name or _plain(Path(what).name), _folder(config, Path(what).expanduser())


def _student(config: Config, which: str) -> Candidate:
    folder = config.folder / "student"
    if which == "before":
        return from_section(config, "student", config.student)
    if which == "exported":
        return _folder(config, config.folder / "export" / "student")
    state = _state(config, "student", which)
    identity = {"stage": _stage(folder), "step": finished_step(folder, state)}
    return Candidate(identity, lambda mesh: load_student(config, mesh, state))


def _proxy(config: Config, which: str) -> Candidate:
    folder = config.folder / "proxy"
    if which == "raw":
        return from_section(config, "proxy", config.proxy)
    if which == "exported":
        return _exported_proxy(config)
    if re.fullmatch(r"warmup|round_\d+", which):
        step: int | None = _phase_step(folder, which)
        assert step is not None
        return Candidate(
            {"stage": _stage(folder), "step": step},
            lambda mesh: load_aligned_proxy(config, mesh, step),
        )
    state = _state(config, "proxy", which)
    identity = {"stage": _stage(folder), "step": finished_step(folder, state)}
    return Candidate(identity, lambda mesh: load_aligned_proxy(config, mesh, state))


def _phase_step(folder: Path, phase: str) -> int:
    _stage(folder)
    steps = {each["phase"]: each["step"] for each in read_manifest(folder)["results"]}
    number = re.sub(r"\d+", lambda digits: f"{int(digits[0]):02d}", phase)
    if number not in steps:
        raise UserError(
            f"evaluate.benchmarks.models: {folder} has no phase {phase}; it has {', '.join(steps)}."
        )
    return int(steps[number])


def _state(config: Config, role: str, which: str) -> Which:
    states: dict[str, Literal["best", "last"]] = {"best": "best", "last": "last"}
    if which and which not in states:
        raise UserError(f"evaluate.benchmarks.models: {role}:{which} is none of these: {KNOWN}.")
    return states.get(which, config.export.state)


def _stage(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"evaluate.benchmarks.models: {folder} does not exist: the run has not trained this "
            "model. Run proxykd run first, or name another model."
        )
    return stage_identity(folder)


def _exported_proxy(config: Config) -> Candidate:
    merged, adapter = (config.folder / "export" / name for name in ("proxy", "proxy_adapter"))
    if merged.is_dir() or not adapter.is_dir():
        return _folder(config, merged)
    section = config.proxy.model_copy(update={"adapter": str(adapter)})
    return from_section(config, "proxy", section)


def _folder(config: Config, folder: Path) -> Candidate:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"evaluate.benchmarks.models: {folder} holds no model (there is no config.json)."
        )
    section = ModelSection(path=str(folder), dtype=config.student.dtype)
    candidate = from_section(config, "folder", section)
    own = folder if (folder / "tokenizer.json").is_file() else None
    return Candidate(candidate.identity, candidate.load, own)


def _plain(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "model"
