"""Where a model's files are found: in a folder first, on the hub last."""

import huggingface_hub
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.models.folder import MODEL_FILES, local_folder


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The requests to the hub, which answers with a folder."""
    calls = []

    def download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_folder_is_taken_whatever_its_name(tmp_path, monkeypatch, asked):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_folder("owner/model").samefile(tmp_path / "owner" / "model")
    assert local_folder("~/owner") == tmp_path / "owner"
    assert local_folder(tmp_path) == tmp_path
    assert asked == []


def test_a_name_is_asked_of_the_hub(tmp_path, asked):
    assert local_folder("owner/some-model.v2", ["tokenizer.json"]) == tmp_path / "cache"
    local_folder("gpt2")
    assert asked == [("owner/some-model.v2", ["tokenizer.json"]), ("gpt2", list(MODEL_FILES))]


@pytest.mark.parametrize("name", ["/absent", "./absent", "../a", "~/a/b", "a/b/c", "a b", "a/"])
def test_what_is_no_name_is_not_asked_of_the_hub(tmp_path, monkeypatch, asked, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder, and it is not a hub name"):
        local_folder(name)
    assert asked == []


def test_a_file_is_no_folder(tmp_path, asked):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a file"):
        local_folder(tmp_path / "config.json")
    assert asked == []


@pytest.mark.parametrize("error", [ConnectionError(), OSError("offline\nand more")])
def test_a_hub_that_fails_is_one_sentence_with_its_reason(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"hub \((ConnectionError|offline)\)\. Give a folder"):
        local_folder("owner/model")
