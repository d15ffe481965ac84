"""The expected length law of a folder of generated clips."""

import importlib.util
import json
from pathlib import Path

import pytest

from flowception.flow import ProcessConfig, Role

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/task_lengths.py"
S, C, P = Role.START, Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("task_lengths", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(task, roles):
    names = {"s": "start", "f": "free", "A": "context_active", "P": "context_passive"}
    return {"task": task, "roles": [names[letter] for letter in roles], "latent_frames": len(roles)}


@pytest.mark.parametrize(
    ("task", "roles", "given"),
    [
        ("t2v", "sfsf", []),
        ("i2v", "Asff", [C]),
        ("v2v", "PPAfss", [P, P, C]),
        ("interpolation", "AffAP", [C, C, P]),
        ("completion", "sfPAfP", [S, P, C, P]),
        ("completion", "AffA", [C, C]),
    ],
)
def test_the_context_is_read_from_the_roles(script, task, roles, given):
    assert script.given_of(record(task, roles)) == given


def test_the_expected_law_by_hand(script):
    """The toy world: 6, 7, 8, 9, 10 frames with 0.3, 0.1, 0.2, 0.1, 0.3."""
    process = ProcessConfig(tasks={"v2v": 1}, num_start_frames=2, max_context_frames=6)
    # c = 5 of at most min(6, n - 1) frames, and 2 starts: 6 frames are impossible, other lengths as likely as before.
    law = script.expected_law([record("v2v", "PPPPAssf")], process)
    assert law == pytest.approx({7: 1 / 7, 8: 2 / 7, 9: 1 / 7, 10: 3 / 7})
    # c = 3: 6 frames allow 5 context sizes, longer clips 6. Half of the clips are text-to-video.
    both = script.expected_law([record("v2v", "PPAss"), record("t2v", "ss")], process)
    weight = 0.3 / 5 + 0.7 / 6
    assert both[6] == pytest.approx((0.3 / 5 / weight + 0.3) / 2)
    assert sum(both.values()) == pytest.approx(1)


def test_a_folder_is_measured_and_printed(script, tmp_path, capsys):
    (tmp_path / "t2v").mkdir()
    lines = [json.dumps(record("t2v", "ss" + "f" * more)) for more in (4, 4, 8)]
    (tmp_path / "t2v/clips.jsonl").write_text("\n".join(lines))
    words = ["--config", str(SCRIPT.parents[1] / "configs/demo.yaml"), "--generated", str(tmp_path)]
    assert script.main(words) == 0
    assert "| `t2v` | 3 | 8.00 | 7.33 | 0.40 |" in capsys.readouterr().out
