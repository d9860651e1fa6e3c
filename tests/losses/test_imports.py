"""Importing the losses loads jax, optax and chex, and nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import proxykd_jax.losses as losses

HEAVY = ("tensorflow", "transformers", "orbax", "flax", "datasets", "torch", "matplotlib",
         "pydantic", "yaml", "safetensors", "tensorflow_datasets", "array_record")  # fmt: skip


def test_importing_the_losses_loads_nothing_heavy():
    code = (
        "import sys; import proxykd_jax.losses;"
        f"print([m for m in {HEAVY!r} if m in sys.modules],"
        " sorted(m for m in sys.modules if m.startswith('proxykd_jax')"
        " and not m.startswith('proxykd_jax.losses')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['proxykd_jax']"


def test_sources_import_only_what_the_layer_allows():
    allowed = {"jax", "optax", "chex", "proxykd_jax"} | set(sys.stdlib_module_names)
    for file in Path(losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"
                if name.startswith("proxykd_jax"):
                    assert name.startswith("proxykd_jax.losses"), f"{file.name} imports {name}"


def test_everything_public_is_documented():
    for name in losses.__all__:
        value = getattr(losses, name)
        if callable(value):
            assert value.__doc__ and value.__module__.startswith("proxykd_jax.losses"), name
