"""The command line: output of each subcommand, and one line with exit code 2 for errors."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from flowception.checkpoint import writer
from flowception.checkpoint.format import KINDS
from flowception.cli import TASKS, main


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with two checkpoints of one parameter."""
    for step in (0, 10):
        tensors = {f"{kind}/weight": torch.full((6,), float(step)) for kind in KINDS}
        attempt = writer.make(writer.attempt_dir(tmp_path, step, "test"))
        writer.write_slices(attempt, 0, tensors, {"weight": ((2, 3), 0, 6)})
        receipts = writer.wait_for_receipts(attempt, 1, lambda: 0)
        writer.commit(attempt, step, receipts, {"optimizer_steps": step})
    return tmp_path


def fails_in_one_line(capsys, *words):
    """Run a command that must fail, and return its single line on stderr."""
    assert main(list(map(str, words))) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowception: error: ")
    assert error.count("\n") == 1
    return error


def test_checkpoints_are_listed(run_dir, capsys):
    assert main(["checkpoint", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 0: not verified", "step 10: not verified"]


def test_verify_finds_the_damaged_one(run_dir, capsys):
    assert main(["checkpoint", str(run_dir), "--verify"]) == 0
    assert capsys.readouterr().out.count("valid") == 2
    file = next((run_dir / "checkpoints" / "step_00000010").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    error = fails_in_one_line(capsys, "checkpoint", run_dir, "--verify")
    assert "[10]" in error


def test_hash_prints_one_line_per_kind_and_skips_damage(run_dir, capsys):
    def hashes(*words):
        assert main(["checkpoint", str(run_dir), "--hash", *words]) == 0
        return dict(line.split() for line in capsys.readouterr().out.splitlines())

    newest = hashes()
    assert list(newest) == ["weights", "ema", "optimizer"]
    assert all(len(digest) == 64 for digest in newest.values())
    first = hashes("--checkpoint", "0")
    assert all(first[name] != newest[name] for name in first)
    (run_dir / "checkpoints" / "step_00000010" / "manifest.json").unlink()
    assert hashes() == first


def test_a_folder_without_a_run(tmp_path, capsys):
    assert "does not exist" in fails_in_one_line(capsys, "checkpoint", tmp_path / "nothing")
    assert "no checkpoint" in fails_in_one_line(capsys, "checkpoint", tmp_path)
    assert "run directory" in fails_in_one_line(capsys, "generate", tmp_path, "--num", 1, "--out", tmp_path / "out")


def test_clips_are_counted_by_num_or_by_prompts(tmp_path, capsys):
    words = ("generate", tmp_path, "--out", tmp_path / "out")
    assert "--num is missing" in fails_in_one_line(capsys, *words)
    prompts = tmp_path / "prompts.txt"
    assert "cannot read --prompts" in fails_in_one_line(capsys, *words, "--prompts", prompts)
    prompts.write_text("a red disc\n")
    assert "is not a run directory" in fails_in_one_line(capsys, *words, "--prompts", prompts)


def test_a_missing_step(run_dir, capsys):
    assert "no checkpoint of step 7" in fails_in_one_line(capsys, "checkpoint", run_dir, "--checkpoint", 7, "--hash")


def test_i2v_without_context(tmp_path, capsys):
    words = ("generate", tmp_path, "--task", "i2v", "--num", 1, "--out", tmp_path / "out")
    assert "--context" in fails_in_one_line(capsys, *words)
    assert "does not exist" in fails_in_one_line(capsys, *words, "--context", tmp_path / "missing.png")


def test_errors_of_generation_name_flags(tmp_path, capsys):
    words = ("generate", tmp_path, "--num", 1, "--out", tmp_path / "out", "--part", 3, "--num-parts", 2)
    assert "--part must be >= 0 and less than --num-parts, got 3 and 2" in fails_in_one_line(capsys, *words)


def test_every_task_of_the_process_can_be_generated():
    from flowception.flow import TASK_NUMBERS

    assert list(TASKS) == list(TASK_NUMBERS)


def test_malformed_keep(tmp_path, capsys):
    words = ("generate", tmp_path, "--task", "completion", "--num", 1, "--out", tmp_path / "out", "--keep", "3-1")
    assert "such as 0-3,8-11" in fails_in_one_line(capsys, *words)


def test_malformed_size(tmp_path, capsys):
    words = ("generate", tmp_path, "--num", 1, "--out", tmp_path / "out", "--size", "256")
    assert "height x width" in fails_in_one_line(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "run", "--num", "0", "--out", "out"],
        ["generate", "run", "--num", "1", "--out", "out", "--seed", "-1"],
        ["generate", "run", "--num", "1", "--out", "out", "seed=3"],
        ["generate", "run", "--num", "1", "--out", "out", "--task", "v2t"],
        ["plan", "--config", "c.yaml", "--wrold-size", "2"],
        ["plan"],
        [],
    ],
)
def test_unknown_arguments(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys, flowception.cli as c\n"
        "try: c.main(['plan', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'deepspeed', 'av', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A configuration and a set of 300 clips of 6 to 10 frames."""
    from flowception.shards.schema import ClipRecord, ShardMeta
    from flowception.shards.writer import ShardSetWriter

    tmp_path = tmp_path_factory.mktemp("plan")
    shards = tmp_path / "shards"
    shard_writer = ShardSetWriter(shards, ShardMeta(codec="patchify", codec_fingerprint="0", latent_channels=12))
    for shard in range(6):
        keys = range(50 * shard, 50 * shard + 50)
        shard_writer.write_shard(
            shard, [ClipRecord(key=f"clip-{key}", latents=torch.zeros(6 + key % 5, 12, 4, 4)) for key in keys]
        )
    shard_writer.finish()
    config = {
        "run_dir": str(tmp_path / "run"), "max_steps": 10, "token_budget": 1024, "packs_per_step": 4,
        "data": {"path": str(shards)}, "model": {"preset": "toy"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


def test_plan_is_the_same_for_any_world_size_and_start(planned, capsys):
    config, table = planned / "config.yaml", planned / "plan.json"

    def plan(*words):
        assert main(["plan", "--config", str(config), *words, "--json", str(table)]) == 0
        return json.loads(table.read_text())

    alone = plan("--world-size", "1", "--steps", "6")
    assert [row["step"] for row in alone] == list(range(6))
    assert set(alone[0]) == {
        "step", "order_hash", "clips", "tokens", "fill", "flops_imbalance", "attention_ratio",
    }  # fmt: skip
    assert plan("--world-size", "3", "--steps", "6") == alone
    assert plan("--world-size", "4", "--steps", "3", "--start", "3") == alone[3:]
    assert alone[0]["order_hash"][:12] in capsys.readouterr().out
    other = plan("--steps", "6", "seed=1")
    assert other[0]["order_hash"] != alone[0]["order_hash"]
    assert plan("seed=1", "--steps", "6") == other


def test_plan_refuses_bad_configurations(planned, capsys):
    words = ("plan", "--config", planned / "config.yaml")
    assert "packs_per_step=8" in fails_in_one_line(capsys, *words, "--world-size", 8)
    assert "token_budget=" in fails_in_one_line(capsys, *words, "token_budget=100")
    assert "token_budget" in fails_in_one_line(capsys, *words, "token_budgit=1000")
    assert "meta.json" in fails_in_one_line(capsys, *words, f"data.path={planned}")
    assert "missing.yaml" in fails_in_one_line(capsys, "plan", "--config", planned / "missing.yaml")


def test_doctor_reports_the_machine(capsys):
    assert main(["doctor"]) == 0
    found = {line[:24].strip(): line[24:].strip() for line in capsys.readouterr().out.splitlines()}
    assert found["torch"] == torch.__version__ or found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["h264"].startswith("ok")
    assert found["deepspeed import"].startswith("ok")
    assert "for cpu" in found["attention"] or torch.cuda.is_available()
    assert "GiB" in found["free disk here"]
    assert not [name for name, value in found.items() if value.startswith("FAILED")]


def test_doctor_runs_attention_forward_and_backward(monkeypatch, capsys):
    assert main(["doctor"]) == 0
    assert "forward and backward within" in capsys.readouterr().out
    module = importlib.import_module("flowception.nn.attention")
    real = module.attention

    def a_little_wrong(query, *rest, **named):
        return real(query * 1.01 if query.dtype != torch.float64 else query, *rest, **named)

    monkeypatch.setattr(module, "attention", a_little_wrong)
    assert main(["doctor"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")]
    assert "FAILED" in line


@pytest.mark.parametrize("variables", [{"SLURM_GPUS_ON_NODE": "1"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_doctor_fails_if_an_expected_gpu_is_not_visible(monkeypatch, capsys, variables):
    for name in ("DS_ACCELERATOR", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    meant = "SLURM_GPUS_ON_NODE" in variables
    assert main(["doctor"]) == int(meant)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gpus")]
    assert ("FAILED: RuntimeError: torch" in line and "although Slurm allocated GPUs" in line) == meant
    assert ("torch is built for CUDA 13.0 but SEES NO GPU" in line) != meant
