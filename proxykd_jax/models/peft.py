"""Reads and writes LoRA adapters in PEFT's format, without PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from proxykd_jax.artifacts import check_export, write_json
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import LORA_TARGETS, LoraConfig, ModelConfig
from proxykd_jax.models.hf_config import read_flag, read_integer, read_number
from proxykd_jax.models.lora import Adapter, adapter_shapes, block_of
from proxykd_jax.models.params import ParamPath, flatten, unflatten
from proxykd_jax.models.tensor_files import Tensor, TensorFile, new_folder, write_file
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.small_files import read_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_NAME = re.compile(
    r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
# PEFT options that change the forward pass in ways that a plain LoRA tree cannot represent.
_MUST_BE_EMPTY = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
# Initialisations that do not change the base; the others subtract something from it.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    config: ModelConfig,
    base_model_name_or_path: str,
    *,
    overwrite: bool = False,
) -> None:
    """Writes an adapter in float32 that ``peft.PeftModel.from_pretrained`` loads.

    All processes must call this, because they hold parts of the weights; the first one writes.

    Raises:
      UserError: ``path`` is taken.
      ValueError: the config has no ``lora``, or the adapter has another shape.
    """
    shapes = dict(flatten(adapter_shapes(config)))
    lora = config.lora
    assert lora is not None  # adapter_shapes checked it
    leaves = dict(flatten(adapter))
    if leaves.keys() != shapes.keys() or any(leaves[p].shape != shapes[p] for p in shapes):
        raise ValueError("The adapter does not have the shape of config.lora.")

    def tensor(path: ParamPath, layer: int) -> Tensor:
        def make() -> np.ndarray:
            return fetch(leaves[path][layer]).T

        return _peft_name(path, layer), shapes[path][1:][::-1], make

    tensors = [tensor(leaf, layer) for layer in range(config.num_layers) for leaf in shapes]
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": lora.rslora,
        "use_dora": False,
        "init_lora_weights": True,
    }
    with new_folder(Path(path), overwrite) as folder:
        write_json(folder / CONFIG_FILE, record)
        write_file(folder / WEIGHTS_FILE, tensors, np.dtype(np.float32))


def load_adapter(path: str | Path, config: ModelConfig) -> tuple[LoraConfig, Adapter]:
    """Loads a PEFT adapter for the model ``config``, ignoring that config's own ``lora``.

    Returns:
      its LoRA settings, to put into the model config, and its tree in float32.

    Raises:
      UserError: not a PEFT LoRA folder; options that plain LoRA cannot represent (DoRA, ranks or
        alphas that differ between modules, trained biases, ...); tensors that do not fit the model.
    """
    folder = Path(path)
    check_export(folder)
    record = _read_record(folder)
    if not (folder / WEIGHTS_FILE).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}"
            + ("; pickled adapters can run code, convert it to safetensors." if pickled else ".")
        )
    file = TensorFile(folder / WEIGHTS_FILE)
    found: dict[ParamPath, dict[int, str]] = {}
    for name in file.names:
        match = _NAME.fullmatch(name)
        if match is None or match.group(3) not in LORA_TARGETS:
            raise UserError(
                f"{file.path}: {name} is not the LoRA weight of a linear layer of a block; "
                f"supported targets are {', '.join(LORA_TARGETS)}."
            )
        layer, _, target, letter = match.groups()
        leaf: ParamPath = ("layers", block_of(target), target, letter.lower())
        found.setdefault(leaf, {})[int(layer)] = name
    try:
        lora = LoraConfig(
            rank=read_integer(record, "r"),
            alpha=read_number(record, "lora_alpha"),
            targets=tuple({leaf[2] for leaf in found}),
            dropout=read_number(record, "lora_dropout", 0.0),
            rslora=read_flag(record, "use_rslora"),
        )
    except UserError as error:
        raise UserError(
            f"{folder / CONFIG_FILE}: r and lora_alpha must be numbers. {error}"
        ) from None
    shapes = dict(flatten(adapter_shapes(config.replace(lora=lora))))
    for leaf, shape in shapes.items():
        names = found.get(leaf, {})
        if sorted(names) != list(range(config.num_layers)):
            raise UserError(
                f"{file.path}: {'/'.join(leaf[1:])} is there for layers {sorted(names)}, the model "
                f"has {config.num_layers}; every layer must have it."
            )
        for name in names.values():
            if file.shape(name) != shape[1:][::-1]:
                raise UserError(
                    f"{file.path}: {name} has shape {file.shape(name)}, the model with rank "
                    f"{lora.rank} needs {shape[1:][::-1]}."
                )
    leaves: dict[ParamPath, Any] = {}
    for leaf, shape in shapes.items():
        stack = np.empty(shape, np.float32)
        for layer, name in found[leaf].items():
            stack[layer] = file.read(name).T
        leaves[leaf] = jnp.asarray(stack)
    return lora, unflatten(leaves)


def _peft_name(path: ParamPath, layer: int) -> str:
    _, block, target, letter = path
    module = "self_attn" if block == "attention" else block
    return f"base_model.model.model.layers.{layer}.{module}.{target}.lora_{letter.upper()}.weight"


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist; a PEFT adapter is a folder with it.")
    record = read_object(path, "adapter's config")
    if record.get("peft_type") != "LORA":
        raise UserError(f"{path} describes no LoRA adapter (peft_type must be LORA).")
    unsupported = [key for key in _MUST_BE_EMPTY if record.get(key)]
    if record.get("bias", "none") != "none":
        unsupported.append("bias")
    if record.get("init_lora_weights", True) not in _PLAIN_INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise UserError(
            f"{path} uses {', '.join(unsupported)}, which is not supported: an adapter must be "
            "plain LoRA with one rank and alpha that does not change the base."
        )
    return record
