"""Which layer may import which, and what an import costs.

The tests walk the syntax tree of every module. Imports inside functions count too.
"""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxykd_jax.__main__ import COMMANDS

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "proxykd_jax"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LAYERS = {
    **dict.fromkeys(
        ("errors", "config", "artifacts", "types", "peers", "status", "random_keys", "small_files"),
        0,
    ),
    "losses": 1,
    **dict.fromkeys(("models", "parallel"), 2),
    **dict.fromkeys(("texts", "data", "training", "generation"), 3),
    **dict.fromkeys(("evaluation", "tasks", "baselines", "reporting", "collecting"), 4),
}
STAGES = (
    *("collect", "prepare", "align", "score", "distill", "evaluate", "export", "report"),
    *("plan", "init", "check", "verify", "run", "tables", "chat", "push"),
)
# The command line itself, which is above every room and on the same layer as the stages.
LAYERS |= dict.fromkeys((*STAGES, "cli", "checking", "planning"), 5)
DELIVERED = (
    *("collect", "prepare", "align", "score", "distill", "evaluate", "export", "report"),
    *("plan", "init", "check", "verify", "run", "tables", "chat", "push"),
)

ARRAYS = {"jax", "numpy", "optax", "chex", "flax", "ml_dtypes"}
# The outside packages that the modules of a layer may import at their top level.
AT_IMPORT = {
    "errors": set(),
    "artifacts": set(),
    "peers": set(),
    "status": set(),
    "small_files": set(),
    "config": {"pydantic", "pydantic_core", "yaml"},
    "types": {"flax", "jax", "numpy"},
    "random_keys": {"jax", "numpy"},
    "losses": {"jax", "optax", "chex"},
    "models": ARRAYS | {"safetensors"},
    "parallel": ARRAYS,
    **dict.fromkeys(
        ("texts", "data", "training", "generation"), ARRAYS | {"safetensors", "xxhash"}
    ),
    "evaluation": ARRAYS,
    "tasks": ARRAYS,
    "baselines": ARRAYS,
    "reporting": ARRAYS,
    "checking": ARRAYS | {"yaml"},
    "planning": ARRAYS,
}
# These may only be imported inside functions, in any room: each takes a second or more.
LAZY = {
    *("tensorflow", "tensorflow_datasets", "array_record", "datasets", "pyarrow"),
    *("transformers", "tokenizers", "huggingface_hub", "jinja2", "orbax", "tensorstore"),
    *("matplotlib", "lm_eval", "tensorboardX", "wandb", "openai", "apache_beam"),
}
NEVER = {"torch", "pickle", "dill", "cloudpickle", "shelve", "marshal"}
# Packages that a declared package installs and imports itself.
COMES_WITH = {
    "pydantic_core": "pydantic",
    "ml_dtypes": "jax",
    "jaxlib": "jax",
    "pyarrow": "datasets",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "tensorstore": "orbax-checkpoint",
    "orbax": "orbax-checkpoint",
    "yaml": "pyyaml",
    "tensorflow": "tensorflow-cpu",
    "array_record": "array-record",
    "tensorflow_datasets": "tensorflow-datasets",
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module it names, the names it takes and where it stands."""

    target: str
    names: tuple[str, ...]
    line: int
    at_import: bool
    for_types: bool

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]


def _modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> Iterator[Import]:
    dotted = ["proxykd_jax", *path.relative_to(PACKAGE).with_suffix("").parts]
    yield from _walk(ast.parse(path.read_text(encoding="utf-8")), dotted, True, False)


def _walk(node: ast.AST, dotted: list[str], at_import: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, (), child.lineno, at_import, for_types)
        elif isinstance(child, ast.ImportFrom):
            base = dotted[: -child.level] if child.level else []
            target = ".".join([*base, *([child.module] if child.module else [])])
            names = tuple(alias.name for alias in child.names)
            yield Import(target, names, child.lineno, at_import, for_types)
        else:
            inside = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child))
            yield from _walk(child, dotted, inside, types)


def _rooms_of(found: Import) -> set[str]:
    """The rooms that an import of ours names: ``from proxykd_jax import data`` names data."""
    _, _, inner = found.target.partition(".")
    return {inner.partition(".")[0]} if inner else set(found.names) - {"__version__"}


def _where(path: Path, found: Import) -> str:
    return f"{path.relative_to(REPOSITORY)}:{found.line} imports {found.target}"


def test_the_walk_sees_every_kind_of_import():
    code = """
import jax
from proxykd_jax.data import parts
if TYPE_CHECKING:
    import optax
class A:
    import flax
def late():
    from . import sibling
    from ..models import decoder
    import orbax.checkpoint as ocp
"""
    seen = _walk(ast.parse(code), ["proxykd_jax", "training", "loop"], True, False)
    assert [(found.target, found.at_import, found.for_types) for found in seen] == [
        ("jax", True, False),
        ("proxykd_jax.data", True, False),
        ("optax", True, True),
        ("flax", True, False),
        ("proxykd_jax.training", False, False),
        ("proxykd_jax.models", False, False),
        ("orbax.checkpoint", False, False),
    ]


def test_every_module_has_a_layer():
    unknown = {_room(p) for p in _modules()} - set(LAYERS) - {"__init__", "__main__"}
    assert not unknown, f"give these a layer in this test: {sorted(unknown)}"


def test_no_module_imports_a_higher_layer():
    wrong = [
        f"{_where(path, found)}: layer {LAYERS[_room(path)]} -> {LAYERS[room]}"
        for path in _modules()
        if _room(path) in LAYERS
        for found in _imports(path)
        if found.root == "proxykd_jax"
        for room in _rooms_of(found)
        if LAYERS[room] > LAYERS[_room(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_losses_know_no_other_room():
    wrong = [
        _where(path, found)
        for path in _modules()
        if _room(path) == "losses"
        for found in _imports(path)
        if found.root == "proxykd_jax" and _rooms_of(found) != {"losses"}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_nothing():
    assert not list(_imports(PACKAGE / "__init__.py"))


def test_a_stage_calls_another_by_its_main_alone():
    wrong = [
        f"{_where(path, found)}: {', '.join(found.names)}"
        for path in _modules()
        if _room(path) in STAGES
        for found in _imports(path)
        if found.root == "proxykd_jax" and found.target != "proxykd_jax"
        if _rooms_of(found) & set(STAGES) - {_room(path)}
        if any(name != "main" and not name.endswith("Result") for name in found.names)
    ]
    assert not wrong, "\n".join(wrong)


def test_outside_imports_of_each_room():
    """The outside packages that a room loads when imported; TYPE_CHECKING blocks do not count."""
    wrong = [
        _where(path, found)
        for path in _modules()
        for found in _imports(path)
        if found.root != "proxykd_jax" and found.root not in sys.stdlib_module_names
        if found.at_import and not found.for_types
        if found.root not in AT_IMPORT.get(_room(path), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_losses_import_jax_optax_and_chex_even_lazily():
    wrong = [
        _where(path, found)
        for path in _modules()
        if _room(path) == "losses"
        for found in _imports(path)
        if found.root != "proxykd_jax" and found.root not in sys.stdlib_module_names
        if found.root not in AT_IMPORT["losses"]
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_never_imported():
    wrong = [
        _where(path, found)
        for path in _modules()
        for found in _imports(path)
        if found.root in NEVER or (found.root in LAZY and found.at_import and not found.for_types)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_is_hidden_in_a_string():
    calls = re.compile(r"\b(import_module|__import__)\(")
    wrong = [str(p) for p in _modules() if calls.search(p.read_text(encoding="utf-8"))]
    assert not wrong


def test_every_outside_import_is_declared():
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in lines}
    wrong = [
        _where(path, found)
        for path in _modules()
        for found in _imports(path)
        if found.root != "proxykd_jax" and found.root not in sys.stdlib_module_names
        if COMES_WITH.get(found.root, found.root).lower().replace("_", "-") not in declared
    ]
    assert not wrong, "\n".join(wrong)


# --- what an import really loads ------------------------------------------------------------------


def _loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint('LOADED', *{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("module", ["proxykd_jax", "proxykd_jax.errors", "proxykd_jax.artifacts"])
def test_light_modules_load_the_standard_library_alone(module):
    loaded = _loaded_by(f"import {module}") - _loaded_by("")
    assert loaded - sys.stdlib_module_names <= {"proxykd_jax"}


@pytest.mark.parametrize("module", ["proxykd_jax.config", "proxykd_jax.cli"])
def test_config_and_command_line_load_pydantic_and_yaml_alone(module):
    loaded = _loaded_by(f"import {module}")
    assert {"pydantic", "yaml"} <= loaded
    assert not loaded & (ARRAYS | LAZY | NEVER - {"pickle", "marshal"} | {"safetensors", "tqdm"})


def test_losses_load_nothing_heavy():
    loaded = _loaded_by("import proxykd_jax.losses")
    assert "jax" in loaded
    assert not loaded & (LAZY | {"torch", "pydantic", "safetensors"})


# --- the stage commands ---------------------------------------------------------------------------


def test_the_stage_commands_are_there():
    assert not [name for name in DELIVERED if not (PACKAGE / f"{name}.py").is_file()]


def _commands() -> list[str]:
    return [name for name in STAGES if (PACKAGE / f"{name}.py").is_file()]


def test_every_command_has_a_name_in_proxykd():
    assert sorted(COMMANDS) == sorted(_commands())
    assert PROJECT["scripts"] == {"proxykd": "proxykd_jax.__main__:main"}


def test_what_parses_arguments_loads_no_jax():
    """One process imports every command and prints the help of each."""
    code = (
        "from proxykd_jax.__main__ import COMMANDS, main\n"
        "for arguments in ['--help'], *([name, '--help'] for name in COMMANDS):\n"
        "    try:\n        main(arguments)\n"
        "    except SystemExit as end:\n        assert not end.code"
    )
    assert not _loaded_by(code) & (ARRAYS | LAZY | {"torch"})


@pytest.mark.parametrize("module", ["proxykd_jax", "proxykd_jax.align"])
def test_help_answers_within_a_second(module):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=REPOSITORY
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: " in done.stdout
    # Of the processor, because other work on the machine adds to the time of a clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
