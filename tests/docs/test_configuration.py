"""The page of configuration keys matches the dataclasses."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale():
    script = load_script()
    assert script.PAGE.read_text() == script.page(), "run python docs/make_configuration.py"


def test_every_key_has_a_text_and_the_stable_ones_are_there():
    lines = [line for line in load_script().page().splitlines() if line.startswith("| `")]
    keys = {line.split("`")[1] for line in lines}
    assert not [line for line in lines if line.rstrip().endswith("|  |")]
    assert {
        "run_dir", "max_steps", "seed", "init_from", "packs_per_step", "token_budget", "checkpoint.save_every_steps",
        "zero.stage", "insertion_share", "data.path",
    } <= keys  # fmt: skip
