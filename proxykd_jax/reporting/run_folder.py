"""Reads a run's folder in any state: finished, unfinished, killed, or from an older version."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import MANIFEST, read_json, read_manifest
from proxykd_jax.config import Config, load_config
from proxykd_jax.errors import UserError
from proxykd_jax.training.metrics import read_metrics

# Folder of a stage -> the command that makes it.
STAGES = {"corpus": "prepare", "proxy": "align", "soft_labels": "score", "student": "distill"}
# Errors that reading a file of an older or killed run may raise.
UNREADABLE = (UserError, OSError, KeyError, IndexError, TypeError, ValueError, AttributeError)

Line = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The content of a run's files.

    Attributes:
      folder: the run.
      label: its name on the page.
      config: the run's config; None if this version cannot read it.
      settings: the resolved config as plain data; empty if there is none.
      config_text: config.yaml; None if there is none.
      manifests: manifests of the started stages, by folder.
      lines: lines of metrics.jsonl; those of each stage by increasing step.
      problems: one sentence for each thing that could not be read.
      price_per_hour: of all machines together; None if unknown.
    """

    folder: Path
    label: str
    config: Config | None
    settings: dict[str, Any]
    config_text: str | None
    manifests: dict[str, dict[str, Any]]
    lines: list[Line]
    problems: list[str]
    price_per_hour: float | None = None

    def setting(self, key: str) -> Any:
        """The value of a key such as ``align.num_rounds``; None if unknown."""
        node: Any = self.settings
        for name in key.split("."):
            if not isinstance(node, dict) or name not in node:
                return None
            node = node[name]
        return node

    def is_complete(self, stage: str) -> bool:
        """Whether a stage (by folder) is done."""
        return self.manifests.get(stage, {}).get("status") == "complete"

    def of_stage(self, stage: str) -> list[Line]:
        """Lines of a stage (``align``, ``distill``, ...) that hold figures at a step."""
        return [line for line in self.lines if line.get("stage") == stage]

    def absent(self, stage: str) -> str | None:
        """Why a stage (by folder) has nothing to show; None if it is complete."""
        if self.is_complete(stage):
            return None
        command = f"proxykd {STAGES[stage]}"
        if stage in self.manifests:
            return f"Not finished: {command} continues it."
        needs = None if self.config is None else self.config.needs
        if (stage == "proxy" and needs == "nothing") or (
            stage == "soft_labels" and needs not in (None, "labels")
        ):
            return f"The method {self.setting('method.name')} does not need it."
        return f"Not there: {command} makes it."

    @property
    def has_benchmarks(self) -> bool:
        """Whether benchmarks were answered; the paper's tables are shown only beside them."""
        return any((self.folder / "eval" / "benchmarks").rglob("summary.json"))

    @property
    def summary(self) -> dict[str, Any]:
        """``eval/summary.json``; empty if there is none."""
        path = self.folder / "eval" / "summary.json"
        return dict(read_json(path)) if path.exists() else {}


def read_run(folder: Path, label: str | None = None) -> RunFolder:
    """Reads the files that exist.

    Args:
      folder: the run's folder.
      label: its name (default: the folder's name).

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a run is named by its folder, runs/<name>.")
    known = ("config.yaml", "metrics.jsonl", *(f"{stage}/{MANIFEST}" for stage in STAGES))
    if not any((folder / name).is_file() for name in known):
        inside = sorted(p.parent.name for p in folder.glob("*/config.yaml"))
        hint = f" It holds the runs {', '.join(inside)}: name one." if inside else ""
        raise UserError(
            f"{folder} holds no run: neither config.yaml nor metrics.jsonl nor a stage.{hint}"
        )
    problems: list[str] = []
    config, settings, text = _read_config(folder / "config.yaml", problems)
    manifests = {}
    for stage in STAGES:
        path = folder / stage / MANIFEST
        if path.is_file():
            found = _attempt(functools.partial(read_manifest, folder / stage), problems, {})
            if found:
                manifests[stage] = found
    lines: list[Line] = []
    damaged = 0
    if (folder / "metrics.jsonl").is_file():
        lines, damaged = read_metrics(folder / "metrics.jsonl")
    if damaged:
        problems.append(
            f"Left out of metrics.jsonl, because they cannot be read: {damaged} of its lines (a "
            "killed run leaves its last one half written)."
        )
    name = label or folder.resolve().name
    price = None if config is None else config.logging.price_per_hour
    return RunFolder(folder, name, config, settings, text, manifests, lines, problems, price)


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Reads several runs and gives each a different label.

    Raises:
      UserError: see ``read_run``; or one is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named twice; name each run once.")
    names = [place.name for place in places]
    labels = [
        f"{place.parent.name}/{place.name}" if names.count(place.name) > 1 else place.name
        for place in places
    ]
    labels = [
        str(place) if labels.count(label) > 1 else label
        for place, label in zip(places, labels, strict=True)
    ]
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read_config(
    path: Path, problems: list[str]
) -> tuple[Config | None, dict[str, Any], str | None]:
    """The config as this version reads it, as plain data, and as text."""
    if not path.is_file():
        problems.append("config.yaml is missing, so the settings are unknown.")
        return None, {}, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_config(path)
        return config, config.model_dump(mode="json"), text
    except UserError as error:
        problems.append(f"config.yaml is of another version ({str(error).splitlines()[0]}).")
    return None, _attempt(lambda: _plain_yaml(text), problems, {}), text


def _plain_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("config.yaml is no YAML.") from error
    return dict(data or {})


def _attempt(read: Callable[[], Any], problems: list[str], otherwise: Any) -> Any:
    try:
        return read()
    except UNREADABLE as error:
        problems.append(told(error))
        return otherwise


def told(error: BaseException) -> str:
    """An error as a sentence for a page."""
    if isinstance(error, UserError):
        return str(error)
    return f"Something in these files is not as expected ({type(error).__name__}: {error})."
