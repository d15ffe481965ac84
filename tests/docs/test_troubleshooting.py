"""Each error text of the troubleshooting page is one that the code can print."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [path for folder in ("flowception", "data_prep", "train") for path in (ROOT / folder).rglob("*.py")]
FIXED = 25
"""Letters of a message that its code must fix; a template with fewer would match anything."""


def texts(page: str) -> list[str]:
    """The page's errors: fenced blocks of text, their lines joined."""
    blocks = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [" ".join(block.split()) for block in blocks]


def template_of(node: ast.expr) -> str | None:
    """A string of the code as a pattern of what it may become; None if it fixes too little."""
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [part for piece in re.split(r"%[-+ #0]*[\d.]*[sdfgr]", node.value) for part in (None, piece)][1:]
    else:
        return None
    if sum(len(part) for part in parts if part is not None) < FIXED:
        return None
    return "".join(".+" if part is None else re.escape(" ".join(part.split(" "))) for part in parts)


def templates(source: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr)]
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    found = {template_of(node) for node in nodes if id(node) not in inside}
    return {template for template in found if template}


@pytest.fixture(scope="module")
def printable():
    return [re.compile(template) for path in SOURCES for template in templates(path.read_text())]


def matches(text: str, printable: list[re.Pattern]) -> bool:
    said = re.sub(r"^(flowception|encode_shards|[\w/]+\.py): error: |^watchdog: rank \d+: |^WARNING: ", "", text)
    return any(pattern.fullmatch(said) for pattern in printable)


def test_every_text_is_one_that_the_code_prints(printable):
    found = texts(PAGE.read_text())
    assert len(found) == len(set(found)) >= 25
    assert [text for text in found if not matches(text, printable)] == []


def test_a_text_that_no_code_prints_would_be_found():
    source = 'raise E(f"{name} is broken beyond repair ({error}); buy another one")\n'
    source += 'log("%s of %d clips could not be read today", a, b)'
    printable = [re.compile(template) for template in templates(source)]
    assert len(printable) == 2
    assert matches("train/main.py: error: x is broken beyond repair (rust); buy another one", printable)
    assert matches("WARNING: some of 7 clips could not be read today", printable)
    assert not matches("x is broken beyond repair (rust); repair it", printable)
