"""Compares every file that a run wrote with its digest, and says what made it.

Run it as ``proxykd verify runs/my_run``. With ``--config`` it also says whether the
stages fit a config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import (
    MANIFEST,
    changed_files,
    read_json,
    read_manifest,
    read_record,
)
from proxykd_jax.cli import program, run_work
from proxykd_jax.errors import UserError

SUMMARY = "Compare every file of a run with its digest; say what made it, and whether it is whole."


def command(argv: Sequence[str] | None = None) -> int:
    """Verifies the folders that are named; returns the exit code: 2 if a file is damaged."""
    parser = argparse.ArgumentParser(
        prog=program("verify"), description=SUMMARY, allow_abbrev=False
    )
    parser.add_argument("path", help="folder of a run, of one of its stages, or an exported model")
    parser.add_argument("--config", metavar="FILE", help="say whether the stages fit this config")
    arguments = parser.parse_args(argv)

    def work() -> int:
        main(arguments.path, config=arguments.config)
        return 0

    return run_work(work)


def main(path: Path | str, *, config: Path | str | None = None) -> None:
    """Prints a line for each stage, checkpoint and export below a folder.

    Args:
      path: folder of a run, of one of its stages, or an exported model.
      config: a config file that the run should fit.

    Raises:
      UserError: nothing there was made by this program, a file is damaged, or a stage does not fit
        the config; one message lists all problems.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a run's folder, such as runs/my_run.")
    problems: list[str] = []
    found = 0
    for manifest in sorted(folder.rglob(MANIFEST)):
        found += _verify_stage(manifest.parent, problems)
    for record in sorted(folder.rglob("export/*.json")):
        found += _verify_export(record, problems)
    for sums in sorted(folder.rglob("eval/*.safetensors")):
        found += _verify_sums(sums, problems)
    for summary in sorted(folder.rglob("eval/summary.json")):
        problems += _unmeasured(summary)
    own_record = folder.parent / f"{folder.name.removesuffix('_adapter')}.json"
    if not found and own_record.is_file():
        found += _verify_export(own_record, problems)
    if not found:
        raise UserError(f"{folder} holds nothing that this program made and can verify.")
    if config is not None:
        problems += _unlike_config(folder, Path(config))
    if problems:
        raise UserError("\n".join(problems))
    print("verify: every file is as it was written", flush=True)


def _verify_stage(folder: Path, problems: list[str]) -> int:
    """Prints what a stage is; adds what is wrong with it. Returns 1 if it is a stage."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        problems.append(str(error))
        return 1
    if "stage" not in manifest:
        return 0
    files = manifest.get("files") or {}
    wrong = changed_files(folder, files)
    size = sum(entry["bytes"] for entry in files.values())
    checked = f"{len(files)} files, {size:,} bytes" if files else "no files of its own"
    digests = sorted((folder / "digests").glob("*.json"), key=lambda path: int(path.stem))
    for path in digests:
        wrong += changed_files(folder / "checkpoints" / path.stem, read_json(path))
    if digests:
        checked = f"checkpoints of steps {', '.join(path.stem for path in digests)}"
    kept = {manifest.get("best_step"), manifest.get("last_step"), *manifest.get("kept_steps", [])}
    there = {int(path.stem) for path in digests}
    wrong += [
        f"{folder} has no checkpoint of step {step}" for step in sorted(kept - there - {None, 0})
    ]
    _say(folder, f"{manifest['stage']}, {manifest['status']}, {checked}", wrong, manifest)
    problems += wrong
    return 1


def _verify_export(path: Path, problems: list[str]) -> int:
    record = read_record(path)
    if "made_from" not in record:
        return 0
    wrong = changed_files(path.parent, record.get("files", {}))
    _say(path.parent / path.stem, f"export, {len(record.get('files', {}))} files", wrong, record)
    problems += wrong
    return 1


def _unmeasured(summary: Path) -> list[str]:
    """The models of a summary whose sums are gone."""
    paths = [summary.parent / f"{name}.safetensors" for name in read_json(summary)["models"]]
    return [f"{path} is missing" for path in paths if not path.exists()]


def _verify_sums(path: Path, problems: list[str]) -> int:
    from proxykd_jax.evaluation.sums import read_sums

    wrong = []
    try:
        read_sums(path)
    except UserError as error:
        wrong.append(str(error))
    _say(path, "measurements", wrong, {})
    problems += wrong
    return 1


def _say(folder: Path, what: str, wrong: Sequence[str], made: dict[str, Any]) -> None:
    version = made.get("code_version")
    by = f", made by version {version}" if version else ""
    print(f"{'DAMAGED' if wrong else 'whole':<8} {folder}: {what}{by}", flush=True)


def _unlike_config(run: Path, path: Path) -> list[str]:
    """What the stages of a run were made with and a config says otherwise."""
    from proxykd_jax.artifacts import unlike_settings
    from proxykd_jax.config import load_config
    from proxykd_jax.data.corpus import corpus_settings
    from proxykd_jax.training.stage import training_settings

    config = load_config(path, [])
    expected = {
        "corpus": corpus_settings(config),
        "proxy": training_settings(config, "align", "proxy"),
        "student": training_settings(config, "distill", "student"),
    }
    return [
        f"{run / stage} was made with other settings than {path}: {difference}"
        for stage, settings in expected.items()
        if (run / stage / MANIFEST).is_file()
        for difference in unlike_settings(run / stage, settings)
    ]


if __name__ == "__main__":
    sys.exit(command())
