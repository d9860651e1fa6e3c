"""Shared by all tests: strict jax settings, real files where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from proxykd_jax.config import Config

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile hundreds of tiny programs and run each once: unoptimised code is ready sooner
# (measured: 22 instead of 38 CPU-seconds for the accumulation tests).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PROXYKD_ASSETS", REPOSITORY.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real files: {folder} does not exist (set PROXYKD_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and corpus of a tiny run (``tests/tiny_run.py``); compiled programs are kept."""
    from tests import tiny_run

    tiny_run.keep_compiled(tmp_path_factory.mktemp("compiled"))
    return tiny_run.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def finished_run(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a run of all stages. Its folder is shared: change a ``copy_run`` of it."""
    from proxykd_jax import run
    from tests import tiny_run

    config = tiny_run.recipe(tiny_files, tmp_path_factory.mktemp("runs"))
    run.main(config)
    return config
