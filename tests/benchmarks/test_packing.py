"""The benchmark writes all entries, and its packed and padded runs are the same computation."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from flowception.nn import dit

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packing.py"
TINY = "--frames 6 --tokens-per-frame 4 --width 32 --depth 1 --heads 2 --clips 3 --draws 2 --repeats 1 --threads 1"


@pytest.fixture
def packing(monkeypatch):
    specification = importlib.util.spec_from_file_location("packing_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "packing_benchmark", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    dit.compiled_block.cache_clear()
    yield module
    torch._dynamo.reset()
    dit.compiled_block.cache_clear()


def test_entries_of_the_file(packing, monkeypatch, tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["packing.py", "--json", str(figures), "--picture", str(picture), *TINY.split()])
    packing.main()
    results = json.loads(figures.read_text())
    assert set(results) == {"share_0.5", "share_1"}
    for result in results.values():
        assert result["packed_over_padded"] == result["packed_s"] / result["padded_s"]
        assert result["packed_over_full"] == result["packed_s"] / result["full_s"]
        assert result["padded_flops"] == result["full_flops"] > result["packed_flops"]
        assert 0.3 < result["flops_packed_over_full"] < 1
        assert ("compiled_speedup" in result) == (packing.compiled_blocks.why_not() is None)
    assert picture.stat().st_size > 1000


def test_defaults(packing, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["packing.py", "--json", str(tmp_path / "figures.json")])
    settings = vars(packing.parse_arguments())
    expected = {"frames": 16, "tokens_per_frame": 36, "width": 192, "depth": 4, "heads": 4, "clips": 8, "threads": 2}
    assert {name: settings[name] for name in expected} == expected
    assert settings["num_start_frames"] == 3
    assert settings["shares"] == [0.5, 1.0]


def figures(padded: float, full: float) -> dict[str, float]:
    return {"packed_over_padded": padded, "packed_over_full": full, "flops_packed_over_full": 0.5}


@pytest.mark.parametrize(
    ("results", "missed"),
    [
        ({"share_0.5": figures(0.80, 0.549), "share_1": figures(0.62, 0.451)}, []),
        ({"share_0.5": figures(0.81, 0.5), "share_1": figures(0.62, 0.5)}, ["share_0.5: packed_over_padded"]),
        ({"share_0.5": figures(0.80, 0.5), "share_1": figures(0.63, 0.5)}, ["share_1: packed_over_padded"]),
        ({"share_0.5": figures(0.80, 0.56), "share_0.8": figures(0.9, 0.5)}, ["share_0.5: packed_over_full"]),
        ({"share_1": figures(0.60, 0.5) | {"compiled_speedup": 1.2}}, ["share_1: compiled_speedup"]),
        ({"share_1": figures(0.70, 0.44)}, ["share_1: packed_over_full", "share_1: packed_over_padded"]),
    ],
)  # fmt: skip
def test_check_fails_when_a_target_is_missed(packing, monkeypatch, tmp_path, capsys, results, missed):
    shares = [key.removeprefix("share_") for key in results]
    command = ["packing.py", "--json", str(tmp_path / "figures.json"), "--shares", *shares]
    monkeypatch.setattr(packing, "measure", lambda _, share: results[f"share_{share:g}"])
    monkeypatch.setattr(sys, "argv", command)
    assert packing.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    assert packing.main() == (1 if missed else 0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix("MISSED ").split(" is ")[0] for line in lines] == missed


def test_a_wrong_padded_run_is_detected(packing, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["packing.py", "--json", str(tmp_path / "figures.json"), *TINY.split()])
    arguments = packing.parse_arguments()
    model, latents = packing.make_model(arguments), packing.make_latents(arguments)
    steps = packing.make_steps(arguments, model, latents, 1.0, 0)
    packing.check_same_loss(steps)
    steps["padded"].attend = steps["full"].attend
    with pytest.raises(SystemExit, match="must have the same loss"):
        packing.check_same_loss(steps)
