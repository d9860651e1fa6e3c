"""Fixtures and settings for all tests: strict jax settings, and real files if they are present."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from proxykd_jax.config import Config

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile hundreds of tiny programs and run each once, so a program that is compiled soon is
# worth more than a fast one. A DPO step of two layers is compiled in 2.0 CPU-seconds with these
# flags, in 6.5 without the last two, and in 13.4 with XLA's defaults.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# The environment of a process that compiles as a user's does: it keeps the flags above away.
COMPILES_AS_USERS_DO = {"XLA_FLAGS": ""}
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing here uses Keras. TensorFlow imports it at once unless this variable names the older
# version. That takes 1.7 of the 5.0 CPU-seconds of its import, in each process that tests start.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
# Files whose tests take minutes, the longest first. They start before all others, so that the
# workers end at about the same time. xdist alone would start files with many tests first, and in
# the end one worker would be busy with the 36 kills of a single test.
LONGEST_FIRST = (
    "training/test_kills.py",
    "parallel/test_several_processes.py",
    "paper_tables/test_command.py",
    "paper_tables/test_equals_product.py",
    "parallel/test_eight_devices.py",
    "miniature/test_demo.py",
    "parallel/test_real_launchers.py",
    "training/test_real_server.py",
    "texts/test_full_size_recipes.py",
    "test_tables.py",
    "test_recipes.py",
    "training/test_first_loss.py",
    "training/test_alignment.py",
    "generation/test_sampler.py",
    "training/test_steps.py",
    "test_dry_run.py",
    "tasks/test_harness.py",
    "training/test_distillation.py",
    "test_plan.py",
    "training/test_exporting.py",
    "training/test_proxy_server.py",
    "baselines/test_gad.py",
    "baselines/test_mixing.py",
    "baselines/test_minillm.py",
    "baselines/test_mentor_kd.py",
    "baselines/test_forward_kl.py",
    "texts/test_prepare.py",
)


def pytest_configure() -> None:
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files: first ``LONGEST_FIRST``, then files with many tests, as xdist does."""
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path, len(places)), -counts[item.path]))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs, which use up memory mappings (``parallel/mappings.py``)."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; the test is skipped if it is absent."""
    folder = Path(os.environ.get("PROXYKD_ASSETS", REPOSITORY.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real files: {folder} does not exist (set PROXYKD_ASSETS)")
    return folder


@contextlib.contextmanager
def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that all workers of this test run share; only one worker at a time enters."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _keep_compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All workers of this test run, and processes that they start, share compiled programs."""
    from tests import tiny_run

    # The two halves of a CI run share their programs. They never use those of another machine.
    kept = os.environ.get("PROXYKD_TESTS_COMPILED")
    with _shared_folder(tmp_path_factory) as folder:
        tiny_run.keep_compiled(Path(kept) if kept else folder / "compiled")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and corpus of a tiny run (``tests/tiny_run.py``)."""
    from tests import tiny_run

    with _shared_folder(tmp_path_factory) as folder:
        if not (folder / "files").exists():
            tiny_run.make_files(folder / "files")
    return folder / "files"


@pytest.fixture(scope="session")
def finished_run(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a run of all stages. Its folder is shared: change a ``copy_run`` of it."""
    from proxykd_jax import run
    from tests import tiny_run

    with _shared_folder(tmp_path_factory) as folder:
        config = tiny_run.recipe(tiny_files, folder / "runs")
        if not (config.folder / "eval" / "summary.json").exists():
            run.main(config)
    return config
