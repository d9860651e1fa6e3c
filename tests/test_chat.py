"""Chat: the prompt of a conversation, real answers on the command line, and what is no model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from proxykd_jax import chat
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import LoraConfig
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.peft import save_adapter


class _Renderer:
    """Four tokens a message."""

    template_text = "any"

    def encode_all(self, rows: Any, prompts_only: bool) -> list[Any]:
        self.messages = [(message.role, message.content) for message in rows[0].messages]
        return [SimpleNamespace(tokens=np.zeros(4 * len(self.messages), np.int32))]


def test_the_earliest_turns_make_room():
    renderer = _Renderer()
    config = SimpleNamespace(max_positions=24)
    talk = chat.Chat((None, None), config, renderer, system="be brief")  # type: ignore[arg-type]
    talk.turns = [("a", "b"), ("c", "d")]
    assert len(talk._prompt_tokens("e")) == 16 and talk.dropped == 1
    assert renderer.messages == [
        *(("system", "be brief"), ("user", "c"), ("assistant", "d"), ("user", "e")),
    ]
    config.max_positions = 15
    with pytest.raises(UserError, match="8 tokens, and the model has 15 positions"):
        talk._prompt_tokens("e")


def test_a_real_model_talks(
    assets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """An adapter that changes nothing says the same, and one line after another is answered."""
    model = str(assets / "models" / "stories260K")
    config = read_config(model).replace(lora=LoraConfig(2, 4.0, ("q_proj",)))
    save_adapter(tmp_path / "a", init_adapter(jax.random.key(0), config), config, model)
    greedy = ("--temperature", "0", "--max-tokens", "16")
    assert chat.command([model, "--once", "Once upon a time", *greedy]) == 0
    answer, noise = capsys.readouterr()
    assert answer.startswith(", there was a little girl named ") and noise == ""
    lines = iter(["Once upon a time", " ", "The dog"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or _end())
    assert chat.command(["--model", str(tmp_path / "a"), *greedy]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"{first}\n" == answer and second


def _end() -> str:
    raise EOFError


def test_what_is_no_model_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 1}))
    for place, said in (
        (tmp_path, "holds no model: there is neither config.json nor adapter_config.json"),
        (adapter, "names no base model"),
        (tmp_path / "absent", "there is no such folder"),
    ):
        assert chat.command([str(place), "--once", "a"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and said in err
    for wrong in (["--top-p", "0"], ["--max-tokens", "0"], ["--temprature", "1"]):
        with pytest.raises(SystemExit) as ended:
            chat.command([str(tmp_path), *wrong])
        assert ended.value.code == 2
    assert "did you mean '--temperature'?" in capsys.readouterr().err
