"""Write ``docs/configuration.md`` from the configuration dataclasses: ``python docs/make_configuration.py``.

The text of a key is the docstring below its field. A test checks that the page is up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from flowception.training.config import TrainConfig

# data_prep is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.encoder.config import EncodeConfig  # noqa: E402

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py from the dataclasses. Change their docstrings, then run it. -->

YAML files override the defaults below and are merged left to right, followed by `key=value` overrides from the command
line. A file with `extends: FILE` overrides that file (in the same folder). An unknown key is an error that names the
nearest valid key. `required` means no default.

    deepspeed train/main.py --config configs/demo.yaml overlay.yaml optim.lr=1e-4
"""


def field_docs(kind: type) -> dict[str, str]:
    """Docstring of each field of a dataclass as one line, including fields of base classes."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for node, below in zip(body, body[1:]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
                docs[node.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


def default_of(field: dataclasses.Field) -> str:
    """A field's default as YAML writes it."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING or field.default == "???":
        return "required"
    else:
        value = field.default
    text = OmegaConf.to_yaml(OmegaConf.create([value]), resolve=True).strip() if value is not None else "- null"
    if isinstance(value, list | dict):
        text = f"- {str(value).replace(chr(39), '')}"
    return f"`{text.removeprefix('- ')}`"


def sections(kind: type, prefix: str = "", title: str = "Top level") -> Iterator[tuple[str, str, type]]:
    """Yield title, key prefix and dataclass of each section of a configuration, outermost first."""
    types = typing.get_type_hints(kind)
    yield title, prefix, kind
    nested = [f for f in dataclasses.fields(kind) if dataclasses.is_dataclass(types[f.name])]
    for field in sorted(nested, key=lambda field: not field.metadata.get("flat")):
        flat, name = field.metadata.get("flat"), f"{prefix}{field.name}"
        title = f"Top level: {field.name}" if flat else f"`{name}`"
        yield from sections(types[field.name], prefix if flat else f"{name}.", title)


def tables(kind: type) -> Iterator[str]:
    """Yield a heading, a summary and a table for each dataclass."""
    for title, prefix, section in sections(kind):
        types = typing.get_type_hints(section)
        plain = [f for f in dataclasses.fields(section) if not dataclasses.is_dataclass(types[f.name])]
        if not plain:
            continue
        docs = field_docs(section)
        summary = (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        yield f"### {title}\n\n{summary}\n\n| key | default | |\n|---|---|---|"
        for field in plain:
            text = docs.get(field.name, "").replace("``", "`").replace("|", "\\|")
            yield f"| `{prefix}{field.name}` | {default_of(field)} | {text} |"
        yield ""


def page() -> str:
    """Make the page."""
    lines = [HEAD, "## Training: `train/main.py`, `flowception plan`\n", *tables(TrainConfig)]
    lines += ["## Encoding: `data_prep/encode_shards.py`\n", *tables(EncodeConfig)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
