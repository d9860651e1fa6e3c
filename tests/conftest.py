"""Shared by all tests: strict jax settings, real files where they are at hand."""

import os
from pathlib import Path

import pytest

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
