"""Runs that the tests of this folder share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from proxykd_jax.config import Config
from tests.reporting.made_run import make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that all tests share. To change it, take the copy ``folder``."""
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Config, tmp_path: Path) -> Path:
    """A copy of the folder of the shared run."""
    return Path(shutil.copytree(made.folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def other(made: Config) -> Config:
    """Another run of the same files, with other settings and figures."""
    root = Path(made.runs_dir).parent
    return make_run(root, "other", rounds=2, seed=1, distill={"alpha": 3.0})
