"""What the keys of the config say about themselves: the text of ``--help`` and of the docs.

Every sentence is the description of a field of the schema.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from proxykd_jax.config.load import _section_classes
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.config.schema import Config
from proxykd_jax.config.section import is_path

# (key, type, default, meaning); an optional key without a default has "null", a required one "".
Row = tuple[str, str, str, str]

# The sections that a stage reads itself; every command reads the run's own keys (``name`` ...). A
# command that is not here reads all sections.
_SECTIONS = {
    "collect": ("collect",),
    "prepare": ("corpus",),
    "align": ("proxy", "align", "mesh", "logging"),
    "score": ("score", "mesh"),
    "distill": ("method", "student", "distill", "mesh", "logging"),
    "evaluate": ("evaluate", "mesh"),
    "export": ("export",),
    "report": (),
}
_RUN = "preset name runs_dir seed"
# The keys that people set, in the order in which they are shown.
_OFTEN = {
    "collect": "prompts[].path folder url model api_key_env parameters prices samples "
    "requests_per_minute concurrency refusals",
    "prepare": "sources[].path sources[].format test[].path benchmarks template end_tokens "
    "max_length max_rows validation_fraction",
    "align": "proxy.path proxy.trainable proxy.lora.rank align.alignment align.num_rounds "
    "align.batch_size align.microbatch_size align.optimizer.learning_rate align.preference.beta "
    "align.sampling.max_new_tokens mesh.fsdp mesh.tensor",
    "score": "score.top_k score.temperature score.store_dtype score.batch_size mesh.fsdp "
    "mesh.tensor",
    "distill": "method.name student.path student.trainable distill.alpha distill.data "
    "distill.epochs distill.max_steps distill.batch_size distill.microbatch_size "
    "distill.optimizer.learning_rate mesh.fsdp",
    "evaluate": "max_rows rounds batch_size benchmarks.gsm8k benchmarks.models benchmarks.mode "
    "benchmarks.limit benchmarks.max_new_tokens",
    "export": "dtype state proxy max_shard_gb",
    "report": "",
    "": "method.name corpus.sources[].path corpus.max_length proxy.path student.path "
    "align.num_rounds align.batch_size distill.alpha distill.epochs distill.batch_size mesh.fsdp",
}


def stage_keys(stage: str) -> list[Row]:
    """Every key that a stage reads itself: the run's own keys and the keys of its sections."""
    sections = _SECTIONS.get(stage)
    return [
        row
        for row in config_keys()
        if sections is None or "." not in row[0] or _section(row[0]) in sections
    ]


def often_set(stage: str) -> list[Row]:
    """The keys of a stage that people set, about a dozen."""
    rows = {row[0]: row for row in stage_keys(stage)}
    names = _OFTEN.get(stage, _OFTEN[""]).split()
    sections = _SECTIONS.get(stage, ())
    whole = [name if name in rows else f"{sections[0]}.{name}" for name in names]
    return [rows[name] for name in (*_RUN.split(), *whole)]


def describe(rows: list[Row]) -> str:
    """Keys with their types, defaults and meanings, one paragraph per key."""
    lines = []
    for key, kind, default, meaning in rows:
        lines.append(f"  {key}  [{kind}]{f'  default {default}' if default else ''}")
        lines.append(f"      {meaning}")
    return "\n".join(lines)


def _section(key: str) -> str:
    return key.partition(".")[0].removesuffix("[]")


def config_keys(root: type[BaseModel] = Config) -> Iterator[Row]:
    """(key, type, default, meaning) of every key of a schema, in its order."""
    yield from _keys_of(root, "")


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[Row]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        classes = list(_section_classes(field.annotation))
        inner = classes[0] if classes else None
        if len(classes) > 1:
            yield from _keys_of_several(classes, key, field.description or "")
            continue
        if inner is None:
            # A field keeps the metadata of its outermost type beside the type.
            metadata = tuple(field.metadata)
            annotation = Annotated[field.annotation, *metadata] if metadata else field.annotation
            yield key, _kind(annotation), _default(key, field), field.description or ""
            continue
        is_list = typing.get_origin(field.annotation) is tuple
        if is_list:
            yield (
                key,
                "list of sections",
                "" if field.is_required() else "none",
                (field.description or ""),
            )
        yield from _keys_of(inner, f"{key}[]." if is_list else f"{key}.")


def _keys_of_several(classes: list[type[BaseModel]], key: str, meaning: str) -> Iterator[Row]:
    """The keys of a section that is one of several classes, selected by ``name``."""
    names = [section.model_fields["name"].default for section in classes]
    yield f"{key}.name", "|".join(names), names[0], meaning
    for name, section in zip(names, classes, strict=True):
        for inner, kind, default, about in _keys_of(section, f"{key}."):
            if inner != f"{key}.name":
                yield f"{inner} ({name})", kind, default, about


def _kind(annotation: Any) -> str:
    if is_path(annotation):
        return "path"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(_show(a) for a in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if arguments:
        return "|".join(_kind(a) for a in arguments)
    names = {"NoneType": "null", "str": "text", "bool": "true|false", "float": "number"}
    return names.get(annotation.__name__, annotation.__name__)


def _default(key: str, field: Any) -> str:
    found = {}
    for preset, values in PRESETS.items():
        node: Any = values
        for part in key.split("."):
            node = (
                node.get(part, PydanticUndefined) if isinstance(node, dict) else (PydanticUndefined)
            )
        if node is not PydanticUndefined:
            found[preset] = node
    if found:
        return ", ".join(f"{_show(value)} ({preset})" for preset, value in found.items())
    return "" if field.is_required() else _show(field.default)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return str(value)
