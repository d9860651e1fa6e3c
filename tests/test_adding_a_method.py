"""The example of docs/adding_a_method.md can be applied, and works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def test_the_example_applies_and_is_a_method(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "adding_a_method.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```\n", text, re.DOTALL)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in ("proxykd_jax", "configs", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / "tests" / "baselines").mkdir(parents=True)
    subprocess.run(["git", "apply"], input=diff, text=True, cwd=tmp_path, check=True)
    code = (
        "from proxykd_jax.baselines import method_of, tvd\n"
        "from proxykd_jax.config import load_config\n"
        "config = load_config('configs/tvd.yaml')\n"
        "assert method_of(config) is tvd and config.method.weight == 10\n"
    )
    environment = {"PROXYKD_ASSETS": str(tmp_path), "PATH": "", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
