"""Turns YAML text into a checked ``Config``: strict, all errors at once, each with a suggestion."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from proxykd_jax.config.methods import Method, contradictions, named_method
from proxykd_jax.config.presets import PRESETS
from proxykd_jax.config.schema import CollectConfig, Config
from proxykd_jax.config.section import Section
from proxykd_jax.errors import UserError
from proxykd_jax.small_files import read_text

# The longest recipe has a few KB. The loader needs about a second for each 100 KB.
_MOST_BYTES = 256 << 10
_MOST_PROBLEMS = 100
_MOST_SHOWN = 120


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads one YAML file and checks it.

    Args:
      path: the YAML file.
      overrides: ``"align.num_rounds=2"`` strings, applied after the file.

    Raises:
      UserError: the file cannot be read, or any key is unknown, repeated, of a wrong type or out
        of range; one message names all problems.
    """
    data, problems = _read_yaml(path, "config")
    return _build({} if data is None else data, problems, overrides, origin=str(path))


ConfigLike = Config | Mapping[str, Any] | str | os.PathLike[str]


def as_config(given: ConfigLike) -> Config:
    """The config of a run, in whichever form it is given to a stage's ``main``.

    Args:
      given: a ``Config``; a mapping of its keys, as the YAML file has them, whose paths may be
        ``Path`` objects; or the path of the YAML file.

    Raises:
      UserError: see ``load_config``.
    """
    if isinstance(given, Config):
        return given
    if isinstance(given, Mapping):
        return make_config(given)
    if isinstance(given, str | os.PathLike):
        return load_config(given)
    raise UserError(
        "A run is given as a Config, as a dictionary of its keys, or as the path of its YAML file, "
        f"not as {type(given).__name__}."
    )


class _CollectAlone(Section):
    """A file that only says what to collect."""

    collect: CollectConfig


def load_collect(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CollectConfig:
    """The section ``collect`` of a YAML file, which need not hold any other.

    Raises:
      UserError: see ``load_config``; also if there is no such section.
    """
    data, problems = _read_yaml(path, "config")
    return _build_collect({} if data is None else data, problems, overrides, origin=str(path))


def as_collect(given: CollectConfig | ConfigLike) -> CollectConfig:
    """The section ``collect``, in whichever form it is given: itself, or as in ``as_config``.

    Raises:
      UserError: see ``load_collect``.
    """
    if isinstance(given, CollectConfig):
        return given
    if isinstance(given, Mapping):
        return _build_collect(_plain(given), [], (), origin="config")
    if isinstance(given, Config):
        return _collect_of(given, "config")
    return load_collect(given)


def _collect_of(config: Config, origin: str) -> CollectConfig:
    if config.collect is None:
        raise UserError(f"{origin}: collect: required to collect answers (docs/collecting.md)")
    return config.collect


def _build_collect(
    data: Any, problems: list[str], overrides: Sequence[str], origin: str
) -> CollectConfig:
    if not isinstance(data, dict):
        raise UserError(f"{origin}: a config is a mapping of keys to values.")
    if data.keys() - {"collect"}:
        return _collect_of(_build(data, problems, overrides, origin), origin)
    for override in overrides:
        problems += _apply_override(data, override)
    try:
        alone = _CollectAlone.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _explain(error.errors(), unresolved_preset=False, root=_CollectAlone)
    else:
        if not problems:
            return alone.collect
    raise UserError("\n".join(f"{origin}: {problem}" for problem in problems))


def make_config(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Does what ``load_config`` does with a dictionary. Its paths may be ``Path`` objects.

    Raises:
      UserError: see ``load_config``; also for values that YAML cannot represent.
    """
    return _build(_plain(data), [], overrides, origin="config")


def _plain(data: Mapping[str, Any]) -> Any:
    """The data as JSON would hold them."""
    try:
        return json.loads(json.dumps(dict(data), default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"config: a value is not plain data ({error}).") from error


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML; ``load_config`` reads it back as an equal config."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def _build(data: Any, problems: list[str], overrides: Sequence[str], origin: str) -> Config:
    if not isinstance(data, dict):
        raise UserError(f"{origin}: a config is a mapping of keys to values.")
    data = named_method(data)
    for override in overrides:
        problems += _apply_override(data, override)
        data = named_method(data)
    method = _checked_method(data)
    if method is not None:
        problems += contradictions(method.defines(), data, method.name)
    preset = data.get("preset")
    known = isinstance(preset, str) and preset in PRESETS
    if known:
        below = PRESETS[preset]
        if method is not None:
            below = _merge(_merge(below, method.suggests()), method.defines())
        data = _merge(below, data)
    try:
        # Strict JSON mode: "32" is not an integer, true is not a number, but lists become tuples.
        config = Config.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _explain(error.errors(), unresolved_preset=not known)
    else:
        if not problems:
            return config
    raise UserError("\n".join(f"{origin}: {problem}" for problem in problems))


# --- the method -----------------------------------------------------------------------------------


def _checked_method(data: dict[str, Any]) -> Method | None:
    """Returns the method if its section is valid; the full check reports any errors."""
    try:
        return TypeAdapter[Method](Method).validate_json(
            json.dumps(data.get("method", {"name": "proxy_kd"})), strict=True
        )
    except ValidationError:
        return None


# --- YAML -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a float, keeps dates as text and records repeated keys.

    It builds only JSON's types. Aliases are refused, because nested ones grow without bound. A
    number is decimal or hexadecimal: YAML's other forms (1:30 for 90, 010 for 8) stay text.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported; write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _JSON_TAGS - {_TEXT}:
            fits = {self.resolve(yaml.ScalarNode, node.value, (True, False))}
            if node.tag not in fits | ({_FLOAT} if _INT in fits else set()):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{_shortened(node.value)!r} is no {node.tag.rpartition(':')[2]}",
                    node.start_mark,
                )
        return super().construct_object(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise yaml.constructor.ConstructorError(
                None, None, "text with half of a surrogate pair", node.start_mark
            ) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key in seen:
                self.repeated.append(
                    f"{key}: repeated on line {line} (first on line {seen[key]}); keep one"
                )
            seen.setdefault(key, line)
        return super().construct_mapping(node, deep=True)


_TAG = "tag:yaml.org,2002:"
_JSON_TAGS = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in _JSON_TAGS
}
_TEXT, _INT, _FLOAT = (_TAG + name for name in ("str", "int", "float"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _JSON_TAGS - {_INT, _FLOAT}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT,
    # Longer ones stay text: Python refuses to convert thousands of digits.
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]{0,39}|0x[0-9a-fA-F][0-9a-fA-F_]{0,31})$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _read_yaml(path: str | os.PathLike[str], what: str) -> tuple[Any, list[str]]:
    """Reads and parses a file; messages call it ``what``."""
    return _parse_yaml(read_text(path, what, most_bytes=_MOST_BYTES), origin=str(path))


def _parse_yaml(text: str, origin: str) -> tuple[Any, list[str]]:
    """Returns the data (None if empty) and the problems with repeated keys."""
    try:
        loader = _Loader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise UserError(f"{origin}: nested too deeply.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" on line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}: not accepted as YAML{where}: {what}.") from error
    repeated = loader.repeated[:_MOST_PROBLEMS]
    more = len(loader.repeated) - len(repeated)
    return data, repeated + ([f"{more:,} more keys are repeated"] if more else [])


def _apply_override(data: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    shown = _shortened(override)
    if not equals or not key:
        return [f"--set {shown}: write it as section.key=value"]
    value, problems = _parse_yaml(text, f"--set {shown}") if text else ("", [])
    node: Any = data
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(node, list):
            if not _is_index(parent, node):
                return [f"--set {shown}: {parent} is no index of a list of {len(node)}"]
            node = node[int(parent)]
            continue
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict | list):
            return [f"--set {shown}: {parent} is a value, not a section"]
        node = child
    if isinstance(node, list):
        if not _is_index(last, node):
            return [f"--set {shown}: {last} is no index of a list of {len(node)}"]
        node[int(last)] = value
    else:
        node[last] = value
    return problems


def _is_index(text: str, items: list[Any]) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None and int(text) < len(items)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Puts ``over`` on top of ``base``: merges sections and replaces other values."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


# --- messages -------------------------------------------------------------------------------------


def _explain(
    errors: list[ErrorDetails], *, unresolved_preset: bool, root: type[BaseModel] = Config
) -> list[str]:
    """Returns one sentence per problem of a file with the schema ``root``."""
    problems = []
    for error in errors[:_MOST_PROBLEMS]:
        location = [str(part) for part in error["loc"]]
        if error["type"] == "too_short" and any(
            other["loc"][:-1][: len(location)] == error["loc"] for other in errors
        ):
            continue  # a list whose only entry is wrong is not also reported as empty
        from_preset = error["type"] == "missing" and _has_preset_value(location)
        if unresolved_preset and from_preset:
            continue  # the missing preset is reported instead
        shown = [part for i, part in enumerate(location) if not _is_tag(location, i)]
        whole = "config" if root is Config else "table"
        problems.append(f"{'.'.join(shown) or whole}: {_reason(error, location, root)}")
    if len(errors) > _MOST_PROBLEMS:
        problems.append(f"{len(errors) - _MOST_PROBLEMS:,} more keys are wrong")
    return problems


def _is_tag(location: list[str], place: int) -> bool:
    """Returns whether a part of a location is the tag of a union's class and not a key."""
    return place == 1 and location[0] == "method" and location[1] in _method_classes()


def _has_preset_value(location: list[str]) -> bool:
    node: Any = PRESETS["paper"]
    for part in location:
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _reason(error: ErrorDetails, location: list[str], root: type[BaseModel]) -> str:
    kind, got = error["type"], error.get("input")
    shown = "" if isinstance(got, dict | list) else f" (got {_dumped(got)})"
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(location, root)}{shown}"
    if kind == "missing":
        section = _section(location[:-1], root)
        field = section.model_fields.get(location[-1]) if section else None
        meaning = f": {field.description}" if field and field.description else ""
        return f"required{meaning}"
    if kind == "union_tag_not_found":
        return f"needs a name: one of {', '.join(_method_classes())}"
    if kind in ("literal_error", "union_tag_invalid"):
        context = error.get("ctx") or {}
        allowed = str(context.get("expected") or context.get("expected_tags", ""))
        if isinstance(got, dict):
            got = got.get("name")
            shown = f" (got {_dumped(got)})"
        options = re.findall(r"'([^']+)'", allowed)
        close = difflib.get_close_matches(str(got), options, n=1, cutoff=0.5)
        allowed = allowed.replace("True", "true").replace("False", "false")  # as in YAML
        hint = f"; did you mean '{close[0]}'?" if close else ""
        return f"must be {allowed}{hint}{shown}"
    context = error.get("ctx") or {}
    if kind == "too_short":
        return f"needs at least {context['min_length']} entry"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}{shown}"
    if kind in {"tuple_type", "list_type"}:
        return f"should be a list{shown}"
    if kind == "model_type":
        return f"should be a section of keys{shown}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{message}{shown}"


def _dumped(value: Any) -> str:
    return _shortened(json.dumps(value, default=str))


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _suggest(location: list[str], root: type[BaseModel]) -> str:
    """Suggests a similar name, or the same name in another section, for an unknown key."""
    *parents, name = location
    section = _section(parents, root)
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    top = parents[0] if parents else ""
    elsewhere = sorted(
        (key for key in _all_keys(root) if key.rpartition(".")[2] == name),
        key=lambda key: (key.split(".")[0] != top, key),
    )
    if not close and elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(names)}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _section_classes(field.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _section(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    """Returns the section class at a location, through optional values and lists."""
    section: type[BaseModel] = root
    for place, part in enumerate(location):
        if part.isdigit():
            continue
        if _is_tag(location, place):
            section = _method_classes()[part]
            continue
        field = section.model_fields.get(part)
        found = field and next(_section_classes(field.annotation), None)
        if not found:
            return None
        section = found
    return section


def _method_classes() -> dict[str, type[BaseModel]]:
    """Returns the class of each method by its name."""
    return {found.model_fields["name"].default: found for found in _section_classes(Method)}


def _section_classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _section_classes(inner)
