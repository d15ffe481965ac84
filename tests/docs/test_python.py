"""The Python blocks of README and docs run, and the API page is complete."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import flowception

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: str) -> list[tuple[int, str]]:
    """Number of the first line, and the code, of each fenced block of Python."""
    found = re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(page[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def run_blocks(path: Path) -> None:
    """Run a page's blocks in order, as one program; errors show the page's line numbers."""
    namespace = {"__name__": "page"}
    for line, code in python_blocks(path.read_text()):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


@pytest.mark.parametrize(
    "path", [page for page in PAGES if python_blocks(page.read_text())], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_python_of_a_page_runs(path, reader_folder, monkeypatch):
    monkeypatch.chdir(reader_folder)
    run_blocks(path)


def test_a_wrong_block_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n```\n\n```\nnot Python\n```\n\n```python\n\nassert x == 2\n```\n")
    assert python_blocks(page.read_text()) == [(4, "x = 1\n"), (12, "\nassert x == 2\n")]
    with pytest.raises(AssertionError) as found:
        run_blocks(page)
    assert (str(found.traceback[-1].path), found.traceback[-1].lineno + 1) == (str(page), 13)


def test_the_page_of_the_api_names_what_is_public():
    page = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^## `flowception\.(\w+)`$", page, re.MULTILINE)) == sorted(flowception.__all__)


def undocumented(thing: object) -> list[str]:
    """Names without a docstring: the object, and a class's own public methods, properties and fields."""
    missing = [] if inspect.getdoc(thing) else [thing.__name__]
    if inspect.isclass(thing):
        source = inspect.getsource(thing)
        for name, member in vars(thing).items():
            is_code = inspect.isfunction(member) or isinstance(member, property)
            if is_code and not name.startswith("_") and not member.__doc__:
                missing.append(f"{thing.__name__}.{name}")
        if dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                if not re.search(rf'^    {field.name}: .*\n    """', source, re.MULTILINE):
                    missing.append(f"{thing.__name__}.{field.name}")
    return missing


@pytest.mark.parametrize("name", flowception.__all__)
def test_every_public_name_is_documented(name):
    assert undocumented(getattr(flowception, name)) == []


def documented_arguments(function: object) -> list[str]:
    """Names in the ``Args`` of a docstring."""
    told = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(function) or "", re.MULTILINE | re.DOTALL)
    return re.findall(r"^    (\w+):", told[1], re.MULTILINE) if told else []


@pytest.mark.parametrize(
    "function",
    [flowception.load, flowception.Run.sample, flowception.Run.stream, flowception.Clip.save, flowception.Growth.save],
    ids=lambda function: function.__qualname__,
)
def test_a_public_call_documents_all_arguments_and_errors(function):
    assert documented_arguments(function) == [name for name in inspect.signature(function).parameters if name != "self"]
    assert "Raises:" in function.__doc__


@dataclasses.dataclass
class Silent:
    """Has an undocumented field and an undocumented method."""

    said: int
    """Said."""
    unsaid: int

    def method(self):
        pass


def test_what_is_not_documented_would_be_found():
    assert undocumented(Silent) == ["Silent.method", "Silent.unsaid"]
