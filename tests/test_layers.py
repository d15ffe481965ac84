"""The layers of the code: allowed imports, modules with heavy packages, and sizes of files and folders."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowception"

GROUND = {"errors", "ranges", "rng", "files", "progress"}
MAY_IMPORT = {
    "packing": set(),
    "flow": set(),
    "nn": {"packing"},
    "codecs": set(),
    "checkpoint": set(),
    "shards": set(),
    "data": {"packing", "flow", "shards"},
    "config": set(),
    "run_directory": {"packing", "flow", "nn", "shards", "config"},
    "training": {"packing", "flow", "nn", "checkpoint", "shards", "data", "config", "run_directory"},
    "generation": {"packing", "flow", "nn", "codecs", "checkpoint", "shards", "data", "config", "run_directory"},
    "evaluation": {"flow", "codecs", "shards"},
    "doctor": {"packing", "nn", "codecs"},
}
"""Allowed imports besides the package itself and ``GROUND``, bottom up; ``cli`` and scripts may import anything."""
ONE_DOOR = {
    "deepspeed": "training/distributed/zero.py",
    "wandb": "training/metrics.py",
    "flash_attn": "nn/flash.py",
}
ONLY_PRESENT = {"doctor.py", "training/estimate/preflight.py"}
"""Modules that import an optional package to see whether it is there, and use nothing of it."""
KNOW_DEEPSPEED = {"training/distributed/zero.py", "training/distributed/sharded_state.py"}
"""The modules that depend on the internals of DeepSpeed's engine, its optimizers and a partitioned weight."""
INSIDE_DEEPSPEED = {
    "optimizer", "module", "zero_optimization_stage", "was_step_applied", "FWD_MODULE_STACK", "scaled_global_norm",
    "_get_norm_groups", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "grad_position",
    "round_robin_bit16_groups", "round_robin_bit16_offsets", "partition_size", "update_lp_params",
    "checkpoint_event_prologue", "checkpoint_event_epilogue", "_reassign_or_swap_out_partitioned_parameters",
}  # fmt: skip
PRINTS = {"flowception/cli.py", "flowception/progress.py"}
"""A command's output, and its progress where there is no terminal; other modules log."""
LAZY = {"deepspeed", "wandb", "flash_attn", "diffusers", "transformers", "streaming"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(p for folder in ("train", "data_prep", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py"))
ENCODER = sorted((ROOT / "data_prep" / "encoder").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HARNESSES = [p for p in TESTS if p.parts[-3:-1] == ("faults", "training") or p.parent.name == "mutants"]


def name_of(path: Path) -> str:
    """Dotted, from the repository's root."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in MODULES + SCRIPTS}


def package_of(module: str) -> str:
    """The subpackage of a module; None for the top-level package."""
    return module.removeprefix("flowception").lstrip(".").split(".")[0]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level) of each import, those for type checking included."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in FILES else node.module or "", id(node) in top) for name in modules]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("require", "import_module"):
            found += [(word.value, False) for word in node.args if isinstance(word, ast.Constant)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_from_below(path):
    package = package_of(name_of(path))
    if package in ("", "cli"):
        return
    allowed = MAY_IMPORT.get(package, set()) | GROUND | {package, ""}
    for imported, _ in imports_of(path):
        if imported in FILES:
            assert package_of(imported) in allowed, (
                f"{name_of(path)} imports {imported}; {package} may import {allowed}"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_only_in_their_modules(path):
    relative = str(path.relative_to(PACKAGE))
    for imported, at_top in imports_of(path):
        package = imported.split(".")[0]
        if relative not in ONLY_PRESENT:
            assert ONE_DOOR.get(package, relative) == relative, (
                f"{relative} imports {package}; only {ONE_DOOR[package]} may"
            )
        assert not (at_top and package in LAZY), f"{relative} imports {package} at the top; import it where it is used"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_two_modules_use_deepspeed_internals(path):
    found = {name for name in names_in(path) if name in INSIDE_DEEPSPEED or name.startswith("ds_")}
    relative = str(path.relative_to(PACKAGE))
    assert bool(found) == (relative in KNOW_DEEPSPEED), f"{relative} asks an engine or a weight for {found}"


def names_in(path: Path) -> set[str]:
    """Attributes that are asked for, by dot or by a string."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    by_dot = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [call.args[1] for call in calls if call.func.id in ("getattr", "hasattr", "setattr", "delattr")]
    return by_dot | {word.value for word in asked if isinstance(word, ast.Constant)}


@pytest.mark.parametrize("path", MODULES + ENCODER, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_print_and_modules_log(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    prints = any(isinstance(called, ast.Name) and called.id == "print" for called in calls)
    assert not prints or str(path.relative_to(ROOT)) in PRINTS, "use logging.getLogger(__name__)"


def test_every_package_has_a_layer():
    assert {package_of(name_of(path)) for path in MODULES} == {*MAY_IMPORT, *GROUND, "cli", ""}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of more than one module that reach each other, and modules that import themselves (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            at = stack.index(module)
            group, stack[at:] = set(stack[at:]), []
            if len(group) > 1 or module in graph[module]:
                found.append(group)

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def test_an_import_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"e"}}
    assert circles(graph) == [{"a", "b", "c"}, {"e"}]


def import_graph() -> dict[str, set[str]]:
    """Imports among our files; those inside functions and for type checking count, as they hide a circle only."""
    return {module: {name for name, _ in imports_of(path) if name in FILES} for module, path in FILES.items()}


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that importing a module may import, packages on the way included."""
    found, todo = set(), [start]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)} & graph.keys()
            todo += [*graph[module], *parents]
    return found


def test_there_are_no_import_cycles():
    assert circles(import_graph()) == []


def test_a_configuration_is_read_and_videos_are_encoded_without_training():
    graph = import_graph()
    assert "flowception.training.config" in reached(graph, "train.main")
    commands = [module for module in graph if module.startswith("data_prep.")]
    assert "data_prep.encode_shards" in commands
    for start in ("flowception.config", "flowception.run_directory", "flowception.generation.load", *commands):
        assert not [module for module in reached(graph, start) if module.startswith("flowception.training")], start


@pytest.mark.parametrize("path", MODULES + SCRIPTS + HARNESSES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_described_and_its_functions_are_short(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module opens with what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            body_doc = ast.get_docstring(node, clean=False) or ""
            assert lines - body_doc.count("\n") <= 60, (
                f"{node.name} has {lines} lines; at most 60 without its docstring"
            )


@pytest.mark.parametrize("group", [MODULES, SCRIPTS, TESTS], ids=["flowception", "scripts", "tests"])
def test_files_are_short(group):
    lengths = {path: path.read_text().count("\n") for path in group if path.name != "__init__.py"}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}, "split it"
    assert sorted(lengths.values())[len(lengths) // 2] <= 150


def test_no_folder_is_crowded():
    folders = {path.parent for path in MODULES + SCRIPTS + TESTS} | {ROOT / "configs", ROOT / "docs"}
    held = {str(folder.relative_to(ROOT)): [p for p in folder.iterdir() if p.is_file()] for folder in folders}
    assert {folder: len(files) for folder, files in held.items() if len(files) > 20} == {}
