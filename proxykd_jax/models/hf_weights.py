"""Reads and writes the weights of Hugging Face model folders.

torch stores a linear layer as [out, in] and one tensor per layer. Here kernels are [in, out] and
layers are stacked. Reading copies tensor by tensor into a leaf's stacked array, so no file is in
memory twice. With ``sharding``, a leaf is read device by device, each time only that device's part.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from proxykd_jax.artifacts import check_export, write_json
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.folder import TOKENIZER_FILES
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.lora import merged_layer
from proxykd_jax.models.params import (
    ParamPath,
    Params,
    flatten,
    is_linear,
    param_shapes,
    unflatten,
)
from proxykd_jax.models.quantized import Method, QuantizedKernel, quantized_shapes
from proxykd_jax.models.quantized import quantize as quantize_kernel
from proxykd_jax.models.tensor_files import (
    Tensor,
    TensorFolder,
    bits,
    new_folder,
    numpy_dtype,
    write_tensors,
)
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.peers import is_first

Put = Callable[[ParamPath, np.ndarray], jax.Array]

# Copied byte for byte from the source folder, because saving a tokenizer again changes its files.
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")

_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}


def hf_name(path: ParamPath, layer: int = 0) -> str:
    """Hugging Face's name of a leaf (of one layer of it): ``model.layers.3.mlp.up_proj.bias``."""
    fixed = {
        ("embed", "embedding"): "model.embed_tokens.weight",
        ("final_norm", "scale"): "model.norm.weight",
        ("lm_head", "kernel"): "lm_head.weight",
    }
    if path in fixed:
        return fixed[path]
    suffix = "bias" if path[-1] == "bias" else "weight"
    inner = [_NORMS.get(key) or _BLOCKS.get(key) or key for key in path[1:-1]]
    return ".".join(["model", "layers", str(layer), *inner, suffix])


class StackedTensor:
    """One leaf of the tree, still on disk: the tensors of all layers, as [in, out]."""

    def __init__(
        self, folder: TensorFolder, path: ParamPath, shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._folder = folder
        self._stacked = path[0] == "layers"
        self._transposed = path[-1] == "kernel"
        self.names = [hf_name(path, layer) for layer in range(shape[0] if self._stacked else 1)]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The leaf, or its part at ``index`` (one slice of step 1 per axis)."""
        if index is None:
            index = tuple(slice(None) for _ in self.shape)
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        slices = tuple(slice(start, stop) for start, stop, _ in bounds)
        sizes = tuple(max(stop - start, 0) for start, stop, _ in bounds)
        inner = slices[1:] if self._stacked else slices
        stored = inner[::-1] if self._transposed else inner
        names = self.names[slices[0]] if self._stacked else self.names
        out = np.empty(sizes, self.dtype)
        rows = out if self._stacked else out[None]
        for row, name in zip(rows, names, strict=True):
            tensor = self._folder.read(name, stored).astype(self.dtype, copy=False)
            bits(row)[...] = bits(tensor.T if self._transposed else tensor)
        return out


def load_model(
    path: str | Path,
    *,
    dtype: Any = "float32",
    config: ModelConfig | None = None,
    first_layers: int | None = None,
    quantize: Method | None = None,
    put: Put | None = None,
    sharding: Callable[[ParamPath], Sharding] | None = None,
) -> tuple[ModelConfig, Params]:
    """Loads the model in a Hugging Face folder.

    Args:
      path: folder with ``config.json`` and safetensors, in one file or sharded.
      dtype: dtype of all leaves, ``float32`` or ``bfloat16``.
      config: replaces the folder's own, for example to set ``lora``; the shapes must match.
      first_layers: read only this many layers, as ``params.first_layers`` would keep them.
      quantize: quantise the linear layers of the blocks (``quantized.py``), layer by layer, from
        weights of ``dtype``.
      put: makes the device array of a leaf from its path and its whole NumPy array.
      sharding: gives a leaf's sharding by path. Each device's part is read and sent separately, so
        no whole leaf is in host memory. Excludes ``put``.

    Raises:
      UserError: files, names, shapes, dtypes or values in the folder are wrong.
      ValueError: ``put`` together with ``sharding`` or ``quantize``.
    """
    if put is not None and (sharding is not None or quantize is not None):
        raise ValueError("Give put, or sharding and quantize, not both.")
    target = numpy_dtype(dtype)
    if target == np.float16:
        raise UserError("Models run in float32 or bfloat16; float16 is a type of files only.")
    check_export(Path(path))
    found = config or read_config(path)
    if first_layers is not None:
        found = cut_config(found, first_layers)
    folder = TensorFolder(path)
    leaves = {
        leaf_path: StackedTensor(folder, leaf_path, shape, target)
        for leaf_path, shape in flatten(param_shapes(found))
    }
    _check_names(folder, found, leaves, cut=first_layers is not None)
    arrays: dict[ParamPath, Any] = {}
    here = SingleDeviceSharding(jax.local_devices()[0])
    for leaf_path, leaf in leaves.items():
        if quantize is not None and is_linear(leaf_path):
            place = here if sharding is None else sharding(leaf_path)
            arrays[leaf_path] = _place_quantized(leaf, place, quantize)
        elif sharding is not None:
            arrays[leaf_path] = _place(leaf, sharding(leaf_path))
        elif put is not None:
            arrays[leaf_path] = put(leaf_path, leaf.read())
        else:
            arrays[leaf_path] = jnp.asarray(leaf.read())
    return found, unflatten(arrays)


def cut_config(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The config that ``params.first_layers`` returns, without parameters."""
    from proxykd_jax.models.params import first_layers

    return first_layers(config, {"layers": {}}, num_layers)[0]


def _parts(
    shape: tuple[int, ...], sharding: Sharding
) -> Iterator[tuple[jax.Device, tuple[slice, ...]]]:
    """Each local device with its part of an array."""
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        yield device, index if index is not None else tuple(slice(None) for _ in shape)


def _place(leaf: StackedTensor, sharding: Sharding) -> jax.Array:
    # make_array_from_callback would hold all devices' parts before sending the first.
    parts = [
        jax.block_until_ready(jax.device_put(leaf.read(index), device))
        for device, index in _parts(leaf.shape, sharding)
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _place_quantized(leaf: StackedTensor, sharding: Sharding, method: Method) -> QuantizedKernel:
    """A quantised stacked kernel. Each layer is quantised on the device that will hold it. The
    results are collected on the host, where a whole device's part is small by now."""
    shapes = quantized_shapes(leaf.shape, method)
    parts: list[QuantizedKernel] = []
    for device, (layers, *inner) in _parts(leaf.shape, sharding):
        # New arrays for each device: on a CPU the JAX array shares this memory.
        part = jax.tree.map(lambda x: np.empty(sharding.shard_shape(x.shape), x.dtype), shapes)
        for place, layer in enumerate(range(*layers.indices(leaf.shape[0]))):
            kernel = jax.device_put(leaf.read((slice(layer, layer + 1), *inner)), device)
            made = quantize_kernel(kernel, method=method)
            part.codes[place], part.scales[place] = made.codes[0], made.scales[0]
        parts.append(jax.block_until_ready(jax.device_put(part, device)))
    return jax.tree.map(
        lambda shape, *arrays: jax.make_array_from_single_device_arrays(
            shape.shape, sharding, list(arrays)
        ),
        shapes,
        *parts,
    )


def _check_names(
    folder: TensorFolder,
    config: ModelConfig,
    leaves: dict[ParamPath, StackedTensor],
    cut: bool,
) -> None:
    expected = {
        name: (leaf.shape[1:] if path[0] == "layers" else leaf.shape)[
            :: -1 if path[-1] == "kernel" else 1
        ]
        for path, leaf in leaves.items()
        for name in leaf.names
    }
    present = set(folder.names)
    problems = []
    missing = sorted(set(expected) - present)
    if missing:
        problems.append(f"{len(missing)} tensors are missing, for instance {missing[0]}")
    unexpected = sorted(
        name
        for name in present - set(expected)
        # Old Llama checkpoints store these values, which follow from the config.
        if not name.endswith("rotary_emb.inv_freq")
        and not (cut and _layer_of(name) >= config.num_layers)
        and not (config.tie_embeddings and name == "lm_head.weight")
    )
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected, for instance {unexpected[0]}")
    for name in sorted(set(expected) & present):
        if folder.shape(name) != expected[name]:
            problems.append(
                f"{name} has shape {folder.shape(name)}, the config asks for {expected[name]}"
            )
            break
    if problems:
        raise UserError(f"The weights in {folder.folder} do not fit: {'; '.join(problems)}.")
    if config.tie_embeddings and "lm_head.weight" in present:
        tied = folder.read("model.embed_tokens.weight")
        if not np.array_equal(tied, folder.read("lm_head.weight")):
            raise UserError(
                f"{folder.folder} says tie_word_embeddings, but lm_head.weight differs from the "
                "embedding. Set tie_word_embeddings to false in config.json to use both."
            )


def _layer_of(name: str) -> int:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit():
        return int(parts[2])
    return -1


def save_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    adapter: Params | None = None,
    *,
    dtype: Any = "float32",
    max_shard_bytes: float = 5e9,
    source: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers can load. The folder appears complete or not at all.

    All processes must call this, because they hold parts of the weights; the first one writes. A
    device holds one tensor besides the model, and the host one file.

    Args:
      params: the weights; they may be quantised.
      adapter: is merged into the weights in float32, tensor by tensor; ``config.lora`` describes
        it. ``peft.save_adapter`` writes adapters alone.
      dtype: dtype of the tensors in the file, ``float32``, ``bfloat16`` or ``float16``.
      source: model folder whose tokenizer files and ``generation_config.json`` are copied byte
        for byte.
      texts: further text files by name; they take the place of copied ones.
      overwrite: replace an existing folder.

    Raises:
      UserError: ``path`` is taken, ``source`` is not a folder, or the model has no Hugging Face
        form.
      ValueError: NaN or infinity in the weights (also from overflow in ``dtype``), or shapes that
        differ from the config's.
    """
    target = numpy_dtype(dtype)
    record = config.to_hf(dtype=target.name)
    if source is not None and not Path(source).is_dir():
        raise UserError(
            f"{source} is not a folder; tokenizer files are copied from a model folder."
        )
    with new_folder(Path(path), overwrite) as folder:
        write_json(folder / "config.json", record)
        write_tensors(folder, _tensors(config, params, adapter), target, max_shard_bytes)
        if is_first():
            for name in COPIED_FILES:
                if source is not None and (Path(source) / name).is_file():
                    shutil.copyfile(Path(source) / name, folder / name)
            for name, text in (texts or {}).items():
                (folder / name).write_text(text, encoding="utf-8")


def _tensors(config: ModelConfig, params: Params, adapter: Params | None) -> list[Tensor]:
    """Name, torch shape and maker of each tensor, in network order."""
    leaves, factors = dict(flatten(params)), dict(flatten(adapter or {}))
    shapes = dict(flatten(param_shapes(config)))
    if leaves.keys() != shapes.keys():
        odd = sorted("/".join(path) for path in leaves.keys() ^ shapes.keys())
        raise ValueError(f"The parameters are not those of the config: {', '.join(odd)}.")
    for path, shape in shapes.items():
        if leaves[path].shape != shape:
            raise ValueError(f"{'/'.join(path)} has shape {leaves[path].shape}, not {shape}.")

    def tensor(path: ParamPath, layer: int | None) -> Tensor:
        turn = path[-1] == "kernel"
        shape = shapes[path] if layer is None else shapes[path][1:]

        def make() -> np.ndarray:
            leaf = leaves[path]
            if (*path[:-1], "a") in factors and path[-1] == "kernel":
                assert config.lora is not None
                a_NDR, b_NRO = (factors[(*path[:-1], name)] for name in "ab")
                scale = config.lora.scale
                return fetch(merged_layer(leaf, a_NDR, b_NRO, layer or 0, scale=scale))
            if layer is not None:
                leaf = jax.tree.map(lambda x: x[layer], leaf)
            if isinstance(leaf, QuantizedKernel):
                leaf = leaf.dequantize(jnp.float32)
            return fetch(leaf.T if turn else leaf)  # transposed on its device: much faster

        return hf_name(path, layer or 0), shape[::-1] if turn else shape, make

    stacked = [path for path in shapes if path[0] == "layers"]
    ends = [path for path in shapes if path[0] not in ("layers", "embed")]
    return [
        tensor(("embed", "embedding"), None),
        *(tensor(path, layer) for layer in range(config.num_layers) for path in stacked),
        *(tensor(path, None) for path in ends),
    ]
