"""Damage of a run's files: ``verify`` names it, readers refuse it, a stage's command mends it."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest

from proxykd_jax import export, prepare, score, verify
from proxykd_jax.artifacts import MANIFEST, verification
from proxykd_jax.config import Config, dump_config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.soft_labels import open_soft_labels
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.models.hf_weights import load_model
from tests.tiny_run import copy_run, files_of

# One place in each kind of file that a run writes and a later stage reads.
KINDS = (
    "corpus/*.array_record-*",
    "corpus/index/*/*.safetensors",
    f"corpus/{MANIFEST}",
    "proxy/checkpoints/*/state/**/*",
    "proxy/checkpoints/*/progress/*",
    f"proxy/{MANIFEST}",
    "samples/*/*.safetensors",
    "samples/*/reference/*.safetensors",
    f"samples/*/{MANIFEST}",
    "soft_labels/**/*.safetensors",
    f"soft_labels/{MANIFEST}",
    "student/checkpoints/*/state/**/*",
    "export/student/*.safetensors",
    "export/student/config.json",
    "export/student/tokenizer.json",
    "export/proxy_adapter/*",
    "eval/*.safetensors",
)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x04
    path.write_bytes(data)


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def delete(path: Path, at: float) -> None:
    path.unlink()


@pytest.fixture
def run(finished_run, tmp_path) -> Config:
    return copy_run(finished_run, tmp_path / "runs")


def test_a_whole_run(run, capsys):
    assert verify.command([str(run.folder)]) == 0
    said = capsys.readouterr().out
    for what in ("corpus: prepare", "proxy: align", "soft_labels: score", "student: distill"):
        assert f"{run.folder}/{what}, complete" in said
    assert "DAMAGED" not in said
    assert verify.command([str(run.folder / "soft_labels")]) == 0
    assert verify.command([str(run.folder / "nothing")]) == 2


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_every_damage_is_named(run, capsys, damage):
    places = random.Random(damage.__name__)
    for kind in KINDS:
        found = [path for path in sorted(run.folder.glob(kind)) if path.is_file()]
        assert found, kind
        path = places.choice([path for path in found if path.stat().st_size])
        kept = path.read_bytes()
        damage(path, places.random() * 0.98)
        if path.exists() and path.read_bytes() == kept:
            continue
        code = verify.command([str(run.folder)])
        err = capsys.readouterr().err
        # A manifest that is gone leaves a folder that is no stage; all others are named.
        assert code == 2 or (damage is delete and path.name == MANIFEST), (kind, path)
        assert "Traceback" not in err
        path.write_bytes(kept)
    assert verify.command([str(run.folder)]) == 0


@pytest.mark.parametrize("damage", [flip, cut, delete])
@pytest.mark.parametrize("kind", ["corpus/*.array_record-*", "corpus/index/*/*.safetensors"])
def test_prepare_makes_damaged_files_again(run, capsys, damage, kind):
    before = files_of(run.folder / "corpus")
    path = sorted(run.folder.glob(kind))[0]
    damage(path, 0.5)
    with pytest.raises(UserError, match=r"corpus is damaged: .* Run proxykd prepare"):
        open_corpus(run.folder / "corpus")
    prepare.main(run)
    assert "These files are made again" in capsys.readouterr().out
    after = files_of(run.folder / "corpus")
    assert after == before


def test_score_makes_damaged_files_again(run):
    folder = run.folder / "soft_labels"
    before = files_of(folder)
    parts = sorted(folder.rglob("*.safetensors"))
    flip(parts[0], 0.7)
    parts[-1].unlink()
    with pytest.raises(UserError, match=r"soft_labels is damaged: .*; .* is missing"):
        open_soft_labels(folder)
    score.main(run)
    assert files_of(folder) == before


def test_a_linked_stage_is_left_alone(run, tmp_path):
    """A damaged stage that belongs to another run is named, and nothing of it is removed."""
    mine = copy_run(run, tmp_path / "mine")
    shutil.rmtree(mine.folder / "corpus")
    (mine.folder / "corpus").symlink_to(run.folder / "corpus")
    path = sorted((run.folder / "corpus").glob("*.array_record-*"))[0]
    flip(path, 0.5)
    damaged = path.read_bytes()
    with pytest.raises(UserError, match="is a link to a damaged stage"):
        prepare.main(mine)
    assert path.read_bytes() == damaged


def test_damaged_samples_are_not_read(run):
    for part in itertools.chain(
        (run.folder / "samples").glob("*/*.safetensors"),
        (run.folder / "samples").glob("*/reference/*.safetensors"),
    ):
        kept = part.read_bytes()
        flip(part, 0.9)
        round_folder = part.parent if part.parent.name != "reference" else part.parent.parent
        with pytest.raises(UserError, match="is damaged"):
            store = SampleStore(round_folder)
            store.read(range(len(store)))
            store.references()
        part.write_bytes(kept)


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_a_damaged_export_is_refused_and_written_again(run, capsys, damage):
    folder = run.folder / "export" / "student"
    before = files_of(folder)
    damage(next(folder.glob("*.safetensors")), 0.7)
    with pytest.raises(UserError, match=r"student is damaged: .* Run python -m proxykd_jax.export"):
        load_model(folder)
    export.main(run)
    assert "The model is exported again" in capsys.readouterr().out
    assert files_of(folder) == before


def test_how_much_is_compared(run):
    """Without verification names and sizes are compared, and nothing is read."""
    path = sorted((run.folder / "corpus").glob("*.array_record-*"))[0]
    kept = path.read_bytes()
    flip(path, 0.5)
    with verification("off"):
        open_corpus(run.folder / "corpus")
    with verification("sampled"), pytest.raises(UserError, match="digest differs"):
        open_corpus(run.folder / "corpus")  # a small file
    path.write_bytes(kept[:-1])
    with verification("off"), pytest.raises(UserError, match="bytes, not"):
        open_corpus(run.folder / "corpus")


def test_whether_the_stages_fit_a_config(run, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run))
    assert verify.command([str(run.folder), "--config", str(path)]) == 0
    changed = run.model_copy(update={"seed": 99})
    path.write_text(dump_config(changed))
    assert verify.command([str(run.folder), "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert "student was made with other settings" in err and "seed: " in err
