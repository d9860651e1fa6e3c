"""Checks the models of a run: files, tokenizers, vocabularies, layers and positions."""

from __future__ import annotations

from pathlib import Path

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.places import missing_path, missing_repository
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.hf_config import read_config
from proxykd_jax.models.hf_weights import cut_config
from proxykd_jax.models.tensor_files import weight_files
from proxykd_jax.texts.tokenizer import (
    Tokenizer,
    check_embedding_rows,
    check_same_vocabulary,
    load_tokenizer,
    tokenizer_place,
)
from proxykd_jax.training.model import lora_config, model_origin


def check_tokenizers(config: Config, findings: Findings) -> Tokenizer | None:
    """Loads the run's tokenizer, and compares it with the student's; None if it is absent."""
    place = tokenizer_place(config)
    if not Path(place).is_dir():
        missing_repository(findings, "tokenizer", place)
        return None
    tokenizer = findings.attempt("tokenizer", lambda: load_tokenizer(config))
    if tokenizer is None:
        return None
    findings.say("tokenizer", f"{place}: {tokenizer.vocab_size} ids")
    student = model_origin(config.student)
    if student != place and (Path(student) / "tokenizer.json").is_file():
        findings.attempt(
            "student", lambda: check_same_vocabulary(tokenizer, load_tokenizer(student))
        )
    return tokenizer


def check_model(
    config: Config, role: str, tokenizer: Tokenizer | None, findings: Findings
) -> ModelConfig | None:
    """Checks a model's files, vocabulary and length; returns its architecture.

    The architecture is read from the model's folder, or else from the folder that its key
    ``config`` names. Returns None if it cannot be read.
    """
    section: ModelSection = getattr(config, role)
    origin = model_origin(section)
    if Path(origin).is_dir():
        folder = origin
        findings.attempt(role, lambda: weight_files(Path(origin)))
    elif section.config is not None:
        folder = section.config
        missing_repository(findings, f"{role}: the weights", origin)
    else:
        missing_repository(findings, role, origin)
        return None
    if section.adapter is not None and not Path(section.adapter).exists():
        missing_path(findings, f"{role}.adapter", section.adapter)
    found = findings.attempt(role, lambda: read_config(folder))
    if found is not None and section.init:
        whole, layers = found, section.init.first_layers
        found = findings.attempt(f"{role}.init", lambda: cut_config(whole, layers))
    if found is None:
        return None
    if tokenizer is not None:
        size = found.vocab_size
        findings.attempt(role, lambda: check_embedding_rows(tokenizer, size, origin))
        if config.score.top_k > size:
            findings.problems.append(
                f"score.top_k: {config.score.top_k} is more than the vocabulary's {size} ids"
            )
    if config.corpus.max_length > found.max_positions:
        findings.warn(
            role,
            f"corpus.max_length is {config.corpus.max_length}, but the model has "
            f"{found.max_positions} positions. Longer rows and answers go beyond what it has "
            "learnt; set corpus.max_length to at most that.",
        )
    if section.trainable == "lora":
        found = found.replace(lora=lora_config(section))
    return found
