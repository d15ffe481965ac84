"""Reads YAML into any dataclass and writes it back. Independent of specific sections.

YAML files contain differences from the defaults. They are merged left to right, followed by ``key=value`` overrides
from the command line. A file that ``extends`` another contains differences from that file. Unknown keys are errors that
name the nearest valid key. A field that is a dataclass is a section with nested keys (``optim.lr``), unless it is
marked ``FLAT``: then its keys are at the top level (``token_budget``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from flowception.errors import ConfigError, Problems

Schema = TypeVar("Schema")

FLAT = {"flat": True}
"""Metadata of a section whose keys are at the top level of a file."""


def load(
    schema: type[Schema], paths: Sequence[str | Path], overrides: Sequence[str] = (), *, others_allowed: bool = False
) -> Schema:
    """Read a configuration into any dataclass: defaults, then files left to right, then ``key=value`` overrides.

    Args:
        schema: The dataclass to fill.
        paths: YAML files; later files take precedence.
        overrides: Overrides such as ``optim.lr=1e-4``; they take precedence over files.
        others_allowed: Whether to ignore unknown top-level keys, for a ``schema`` that covers only part of the files.

    Returns:
        An instance of ``schema``, with its ranges checked.

    Raises:
        ConfigError: If a file is missing or is not valid YAML, a key is unknown, or a value is missing or out of range.
            The message lists all problems that were found.
    """
    problems = Problems()
    config = OmegaConf.structured(schema)
    layers: list[tuple[str, Any]] = []
    for path in paths:
        with problems.collected():
            layers += _read_with_bases(Path(path))
    all_read = not problems.found
    for word in overrides:
        with problems.collected(), _blaming(word, schema):
            layers.append((word, _word(word)))
    for origin, layer in layers:
        with problems.collected():
            layer = _nested(layer, schema, origin, problems, others_allowed)
            if origin not in overrides:
                with _blaming(origin, schema):
                    _forget_replaced(config, layer, schema)
            config = _merge(config, layer, origin, schema, problems)
    _check_sections(config, schema, problems, name_missing=all_read)
    problems.raise_if_any()
    with _blaming("configuration", schema):
        filled = OmegaConf.to_object(config)
    if not isinstance(filled, schema):
        raise ConfigError(f"{' '.join(map(str, paths))} must contain keys of {schema.__name__}; check the path")
    return filled


def _sections(schema: type) -> dict[str, type]:
    """The dataclass of each section of a schema."""
    hints = get_type_hints(schema)
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}


def _flat_sections(schema: type) -> dict[str, type]:
    """The sections whose keys are at the top level."""
    flat = {known.name for known in fields(schema) if known.metadata.get("flat")}
    return {name: kind for name, kind in _sections(schema).items() if name in flat}


def _nested(layer: Any, schema: type, origin: str, problems: Problems, others_allowed: bool) -> Any:
    """A layer with top-level keys moved into their flat sections; names of these sections are recorded as unknown."""
    content = OmegaConf.to_container(layer)
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} must be a mapping of keys to values, got a list; check the path")
    flat = _flat_sections(schema)
    home = {known.name: name for name, kind in flat.items() for known in fields(kind)}
    own = {known.name for known in fields(schema)} - flat.keys()

    result: dict[Any, Any] = {}
    for key, value in _with_references_moved(content, home).items():
        if key in home:
            result.setdefault(home[key], {})[key] = value
        elif key in flat:
            problems.add(f"{origin}: unknown key {key}; nearest: {nearest_key(schema, str(key))}")
        elif key in own or not others_allowed:
            result[key] = value
    return OmegaConf.create(result)


def _with_references_moved(value: Any, home: dict[str, str], depth: int = 0) -> Any:
    """A value whose interpolations follow their keys into flat sections.

    Args:
        value: Content of a file, or a part of it.
        home: The flat section of each top-level key that moves.
        depth: Number of containers around the value, which is the number of dots of a relative reference to a top-level
            key (``${.token_budget}``).
    """
    if isinstance(value, dict):
        return {key: _with_references_moved(inner, home, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_references_moved(inner, home, depth + 1) for inner in value]
    if not isinstance(value, str):
        return value

    def moved(reference: re.Match[str]) -> str:
        dots, key = reference.groups()
        if dots not in ("", "." * depth):
            return reference[0]
        return f"${{{home[key]}.{key}" if key in home else f"${{{key}"

    return re.sub(r"\$\{(\.*)(\w+)(?=[}.\[])", moved, value)


def _forget_replaced(config: Any, layer: Any, schema: type) -> None:
    """Clear the mappings that a file replaces completely: those with ``replaced`` in the metadata of their field."""
    for prefix, kind in [("", schema), *((f"{name}.", kind) for name, kind in _sections(schema).items())]:
        for known in fields(kind):
            key = prefix + known.name
            if known.metadata.get("replaced") and OmegaConf.is_dict(OmegaConf.select(layer, key)):
                OmegaConf.update(config, key, {}, merge=False)


def _merge(config: Any, layer: Any, origin: str, schema: type, problems: Problems) -> Any:
    """``config`` with ``layer`` merged on top; unknown keys of the layer are recorded and skipped."""
    while True:
        try:
            with _blaming(origin, schema):
                return OmegaConf.merge(config, layer)
        except ConfigError as error:
            key = error.__cause__.full_key if isinstance(error.__cause__, ConfigKeyError) else None
            section, _, leaf = str(key).rpartition(".")
            holder = OmegaConf.select(layer, section) if section else layer
            if key is None or holder is None or leaf not in holder:
                raise
            problems.add(error)
            del holder[leaf]


def _check_sections(config: Any, schema: type, problems: Problems, *, name_missing: bool) -> None:
    """Record the first out-of-range value of each section, and all missing values unless a file could not be read."""
    with _blaming("configuration", schema):
        missing = OmegaConf.missing_keys(config)
    for key in sorted(_missing_values(missing, schema)) if name_missing else ():
        problems.add(f"{key} has no value; write {key}=... or set it in a file")
    for name in _sections(schema):
        if not any(key == name or key.startswith(f"{name}.") for key in missing):
            with problems.collected(), _blaming("configuration", schema):
                OmegaConf.to_object(config[name])
    if not problems.found:
        with problems.collected(), _blaming("configuration", schema):
            OmegaConf.to_object(config)


def _missing_values(missing: set[str], schema: type) -> Iterator[str]:
    """Missing keys as written in a file; for a missing section, its required keys."""
    sections, flat = _sections(schema), _flat_sections(schema)
    for key in missing:
        if key in sections:
            needed = [f.name for f in fields(sections[key]) if f.default is f.default_factory]
            needed = needed or [fields(sections[key])[0].name]
            yield from needed if key in flat else [f"{key}.{needed[0]}"]
        else:
            yield _written(key, schema)


def _written(key: str, schema: type) -> str:
    """A key as written in a file: without the name of a flat section."""
    section, _, rest = key.partition(".")
    return rest if rest and section in _flat_sections(schema) else key


def _word(word: str) -> Any:
    if "=" not in word:
        raise ConfigError(f"override must have the form key=value, got {word!r}; write for example max_steps=100")
    return OmegaConf.from_dotlist([word])


def _read_with_bases(path: Path, below: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """A file's layer, preceded by the layers of the file it ``extends``, relative to its folder."""
    if path.resolve() in below:
        raise ConfigError(
            f"{path} extends itself; remove extends: from one of {', '.join(found.name for found in below)}"
        )
    layer = _read(path)
    base = layer.pop("extends", None) if OmegaConf.is_dict(layer) else None
    lower = [] if base is None else _read_with_bases(path.parent / str(base), (*below, path.resolve()))
    return [*lower, (str(path), layer)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist; check the path")
    try:
        return OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


@contextmanager
def _blaming(origin: str, schema: type) -> Iterator[None]:
    """Turn OmegaConf and YAML errors into ``ConfigError`` with the file or override that caused them."""
    try:
        yield
    except ConfigKeyError as error:
        key = _written(str(error.full_key), schema)
        raise ConfigError(f"{origin}: unknown key {key}; nearest: {nearest_key(schema, key)}") from error
    except MissingMandatoryValue as error:
        key = _written(str(error.full_key), schema)
        raise ConfigError(f"{key} has no value; write {key}=... or set it in a file") from error
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        where = getattr(error, "full_key", None)
        reason = str(error).split("\n    full_key")[0]
        for section in _flat_sections(schema):
            reason = reason.replace(f"'{section}.", "'")
        raise ConfigError(f"{origin}: {reason}" + (f" (key {_written(where, schema)})" if where else "")) from error


def nearest_key(schema: type, key: str) -> str:
    """The valid key most similar to an unknown one.

    Compares the last parts, so that a key in the wrong section is found, with a bonus for the same section. Initials
    match the full words (``learning_rate`` matches ``optim.lr``).
    """
    section, _, leaf = key.rpartition(".")
    initials = "".join(word[:1] for word in leaf.split("_"))

    def likeness(known: str) -> float:
        known_section, _, known_leaf = known.rpartition(".")
        by_leaf = 1.0 if known_leaf in (leaf, initials) else SequenceMatcher(None, leaf, known_leaf).ratio()
        return by_leaf + (0.25 if known_section == section else 0.0)

    return max(dotted_keys(schema), key=likeness)


def dotted_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, including those of sections."""
    sections, flat = _sections(schema), _flat_sections(schema)
    for known in fields(schema):
        if known.name in flat:
            yield from dotted_keys(flat[known.name], prefix)
            continue
        yield prefix + known.name
        if known.name in sections:
            yield from dotted_keys(sections[known.name], f"{prefix}{known.name}.")


def dump(config: object) -> str:
    """The resolved configuration as YAML, sections last. Loading it returns an equal configuration."""
    sections, flat = _sections(type(config)), _flat_sections(type(config))
    content = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(content, dict)
    top: dict[Any, Any] = {}
    for name, value in content.items():
        top |= value if name in flat else {} if name in sections else {name: value}
    return OmegaConf.to_yaml(OmegaConf.create(top | {n: content[n] for n in sections if n not in flat}))
