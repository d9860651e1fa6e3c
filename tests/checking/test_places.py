"""Paths that do not exist: mistyped ones are problems, those of another machine are unchecked."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.places import missing_path, missing_repository


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "train.jsonl").touch()
    (tmp_path / "models" / "stories260K").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "place, said",
    [
        ("data/gsm8k/trian.jsonl", "data/gsm8k has no trian.jsonl. Did you mean train.jsonl?"),
        ("data/gsmk8/train.jsonl", "data has no gsmk8. Did you mean gsm8k?"),
        ("daat/gsm8k/train.jsonl", ". has no daat. Did you mean data?"),
        ("data/gsm8k/*.csv", "data/gsm8k has no *.csv. It holds train.jsonl."),
        ("data/gsm8k/train.jsonl/more", "data/gsm8k/train.jsonl is a file."),
    ],
)
@pytest.mark.parametrize("here", [False, True])
def test_a_mistyped_path_is_a_problem(place, said, here):
    findings = Findings(here=here)
    missing_path(findings, "corpus.sources.0", place)
    assert findings.problems == [f"corpus.sources.0: {place} does not exist: {said}"]
    assert not findings.unchecked


@pytest.mark.parametrize("place", ["scratch/other/train.jsonl", "/nowhere/train.jsonl", "x.jsonl"])
def test_a_path_of_another_machine(place):
    """Nothing of it exists here: unchecked in a dry run, a problem where the run is to start."""
    for here in (False, True):
        findings = Findings(here=here)
        missing_path(findings, "corpus", place)
        said = [f"corpus: {place} is not on this machine"]
        assert (findings.problems, findings.unchecked) == ((said, []) if here else ([], said))


def test_a_hub_name_is_never_a_problem():
    for here in (False, True):
        findings = Findings(here=here)
        missing_repository(findings, "proxy", "meta-llama/Llama-2-7b-hf")
        assert findings.unchecked == ["proxy: meta-llama/Llama-2-7b-hf is not on this machine"]
        assert not findings.problems


def test_a_local_folder_in_the_form_of_a_hub_name_is_mistyped():
    findings = Findings()
    missing_repository(findings, "proxy", "models/storys260K")
    assert findings.problems == [
        "proxy: models/storys260K does not exist: models has no storys260K. "
        "Did you mean stories260K?"
    ]
