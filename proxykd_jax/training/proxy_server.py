"""Serves the proxy of a round: writes its weights, has a server load them, and unloads them."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from proxykd_jax.config import Config
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Sample
from proxykd_jax.generation.samples import SampleFunction
from proxykd_jax.generation.server import ServerClient
from proxykd_jax.generation.server_answers import make_served_draw
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.peft import save_adapter
from proxykd_jax.peers import is_first, on_first
from proxykd_jax.training.exporting import save_merged
from proxykd_jax.training.model import model_origin
from proxykd_jax.training.state import Weights


@contextlib.contextmanager
def serving(
    config: Config,
    model: ModelConfig,
    weights: Weights,
    settings: DrawSettings,
    *,
    corpus: TokenCorpus,
    round_index: int,
) -> Iterator[SampleFunction]:
    """Gives a ``draw(prompts, row_ids, budgets)`` by the configured server, within the block.

    The first draw writes the weights to ``<run>/served`` and has the server load them. The end of
    the block unloads and removes them, and what a killed run left there.

    Args:
      config: config of the run, with ``align.sampling.server``.
      model, weights: one state of the proxy: its architecture, and (params, adapter).
      settings, round_index: as in ``sampler.sample``.
      corpus: the corpus; its tokenizer is used.

    Raises:
      UserError: the server cannot be used; see ``ServerClient``.
    """
    server = config.align.sampling.server
    assert server is not None  # the caller checks this
    client = ServerClient(server, model_origin(config.proxy))
    place = config.folder / "served"
    # Each state gets a name of its own, because a server may cache what it loaded under a name.
    name = on_first(lambda: f"{config.name}-round-{round_index:02d}-{secrets.token_hex(4)}")
    folder = place / name
    made: list[SampleFunction] = []

    def prepare() -> None:
        client.check()
        _clear(place, client)

    def load() -> SampleFunction:
        from proxykd_jax.texts.tokenizer import load_tokenizer

        on_first(prepare)
        if server.serves == "adapter":
            assert weights[1] is not None  # the config allows this only with trainable: lora
            save_adapter(folder, weights[1], model, client.base)
        else:
            save_merged(folder, model, *weights, config, corpus, dtype=config.proxy.dtype)
        on_first(lambda: client.load(name, folder))
        return make_served_draw(
            client,
            name if server.serves == "adapter" else str(folder.resolve()),
            load_tokenizer(corpus.tokenizer_path),
            settings,
            seed=config.seed,
            round_index=round_index,
        )

    def draw(prompts: list[np.ndarray], row_ids: list[str], budgets: list[int]) -> list[Sample]:
        """Asks the server on one process, which passes the answers on to the others."""
        if not made:
            made.append(load())
        return [
            Sample(np.array(tokens, np.int32), finished, np.array(logps, np.float32), spelled)
            for tokens, finished, logps, spelled in on_first(
                lambda: [
                    (s.tokens.tolist(), s.finished, s.logps.tolist(), s.spelled)
                    for s in made[0](prompts, row_ids, budgets)
                ]
            )
        ]

    try:
        yield draw
    finally:
        if is_first():
            _clear(place, client)


def _clear(place: Path, client: ServerClient) -> None:
    """Unloads and removes everything in the folder of served weights."""
    for folder in sorted(place.glob("*")):
        client.unload(folder.name)
    shutil.rmtree(place, ignore_errors=True)
