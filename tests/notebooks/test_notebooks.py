"""Every notebook runs from top to bottom, calls what exists, and is committed without outputs."""

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_outputs_are_cleared(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_calls_fit_the_package(tmp_path, monkeypatch):
    """A changed signature is noticed here, in seconds, and not only by the slow runs."""
    api = pytest.importorskip("mypy.api")
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        (tmp_path / f"{path.stem}.py").write_text("\n\n".join(code), encoding="utf-8")
    monkeypatch.chdir(FOLDER.parent)  # here are mypy's settings and its cache
    # A notebook is no place for annotations, and knows which of its settings are given.
    lenient = ["--no-strict-optional", "--disable-error-code=operator"]
    lenient.append("--disable-error-code=var-annotated")
    said, _, status = api.run([*lenient, str(tmp_path)])
    assert status == 0, said


@pytest.mark.slow
@every_notebook
def test_runs(path, monkeypatch, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    # The kernel is a separate process, which must find this checkout and needs no screen.
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # these flags are for tests that compute little
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    plots = [
        output
        for cell in ran
        for output in cell.outputs
        if output.output_type == "display_data" and "image/png" in output.data
    ]
    assert plots, "the notebook shows no plot"
