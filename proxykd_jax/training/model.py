"""The models of a run: loaded, placed on the mesh, and ready for training or inference."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from proxykd_jax.config import Config, ModelSection
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.fingerprint import fingerprint
from proxykd_jax.models.folder import local_folder
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.hf_weights import load_model
from proxykd_jax.models.lora import init_adapter, merge
from proxykd_jax.models.params import abstract_params
from proxykd_jax.models.peft import load_adapter
from proxykd_jax.models.quantized import Method
from proxykd_jax.parallel.sharding import sharding_of, tree_shardings
from proxykd_jax.peers import on_first
from proxykd_jax.random_keys import role_key
from proxykd_jax.training.state import ModelSpec, Tree, Weights


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
      spec: the static half of the model.
      frozen: weights that do not learn; ``{}`` with ``trainable: full``.
      trainable: what learns: the adapter, or all weights in float32.
      folder: the folder that its weights were read from.
    """

    spec: ModelSpec
    frozen: Tree
    trainable: Tree
    folder: Path

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.spec.config

    def at(self, trainable: Tree) -> Model:
        """Returns the same model with newer trained weights."""
        return dataclasses.replace(self, trainable=trainable)

    @property
    def weights(self) -> Weights:
        """(params, adapter) for a forward pass."""
        return self.spec.bind(self.frozen, self.trainable)

    @property
    def weight_shapes(self) -> Weights:
        """The shapes of ``weights``, also for a model that consists of shapes."""
        found: Weights = jax.eval_shape(self.spec.bind, self.frozen, self.trainable)
        return found

    @property
    def params(self) -> Tree:
        """Weights for a forward pass."""
        return self.weights[0]

    @property
    def adapter(self) -> Tree | None:
        """The adapter for a forward pass, if there is one."""
        return self.weights[1]


def model_origin(section: ModelSection) -> str:
    """Returns the folder or hub name that a section's weights come from."""
    return section.init.path if section.init else str(section.path)


def lora_config(section: ModelSection) -> LoraConfig:
    """Returns the configuration of the new adapter that a section asks for."""
    lora = section.lora
    return LoraConfig(lora.rank, lora.alpha, lora.targets, lora.dropout)


def quantization(section: ModelSection) -> Method | None:
    """Returns how a section's frozen linear layers are quantised; None if they are not."""
    return None if section.quantize == "none" else section.quantize


def model_identity(section: ModelSection) -> str:
    """Returns a fingerprint of the files that a section names."""
    return on_first(lambda: _model_identity(section))


def _model_identity(section: ModelSection) -> str:
    identity = fingerprint(local_folder(model_origin(section)))
    if section.adapter:
        from proxykd_jax.artifacts import digest_files, digest_value

        folder = Path(section.adapter)
        identity += " " + digest_value(digest_files(folder, folder.glob("adapter_*")))
    return identity


def load_for_training(section: ModelSection, *, role: str, seed: int, mesh: Mesh) -> Model:
    """Loads the proxy or the student as its section says, sharded over the mesh.

    Args:
      section: ``config.proxy`` or ``config.student``.
      role: ``proxy`` or ``student``; selects the random key of a new adapter.
      seed: seed of the run.
      mesh: mesh that the arrays are placed on.

    Raises:
      UserError: files are missing, damaged or do not fit.
    """
    folder = local_folder(model_origin(section))
    full = section.trainable == "full"
    config = read_config(folder)
    # Report a mesh axis that does not divide an array before reading any weights.
    tree_shardings(abstract_params(config, quantize=quantization(section)), mesh)
    config, params = load_model(
        folder,
        dtype="float32" if full else section.dtype,
        config=config,
        first_layers=section.init.first_layers if section.init else None,
        quantize=quantization(section),
        sharding=lambda path: sharding_of("/".join(path), mesh),
    )
    lora = lora_config(section)
    adapter: Tree | None = None
    if section.adapter:
        found, adapter = load_adapter(section.adapter, config)
        lora = LoraConfig(found.rank, found.alpha, found.targets, lora.dropout, found.rslora)
    if full:
        if adapter is not None:
            params = merge(params, adapter, config.replace(lora=lora))
        spec = ModelSpec(config, "full", section.dtype, section.remat)
        return Model(spec, {}, params, folder)
    config = config.replace(lora=lora)
    if adapter is None:
        key = role_key(seed, role)
        shapes = jax.eval_shape(lambda: init_adapter(key, config))
        shardings = tree_shardings(shapes, mesh)
        adapter = jax.jit(lambda: init_adapter(key, config), out_shardings=shardings)()
    else:
        adapter = jax.device_put(adapter, tree_shardings(adapter, mesh))
    spec = ModelSpec(config, "lora", section.dtype, section.remat)
    return Model(spec, params, adapter, folder)


def check_tokenizers(config: Config, corpus: TokenCorpus) -> None:
    """Checks that the proxy and the student use the token ids of the corpus.

    Soft labels are token ids, so a mismatch would only show in a student that learns nonsense. This
    check therefore precedes any training. A model folder without a tokenizer is not checked.

    Raises:
      UserError: the maps from tokens to ids differ (the message names the first differences), or
        some ids have no embedding.
    """
    from proxykd_jax.texts.tokenizer import (
        check_embedding_rows,
        check_same_vocabulary,
        load_tokenizer,
    )

    ours = load_tokenizer(corpus.tokenizer_path)
    # A method without a proxy ignores this key, so it may name a model with another vocabulary.
    used = config.needs != "nothing"
    sections = (config.proxy, config.student) if used else (config.student,)
    for origin in dict.fromkeys(model_origin(section) for section in sections):
        folder = local_folder(origin)
        if origin != corpus.tokenizer_path and (folder / "tokenizer.json").is_file():
            check_same_vocabulary(ours, load_tokenizer(folder))
        check_embedding_rows(ours, read_config(folder).vocab_size, origin)
