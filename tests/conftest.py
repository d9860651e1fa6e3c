"""Shared by all tests: strict jax settings, real files where they are at hand."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
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
