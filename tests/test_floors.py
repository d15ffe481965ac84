"""The house's floors (DESIGN.md section 5): who may import whom, where heavy packages live, how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowception"

BOTTOM = {"flowception", "errors", "rng", "progress", "files", "nn.layout", "nn.flops"}
MAY_IMPORT = {
    "errors": set(),
    "rng": set(),
    "progress": set(),
    "files": set(),
    "nn": {"nn"},
    "flow": {"flow"},
    "codecs": {"codecs"},
    "data": {"data", "flow"},
    "checkpoint": {"checkpoint"},
    "config": {"flow", "nn", "codecs", "data", "training"},
    "training": {"training", "config", "checkpoint", "data", "flow", "nn", "codecs"},
    "generation": {"generation", "config", "checkpoint", "data", "flow", "nn", "codecs"},
    "evaluation": {"evaluation", "config", "checkpoint", "data", "flow", "nn", "codecs"},
    "export": {"export", "config", "checkpoint", "data", "flow", "nn", "codecs"},
    "doctor": {"config", "checkpoint", "data", "flow", "nn", "codecs"},
    "cli": {
        "cli",
        "doctor",
        "config",
        "checkpoint",
        "data",
        "flow",
        "nn",
        "codecs",
        "training",
        "generation",
        "evaluation",
        "export",
    },
}
ONE_DOOR = {"deepspeed": "training/zero.py", "wandb": "training/metrics.py", "flash_attn": "nn/attention.py"}
LAZY = {"deepspeed", "wandb", "flash_attn", "diffusers", "transformers", "streaming"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(p for folder in ("train", "data_prep", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix(".__init__")
        .replace("__init__", "flowception")
    )


def floor_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level) of each import; imports for type checking only do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            found.append((node.module or "", id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def ours(imported: str) -> str | None:
    """The part after ``flowception.`` of one of our modules that exists; None for anything else."""
    if imported == "flowception" or not imported.startswith("flowception."):
        return None
    inner = imported.removeprefix("flowception.")
    path = PACKAGE / inner.replace(".", "/")
    return inner if path.with_suffix(".py").exists() or path.is_dir() else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_stays_on_its_floor(path):
    module = name_of(path)
    floor = floor_of(module)
    allowed = {"errors", "rng"} if module in {"nn.layout", "nn.flops"} else MAY_IMPORT.get(floor, set())
    for imported, _ in imports_of(path):
        target = ours(imported)
        if target is None or target in BOTTOM or target == "nn":
            continue
        assert floor_of(target) in allowed, f"{module} ({floor}) imports {target}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_come_through_their_door(path):
    relative = str(path.relative_to(PACKAGE))
    for imported, at_top in imports_of(path):
        package = imported.split(".")[0]
        assert ONE_DOOR.get(package, relative) == relative, (
            f"{relative} imports {package}; only {ONE_DOOR[package]} may"
        )
        assert not (at_top and package in LAZY), f"{relative} imports {package} at the top; import it where it is used"


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_and_functions_are_short_and_described(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 400, "a file is one room: at most 400 lines"
    assert ast.get_docstring(tree), "a module opens with what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            body_doc = ast.get_docstring(node, clean=False) or ""
            assert lines - body_doc.count("\n") <= 60, (
                f"{node.name} has {lines} lines; at most 60 without its docstring"
            )


def test_median_file_is_short():
    lengths = sorted(p.read_text().count("\n") for p in MODULES if p.name != "__init__.py")
    assert lengths[len(lengths) // 2] <= 150


def test_every_module_is_on_a_known_floor():
    for path in MODULES:
        assert floor_of(name_of(path)) in MAY_IMPORT or name_of(path) == "flowception", path
