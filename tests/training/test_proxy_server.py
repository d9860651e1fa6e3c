"""Whole rounds with a server: it draws with the round's weights and keeps nothing afterwards.

These are real HTTP servers that load the served files with this package and answer with its
sampler, so their greedy answers equal the sampler's own.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import align, score
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, dump_config
from proxykd_jax.errors import UserError
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.generation.samples import KEPT, SampleStore
from proxykd_jax.models.hf_weights import load_model
from proxykd_jax.models.peft import load_adapter
from proxykd_jax.texts.tokenizer import Tokenizer, load_tokenizer
from tests.generation.fake_server import Body, FakeServer, Reply, completion
from tests.tiny_run import changed, copy_run, files_of, unfinish

GREEDY = {"align": {"sampling": {"temperature": 0}}}
ROUNDS = ("round_01", "round_02")


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Served:
    """Loads what it is told to, and answers with the built-in sampler at temperature 0.

    Args:
      base: folder of the base model.
      tokenizer: tokenizer that splits text prompts and joins answers.
      tells_ids: whether it answers with token ids, as vLLM and SGLang do.
    """

    def __init__(self, base: str, tokenizer: Tokenizer, *, tells_ids: bool = True) -> None:
        self.loaded: dict[str, Any] = {}
        self.begun: list[str] = []
        self._config, self._params = load_model(base)
        self._tokenizer, self._tells_ids = tokenizer, tells_ids
        self._lock, self._merged = threading.Lock(), None

    def other(self, path: str, body: Body) -> Reply:
        if "unload" in path:
            return Reply() if self.loaded.pop(body["lora_name"], None) else Reply(404)
        if path.endswith("load_lora_adapter"):
            lora, adapter = load_adapter(body["lora_path"], self._config)
            self.loaded[body["lora_name"]] = self._config.replace(lora=lora), self._params, adapter
            self.begun.append(body["lora_name"])
        elif path == "/update_weights_from_disk":
            self._merged = (*load_model(body["model_path"]), None)
            self.begun.append(body["model_path"])
        elif path == "/reset":
            self.loaded.clear()
        return Reply(200, {"success": True})

    def answer(self, body: Body) -> Reply:
        name, prompt = body.get("lora_path") or body["model"], body["prompt"]
        with self._lock:
            if self._merged is not None:
                model = self._merged
            else:
                if "generation_config" in body and name not in self.loaded:
                    self.loaded[name] = (*load_model(name), None)
                    self.begun.append(name)
                if name not in self.loaded:
                    return Reply(404, {"message": f"no model {name}"})
                model = self.loaded[name]
            ids = prompt if isinstance(prompt, list) else self._tokenizer.backend.encode(prompt).ids
            config, params, adapter = model
            (drawn,) = sample(
                (params, adapter), [Prompt(np.array(ids, np.int32), "row", body["max_tokens"])],
                config=config, seed=0, round_index=0, batch_size=8,
                settings=DrawSettings(
                    0.0, 1.0, self._tokenizer.vocab_size, (self._tokenizer.eos_id or 0,)
                ),
            )  # fmt: skip
        answer = drawn.tokens[:-1] if drawn.finished else drawn.tokens
        reason = "stop" if drawn.finished else "length"
        more = {"token_ids": drawn.tokens.tolist()} if self._tells_ids else {}
        text = self._tokenizer.decode(answer)
        return completion(text, reason, model=body["model"], prompt_tokens=len(ids), **more)


VLLM = {"api": "vllm"}
SGLANG_MERGED = {"api": "sglang", "serves": "merged"}
TRANSFORMERS = {"api": "transformers", "serves": "merged", "prompt_as": "text"}


@contextlib.contextmanager
def server_for(config: Config, **keys: Any) -> Iterator[tuple[Served, FakeServer, Config]]:
    """Gives a server of the config's proxy, and the config that samples with it."""
    base = str(config.proxy.path)
    keys = {**VLLM, "retries": 1, **keys}
    served = Served(base, load_tokenizer(base), tells_ids=keys["api"] != "transformers")
    with FakeServer(served.answer, models=(base,), other=served.other) as fake:
        server = {"url": fake.url, **keys}
        yield served, fake, changed(config, {"align": {"sampling": {"server": server}}})


@pytest.fixture(scope="module")
def greedy(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns a run whose rounds the built-in sampler drew at temperature 0."""
    config = copy_run(finished_run, tmp_path_factory.mktemp("greedy"))
    for name in ("proxy", "samples", "soft_labels", "student", "export", "eval"):
        shutil.rmtree(config.folder / name)
    (config.folder / "metrics.jsonl").unlink()
    config = changed(config, GREEDY)
    align.main(config)
    return config


def to_align(config: Config, runs: Path) -> Config:
    """Copies a run of which only the corpus is complete."""
    shutil.copytree(config.folder / "corpus", runs / config.name / "corpus")
    return changed(config, {"runs_dir": str(runs)})


def stores(config: Config) -> list[SampleStore]:
    return [SampleStore(config.folder / "samples" / name) for name in ROUNDS]


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(VLLM, id="vllm"),
        pytest.param(SGLANG_MERGED, id="sglang", marks=pytest.mark.slow),
        pytest.param(TRANSFORMERS, id="transformers", marks=pytest.mark.slow),
    ],
)
def test_a_served_round_is_the_round_that_we_would_have_drawn(greedy, tmp_path, keys):
    """Answers, references and the trained proxy are the same: the server has the weights at the
    start of the round, and nothing else depends on who draws."""
    with server_for(to_align(greedy, tmp_path), **keys) as (served, fake, config):
        align.main(config)
        bodies = fake.bodies()
    assert len(set(served.begun)) == len(served.begun) == 2  # once per round, under different names
    assert not served.loaded and not (config.folder / "served").exists()
    for ours, theirs in zip(stores(greedy), stores(config), strict=True):
        np.testing.assert_array_equal(theirs.rows, ours.rows)
        a, b = (store.read(range(len(ours))) for store in (ours, theirs))
        same = [
            np.array_equal(x.tokens, y.tokens) and x.drop == y.drop
            for x, y in zip(a, b, strict=True)
        ]
        # A text with a word that is not a token (<unk>) is dropped; ids always match.
        assert np.mean(same) == 1 if keys["api"] != "transformers" else np.mean(same) > 0.9
        assert all(x.finished == y.finished for x, y, s in zip(a, b, same, strict=True) if s)
        counts = theirs.counts()
        assert counts.keys() == ours.counts().keys() - {"reference_gap"}
        if all(same):
            for mine, other in zip(ours.references(), theirs.references(), strict=True):
                np.testing.assert_allclose(other, mine, atol=1e-4)
    assert len(bodies) == sum(len(store) for store in stores(greedy))
    results = read_json(config.folder / "proxy" / MANIFEST)["results"]
    assert [line["phase"] for line in results] == ["raw", "warmup", *ROUNDS]


def test_what_is_recorded_of_the_server_and_what_may_change(greedy, tmp_path):
    """Its address and key are not recorded: another server of this kind can continue the run."""
    with server_for(to_align(greedy, tmp_path)) as (_, fake, config):
        align.main(config)
        before = files_of(config.folder / "samples", times=True)
    recorded = read_json(config.folder / "samples" / "round_02" / MANIFEST)
    assert recorded["settings"]["server"] == {
        "api": "vllm", "serves": "adapter", "model": None, "prompt_as": "ids"
    }  # fmt: skip
    for path in (
        *config.folder.glob("samples/*/manifest.json"),
        config.folder / "proxy" / MANIFEST,
    ):
        assert fake.url not in path.read_text()
    unfinish(config, "proxy", read_json(config.folder / "proxy" / MANIFEST)["results"][1]["step"])
    with server_for(config, concurrency=3, timeout_s=7.0) as (served, fake, elsewhere):
        align.main(elsewhere)  # runs the rounds again without drawing again
        assert not fake.requests and not served.begun
    assert files_of(config.folder / "samples", times=True) == before
    with (
        server_for(config, prompt_as="text") as (_, fake, other),
        pytest.raises(UserError, match=r"server.prompt_as: \"ids\" then, \"text\" now"),
    ):
        align.main(other)


def test_a_server_that_goes_away_leaves_whole_parts_and_the_same_command_goes_on(
    greedy, tmp_path, capsys
):
    with server_for(to_align(greedy, tmp_path)) as (served, fake, config):
        asked = 0
        answer = fake._answer

        def breaks(body: Body) -> Reply:
            nonlocal asked
            asked += 1
            return answer(body) if asked <= 20 else Reply(500, {"error": "out of memory"})

        fake._answer = breaks
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        assert run_command("align", align.main, "", ["--config", str(path)]) == 2
        said = capsys.readouterr().err
        assert "out of memory" in said and "Traceback" not in said
        store = SampleStore(config.folder / "samples" / "round_01")
        assert len(store) == 16 and not store.is_complete
        assert not (config.folder / "served").exists() and not served.loaded
        # As a killed run leaves them: an adapter on the server, and its folder.
        left = config.folder / "served" / "run-round-01-00000000"
        left.mkdir(parents=True)
        served.loaded[left.name] = None
        fake._answer = answer
        assert run_command("align", align.main, "", ["--config", str(path)]) == 0
        assert not served.loaded and not (config.folder / "served").exists()
    for ours, theirs in zip(stores(greedy), stores(config), strict=True):
        tokens = [
            [row.tokens.tolist() for row in store.read(range(len(store)))]
            for store in (ours, theirs)
        ]
        assert tokens[0] == tokens[1]


def test_fresh_prompts_are_answered_by_the_server_too(greedy, tmp_path):
    """The finished proxy answers. A complete store sends no request."""
    with server_for(to_align(greedy, tmp_path)) as (served, fake, config):
        score.main(config)
        assert len(served.begun) == 3 and not served.loaded
        asked = len(fake.requests)
        score.main(config)
        assert len(fake.requests) == asked
    store = SampleStore(config.folder / "samples" / "fresh")
    assert len(store) == 14 and (store.drops == KEPT).any()
    settings = read_json(store.folder / MANIFEST)["settings"]
    assert settings["server"]["api"] == "vllm" and settings["temperature"] == 1.0


def test_full_weights_have_no_adapter_to_serve(greedy):
    server = {"url": "http://127.0.0.1:9", "api": "vllm"}
    with pytest.raises(UserError, match="has no adapter to serve"):
        changed(
            greedy,
            {"proxy": {"trainable": "full"}, "align": {"sampling": {"server": server}}},
        )
