"""A run's whole configuration, and how it is read.

Every dataclass lives beside its owner; this module only composes them. YAML files hold differences from the
defaults and are merged left to right, then ``key=value`` words of the command line; a file that ``extends`` another
holds differences from that one. Unknown keys are refused with
the nearest right one. The keys of the process and of the plan are top-level (``insertion_share``, ``token_budget``),
all others are nested (``optim.lr``, ``zero.stage``).
"""

from __future__ import annotations

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


def load(schema: type[Schema], paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Schema:
    """Read a configuration of any dataclass: defaults, then files left to right, then ``key=value`` words.

    Args:
        schema: The dataclass to fill.
        paths: YAML files, later ones win.
        overrides: Words such as ``optim.lr=1e-4``; they win over files.

    Returns:
        An instance of ``schema``, its ranges checked.

    Raises:
        ConfigError: If a file is missing or no YAML, a key is unknown, or a value is missing or out of range. Of
            several problems it names all that could be found.
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
            if "tasks" in config and origin not in overrides and OmegaConf.is_dict(layer) and "tasks" in layer:
                config.tasks = {}  # a file's mixture replaces the one before it; a word changes one task of it
            config = _merge(config, layer, origin, schema, problems)
    _check_sections(config, schema, problems, name_missing=all_read)
    problems.raise_if_any()
    with _blaming("configuration", schema):
        filled = OmegaConf.to_object(config)
    if not isinstance(filled, schema):
        raise ConfigError(f"configuration {' '.join(map(str, paths))} does not hold keys of {schema.__name__}")
    return filled


def _merge(config: Any, layer: Any, origin: str, schema: type, problems: Problems) -> Any:
    """``config`` with ``layer`` on top; unknown keys of the layer are noted and left out."""
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
    """Note the first value out of range of each section, and every missing value unless a file could not be read."""
    missing = sorted(OmegaConf.missing_keys(config))
    sections = {name: kind for name, kind in get_type_hints(schema).items() if is_dataclass(kind)}
    for key in missing if name_missing else ():
        if key in sections:
            needed = [f.name for f in fields(sections[key]) if f.default is f.default_factory]
            key = f"{key}.{[*needed, fields(sections[key])[0].name][0]}"
        problems.add(f"{key} has no value; write {key}=... or set it in a file")
    for name in sections:
        if not any(key == name or key.startswith(f"{name}.") for key in missing):
            with problems.collected(), _blaming("configuration", schema):
                OmegaConf.to_object(config[name])
    if not problems.found:
        with problems.collected(), _blaming("configuration", schema):
            OmegaConf.to_object(config)


def _word(word: str) -> Any:
    if "=" not in word:
        raise ConfigError(f"'{word}' is no key=value word; write for example max_steps=100")
    return OmegaConf.from_dotlist([word])


def _read_with_bases(path: Path, below: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """A file's layer, after that of the file beside it that it ``extends``."""
    if path.resolve() in below:
        raise ConfigError(f"{path} extends itself; remove an extends: of {', '.join(found.name for found in below)}")
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
    """What goes wrong inside names the file or word that it came from."""
    try:
        yield
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise ConfigError(f"{origin}: unknown key {key}; nearest: {nearest_key(schema, key)}") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; write {error.full_key}=... or set it in a file") from error
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        where = getattr(error, "full_key", None)
        reason = str(error).split("\n    full_key")[0]
        raise ConfigError(f"{origin}: {reason}" + (f" (key {where})" if where else "")) from error


def nearest_key(schema: type, key: str) -> str:
    """The key of a schema that a wrong one most likely means.

    Last parts are compared, so that a key in the wrong section is found, and the same section counts for something.
    Initials count as the word itself (``learning_rate`` means ``optim.lr``).
    """
    section, _, leaf = key.rpartition(".")
    initials = "".join(word[:1] for word in leaf.split("_"))

    def likeness(known: str) -> float:
        known_section, _, known_leaf = known.rpartition(".")
        by_leaf = 1.0 if known_leaf in (leaf, initials) else SequenceMatcher(None, leaf, known_leaf).ratio()
        return by_leaf + (0.25 if known_section == section else 0.0)

    return max(dotted_keys(schema), key=likeness)


def dotted_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, those of sections included."""
    types = get_type_hints(schema)
    for known in fields(schema):
        yield prefix + known.name
        if is_dataclass(types[known.name]):
            yield from dotted_keys(types[known.name], f"{prefix}{known.name}.")


def dump(config: object) -> str:
    """The resolved configuration as YAML; ``load`` of it gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
