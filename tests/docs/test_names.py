"""Everything that the pages name exists: files, configuration keys, functions, links, pictures."""

import re
from pathlib import Path

import pytest

from data_prep.encoder.config import EncodeConfig
from flowception.config import dotted_keys
from flowception.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("flowception", "train", "data_prep", "configs", "slurm", "tests", "benchmarks", "docs")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
PLACEHOLDERS = {"shards/unreadable.jsonl", "overlay.yaml", "more.yaml", "slurm/site.mine.sh"}
KEYS = {*dotted_keys(TrainConfig), *dotted_keys(EncodeConfig)}
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}


def code_words(page: str) -> set[str]:
    """Words of the page's code: in backticks, in fences but for Python, which is run, and in indented blocks."""
    page = re.sub(r"^```python\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"^```text\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)  # what is printed
    fences = re.findall(r"^```.*?\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", prose) + re.findall(r"^ {4,}(.*)$", prose, re.MULTILINE)
    return {word.strip(",;:()[]\"'") for code in fences + spans for word in code.split()}


def missing_files(page: str, folder: Path = ROOT) -> list[str]:
    """Words that look like a file or folder of the repository but do not exist."""
    missing = []
    for word in code_words(page) - PLACEHOLDERS:
        has_folder = "/" in word and word.split("/")[0] in (
            *FOLDERS,
            *(p.name for p in (ROOT / "flowception").iterdir()),
        )
        if "NAME" in word or not (has_folder or re.fullmatch(r"[\w/.-]+\.(py|sh|yaml|md)", word)):
            continue
        near = [base / word for base in (ROOT, ROOT / "flowception", folder)]
        named = [path.with_name(f"{path.name}.py") for path in near] + near
        if not any(p.exists() for p in named) and ("/" in word or word not in {p.name for p in SOURCES}):
            missing.append(word)
    return sorted(missing)


def unknown_keys(page: str) -> list[str]:
    """Words that look like a configuration key, alone or in ``key=value``, but are not."""
    found = set()
    for word in code_words(page) - {"key=value"}:
        key = word.split("=")[0]
        is_key = re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and not re.search(r"\.(py|sh|yaml|json|md)$", key)
        if is_key and ("=" in word[len(key) :] or ("." in key and key.split(".")[0] in SECTIONS)) and key not in KEYS:
            found.add(word)
    return sorted(found)


def unknown_functions(page: str) -> list[str]:
    """Words ``module.name``, except keys and files, where the module exists but does not define the name."""
    modules = {path.stem: path for path in SOURCES if path.suffix == ".py" and path.parts[-3] == "flowception"}
    pairs = [word.split(".") for word in code_words(page) - KEYS if re.fullmatch(r"[a-z_]+\.(?!sh$)[A-Za-z_]+", word)]
    return sorted(
        f"{module}.{name}"
        for module, name in pairs
        if module in modules
        and name not in ("py", "sh")
        and f"{module}.{name}" not in KEYS
        and not re.search(rf"\b{name}\b", modules[module].read_text())
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path):
    page = path.read_text()
    assert missing_files(page, path.parent) == []
    assert unknown_keys(page) == []
    assert unknown_functions(page) == []
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert [link for link in links if link and not (path.parent / link).exists()] == []


def test_the_readme_is_filled_in():
    page = (ROOT / "README.md").read_text()
    assert re.search(r"!\[[^\]]+\]\(docs/images/demo\.png\)", page)
    assert [word for word in ("DEMO_TABLE", "FIGURES", "TODO") if word in page] == []


def test_wrong_names_would_be_found():
    page = "`tests/nn/test_dit.py` `nn/layer.py` `packing/layout` `nowhere.py` `docs/data.md`\n\n"
    page += "```\nsbatch slurm/x.sh\n```\n"
    assert missing_files(page) == ["nn/layer.py", "nowhere.py", "slurm/x.sh", "tests/nn/test_dit.py"]
    assert unknown_keys("    train optim.lr=1 lr=2 `data.held` `zero.stage` `x = 1`") == ["data.held", "lr=2"]
    assert unknown_keys("```python\nf(lr=2)\n```\n\n```\ntrain lr=2\n```\n") == ["lr=2"]
    assert unknown_functions("`layout.build_layout` `layout.build` `dit.Block`") == ["layout.build"]
