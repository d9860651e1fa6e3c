"""Export of a run's models as folders that transformers and peft load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from proxykd_jax.artifacts import (
    damaged_files,
    digest_files,
    read_record,
    stage_identity,
    write_record,
)
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.folder import local_folder
from proxykd_jax.models.hf_weights import COPIED_FILES, load_model, save_model
from proxykd_jax.models.peft import save_adapter
from proxykd_jax.parallel.sharding import sharding_of
from proxykd_jax.peers import on_first
from proxykd_jax.training.exported_tokenizer import changed_files
from proxykd_jax.training.loop import Measure
from proxykd_jax.training.model import Model, quantization
from proxykd_jax.training.model_card import CARD_FILE, write_cards
from proxykd_jax.training.restore import load_aligned_proxy, load_student
from proxykd_jax.training.state import ModelSpec, Tree

# Increase it when the same run gives other files, so that old exports are made anew.
_FILES = 3
_CUT = (
    "no adapter of the {role} is written, because it fits only the layers that {role}.init keeps; "
    "export/{role} holds the whole model"
)


def export_student(config: Config, corpus: TokenCorpus, mesh: Mesh, measure: Measure) -> Path:
    """Writes ``export/student`` and, for an adapter, ``export/student_adapter``."""
    return _export(config, corpus, mesh, measure, "student", load_student, merged=True)


def export_proxy(config: Config, corpus: TokenCorpus, mesh: Mesh, measure: Measure) -> Path | None:
    """Writes what ``export.proxy`` asks for; a fully trained proxy is written as a whole model."""
    if config.export.proxy == "none":
        return None
    merged = config.export.proxy == "merged" or config.proxy.trainable == "full"
    return _export(config, corpus, mesh, measure, "proxy", load_aligned_proxy, merged=merged)


def _export(
    config: Config,
    corpus: TokenCorpus,
    mesh: Mesh,
    measure: Measure,
    role: str,
    load: Callable[[Config, Mesh], Model],
    *,
    merged: bool,
) -> Path:
    # An adapter of a cut model fits no folder that anybody has.
    cut = getattr(config, role).init is not None
    merged = merged or cut
    folder = config.folder / "export"
    record_path = folder / f"{role}.json"
    export = config.export
    made_from: dict[str, Any] = {
        "stage": stage_identity(config.folder / role),
        "state": export.state,
        "dtype": export.dtype,
        "merged": merged,
        "files": _FILES,
    }

    def is_made() -> bool:
        return record_path.exists() and _is_whole(record_path, made_from)

    if on_first(is_made):
        on_first(lambda: write_cards(config, (role,)))
        return folder / (role if merged else f"{role}_adapter")
    # The record of an earlier export would call the new files damaged.
    on_first(lambda: record_path.unlink(missing_ok=True))
    model = load(config, mesh)
    record: dict[str, Any] = {"made_from": made_from}
    if model.adapter is not None and cut:
        on_first(lambda: print(f"export: {_CUT.format(role=role)}", flush=True))
    elif model.adapter is not None:
        save_adapter(
            folder / f"{role}_adapter", model.adapter, model.config, str(model.folder),
            overwrite=True,
        )  # fmt: skip
    if merged:
        save_merged(
            folder / role, model.config, model.params, model.adapter, config, corpus,
            dtype=export.dtype, overwrite=True,
        )  # fmt: skip
        record["validation_nll"] = _compare(config, corpus, mesh, measure, role, model)
    on_first(lambda: _record(record_path, record))
    on_first(lambda: write_cards(config, (role,)))
    return folder / (role if merged else f"{role}_adapter")


def _is_whole(record_path: Path, made_from: dict[str, Any]) -> bool:
    """Whether an export is of this origin and its files are as they were written."""
    try:
        record = read_record(record_path)
    except UserError as error:
        print(f"WARNING: {error} The model is exported again.", flush=True)
        return False
    if record["made_from"] != made_from:
        return False
    problems = damaged_files(record_path.parent, record["files"])
    if problems:
        listed = "; ".join(problems.values())
        print(f"WARNING: {listed}. The model is exported again.", flush=True)
    return not problems


def _record(path: Path, record: dict[str, Any]) -> None:
    """Writes what was exported, with the digests of its files; the card may change later."""
    folders = (path.parent / path.stem, path.parent / f"{path.stem}_adapter")
    files = [
        file
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and file.name != CARD_FILE
    ]
    write_record(path, {**record, "files": digest_files(path.parent, files)})


def save_merged(
    path: Path,
    model_config: ModelConfig,
    params: Tree,
    adapter: Tree | None,
    config: Config,
    corpus: TokenCorpus,
    *,
    dtype: str,
    overwrite: bool = False,
) -> None:
    """Writes a whole model with the corpus's tokenizer; an adapter is merged into it in float32,
    tensor by tensor.

    The folder carries the template and the end tokens that the model was trained with.

    Args:
      path: folder to write.
      model_config, params, adapter: the model.
      config, corpus: ``export.max_shard_gb`` limits a file's size; the tokenizer is copied.
      dtype, overwrite: as in ``hf_weights.save_model``.

    Raises:
      UserError: as in ``hf_weights.save_model``.
    """
    from proxykd_jax.texts.template import Renderer
    from proxykd_jax.texts.tokenizer import load_tokenizer

    source = local_folder(corpus.tokenizer_path, COPIED_FILES)
    renderer = Renderer.of(load_tokenizer(corpus.tokenizer_path), config.corpus)
    save_model(
        path,
        model_config.replace(eos_token_ids=corpus.end_token_ids),
        params,
        adapter,
        dtype=dtype,
        max_shard_bytes=config.export.max_shard_gb * 1e9,
        source=source,
        texts=changed_files(renderer, corpus.end_token_ids, source),
        overwrite=overwrite,
    )


def _compare(
    config: Config, corpus: TokenCorpus, mesh: Mesh, measure: Measure, role: str, model: Model
) -> dict[str, float]:
    """Measures the validation NLL of the trained model and of the exported files, read back.

    The trained model is freed in between. Files of a model that was trained quantised are read back
    quantised, because their whole weights may not fit.
    """
    rows = corpus.split("validation")
    if not len(rows):
        return {}
    most = config.corpus.validation_max_rows
    trained = measure(model, rows, most)["nll"]
    jax.tree.map(lambda x: x.delete(), (model.frozen, model.trainable))
    section: ModelSection = getattr(config, role)
    method = quantization(section) if section.trainable == "lora" else None
    found, params = load_model(
        config.folder / "export" / role,
        dtype=config.export.dtype,
        quantize=method,
        sharding=lambda path: sharding_of("/".join(path), mesh),
    )
    spec = ModelSpec(found, "lora", config.export.dtype, "none")
    exported = Model(spec, params, None, config.folder / "export" / role)
    nll = measure(exported, rows, most)["nll"]
    again = "" if method is None else f", in {method} again"
    print(
        f"export: {role} in {config.export.dtype}{again}: validation NLL {nll:.4f}, "
        f"as trained {trained:.4f}",
        flush=True,
    )
    jax.tree.map(lambda x: x.delete(), params)
    return {"trained": trained, "exported": nll}
