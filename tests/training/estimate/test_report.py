import dataclasses
from pathlib import Path

import pytest
import yaml

from flowception import run_directory
from flowception.data.step_plan import Cursor
from flowception.errors import ConfigError, Problems
from flowception.nn import count_parameters
from flowception.packing.flops import training_flops
from flowception.shards.schema import ShardMeta
from flowception.training.config import load_config
from flowception.training.data import open_data
from flowception.training.estimate.preflight import check_data, check_run
from flowception.training.estimate.report import Assumptions, report, world_sizes
from flowception.training.hardware import GIB
from tests.training.workers.toy_set import write_config, write_set


@pytest.fixture
def config_path(tmp_path):
    return write_config(tmp_path / "c.yaml", tmp_path / "run", write_set(tmp_path / "shards"))


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_dry_run_reports_everything_and_starts_nothing(config_path, tmp_path):
    config = load_config([config_path])
    text, problems = report(config, Assumptions(world_sizes="1,3"))
    assert problems == []
    assert f"parameters: {count_parameters(config.model):,}" in text
    assert "37 clips, 4 steps per epoch" in text
    assert row(text, "packs per rank") == ["3", "1"]
    assert yaml.safe_load(text.split("\n\n")[0])["max_steps"] == 12
    assert not (tmp_path / "run").exists()


def test_flops_are_those_of_the_clips_of_an_epoch(config_path):
    config = load_config([config_path])
    plan = open_data(config).plan
    steps = [plan.step(Cursor(0, number)) for number in range(plan.steps_in_epoch(0))]
    by_hand = []
    for step in steps:
        total = 0.0
        for pack in step.packs:
            visible = plan.clip_draws(pack).clips.visible_frames.numpy()
            total += training_flops(config.model.spec(), visible, 2, 2).sum()
        by_hand.append(total)
    assert [step.flops for step in steps] == pytest.approx(by_hand)
    mean = sum(by_hand) / len(by_hand)
    assert plan.mean_step_flops(0) == pytest.approx(mean)
    text, _ = report(config, Assumptions(world_sizes="1,2", hfu=0.5, peak_tflops=1e-6))
    assert f"FLOPs per step: {mean:.4g}" in text
    one_rank_days = 12 * mean / (0.5 * 1e-6 * 1e12) / 86400
    # three packs on two ranks: one rank waits for part of the step
    for overlap in ("overlapped", "in sequence"):
        assert [float(value) for value in row(text, f"days, {overlap}")[:2]] == pytest.approx(
            [one_rank_days, one_rank_days * 2 / 3], abs=0.006
        )
    assert "HFU 0.5 of 1e-06 TFLOP/s per rank (as given)" in text
    assert [float(value) for value in row(text, "MFU, in sequence")[:2]] == pytest.approx([0.5, 0.375], abs=0.001)


def test_step_time_includes_communication_and_recomputation(config_path):
    """One GPU per node, a slow network, and a rank that recomputes its blocks."""
    words = ["model.activation_checkpointing=true", "zero.stage=1"]
    slow = Assumptions(world_sizes="3", hfu=0.5, peak_tflops=1e-6, bandwidth_gb_per_s=1e-6, gpus_per_node=1)
    config, plain = load_config([config_path], words), load_config([config_path])
    text, without = report(config, slow)[0], report(plain, slow)[0]
    computing = float(row(text, "compute, s")[0])
    assert computing == pytest.approx(4 / 3 * float(row(without, "compute, s")[0]), abs=0.001)
    sent_s = (
        3 * 4 * count_parameters(config.model) * (2 / 3) / (1e-6 * 1e9)
    )  # all-reduce of gradients, all-gather of weights
    assert float(row(text, "communication, s")[0]) == pytest.approx(sent_s, abs=0.001)
    assert row(text, "blocks kept") + row(without, "blocks kept") == ["0", "2"]
    overlapped, sequential = (float(row(text, f"days, {overlap}")[0]) for overlap in ("overlapped", "in sequence"))
    assert overlapped == pytest.approx(12 * max(sent_s, computing) / 86400, abs=0.006)
    assert sequential == pytest.approx(12 * (sent_s + computing) / 86400, abs=0.006)
    fast = report(config, dataclasses.replace(slow, gpus_per_node=4))[0]
    assert float(row(fast, "between nodes, GB")[0]) == 0


def test_synthetic_clips_replace_a_set(config_path, tmp_path):
    config = load_config([config_path], [f"data.path={tmp_path / 'nowhere'}"])
    text, problems = report(config, Assumptions(world_sizes="1", clip="6x2x2", num_clips=500))
    assert problems == []
    assert "clips of 6x2x2 latents assumed" in text
    assert "FLOPs per step" in text
    with pytest.raises(ConfigError, match="--clip must be .*, got '6x2'"):
        report(config, Assumptions(clip="6x2"))


def test_problems_are_listed_all_at_once(config_path, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    words = [
        "token_budget=20", "packs_per_step=2", "model.text_dim=7", "model.num_classes=1", "logging.wandb_project=p",
        f"init_from={tmp_path / 'nothing'}", "zero.hierarchical_partition_size=3",
    ]  # fmt: skip
    text, problems = report(load_config([config_path], words), Assumptions(world_sizes="4"))
    expected = ["the set has no text", "token_budget is 20", "packs_per_step must be at least the number"]
    expected += ["zero.hierarchical_partition_size must divide the number", "wandb is required", "init_from="]
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == len(expected)
    assert all(f"problem {number}: {problem}" in text for number, problem in enumerate(problems, 1))
    assert row(text, "packs per rank") == ["refused"]


def describe_run(folder, config, with_checkpoint=True, **model):
    """Write what the start of a run of the given model leaves in its directory."""
    folder.mkdir()
    meta = ShardMeta.load(Path(config.data.path))
    manifest = run_directory.describe(dataclasses.replace(config.model, **model), meta)
    run_directory.write(folder, "", manifest)
    if with_checkpoint:
        (folder / "checkpoints/step_00000004").mkdir(parents=True)


def found(config, sizes="2"):
    return report(config, Assumptions(world_sizes=sizes))[1]


def test_a_rank_to_profile_that_does_not_exist_is_a_problem(config_path):
    words = ["profile.active_steps=2", "profile.ranks=[0,2]"]
    assert found(load_config([config_path], words), "3") == []
    (problem,) = found(load_config([config_path], words), "2,3")
    assert problem.startswith("profile.ranks must be ranks from 0 to 1, got [0, 2] and 2 ranks")


def test_a_run_directory_of_another_model_is_a_problem(config_path, tmp_path):
    config = load_config([config_path])
    describe_run(tmp_path / "run", config)
    assert found(config) == []
    (problem,) = found(load_config([config_path], ["model.num_layers=3"]))
    assert "was made by another model: model.num_layers was 2 and is 3" in problem


def test_a_run_directory_of_another_codec_is_one_problem(config_path, tmp_path):
    describe_run(tmp_path / "run", load_config([config_path]))
    other = write_set(tmp_path / "other", codec_fingerprint="e" * 64)
    (problem,) = found(load_config([config_path], [f"data.path={other}"]))
    assert f"trained on shards of codec_fingerprint {'f' * 64}" in problem


def test_weights_of_another_codec_are_a_problem_until_the_run_has_its_own(config_path, tmp_path):
    config = load_config([config_path])
    describe_run(tmp_path / "weights", config)
    init_from = f"init_from={tmp_path / 'weights'}"
    assert found(load_config([config_path], [init_from])) == []
    other = write_set(tmp_path / "other", codec_fingerprint="e" * 64)
    words = [init_from, f"data.path={other}"]
    (problem,) = found(load_config([config_path], words))
    assert problem.startswith(f"{tmp_path / 'weights'} was trained on shards of codec_fingerprint {'f' * 64}")
    (tmp_path / "weights/manifest.json").unlink()
    (problem,) = found(load_config([config_path], words))
    assert "has no manifest.json, so its codec is unknown" in problem
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    assert found(load_config([config_path], words)) == []


def test_weights_without_a_checkpoint_are_a_problem_until_the_run_has_its_own(config_path, tmp_path):
    config = load_config([config_path], [f"init_from={tmp_path / 'weights'}"])
    describe_run(tmp_path / "weights", config, with_checkpoint=False)
    (problem,) = found(config)
    assert problem.startswith(f"init_from={tmp_path / 'weights'} has no checkpoint")
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    assert found(config) == []


def test_missing_data_is_a_problem_and_the_rest_is_still_reported(config_path, tmp_path):
    config = load_config([config_path], [f"data.path={tmp_path / 'nowhere'}"])
    text, problems = report(config, Assumptions())
    assert len(problems) == 1
    assert "nowhere" in problems[0]
    assert "data: no plan (see the problems below)" in text
    assert row(text, "packs per rank") == ["3", "refused", "refused"]


def test_a_sound_run_has_no_problem(config_path):
    config, problems = load_config([config_path]), Problems()
    assert check_data(config, problems) is not None
    check_run(config, [1, 3], problems)
    assert problems.found == []


def test_every_sharding_is_listed_with_the_configured_one_marked(config_path):
    config = load_config([config_path], ["packs_per_step=16", "zero.hierarchical_partition_size=4"])
    text, _ = report(config, Assumptions(world_sizes="16", memory_gb="80"))
    table = text.split("16 GPUs of 80 GB:\n")[1].split("\n\n")[0].splitlines()
    assert sorted(line[2:24].strip() for line in table) == [
        "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 in groups of 4"
    ]  # fmt: skip
    assert [line[2:24].strip() for line in table if line.startswith("*")] == ["ZeRO-3 in groups of 4"]
    seconds = [float(line.split()[-1]) for line in table]
    assert seconds == sorted(seconds)


def test_there_is_one_summary_per_number_and_size_of_devices(tmp_path):
    """64 GPUs have one pack each, so gradients are reduced once at any stage, and ZeRO-2 gathers bf16 weights."""
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere", model={"preset": "2b"})
    words = ["precision=bf16", "packs_per_step=64", "token_budget=16384", "model.compile=blocks"]
    assumed = Assumptions(world_sizes="8,64,65", clip="19x8x8", text_tokens=128, num_clips=3000, memory_gb="80,24,1")
    text, _ = report(load_config([path], [*words, "model.activation_checkpointing=auto"]), assumed)
    said = text.split("\n\n")[-1].splitlines()[:6]
    assert said[0].startswith("fastest on 8 GPUs of 80 GB: ZeRO-1, all 38 blocks kept (")
    assert said[1].startswith("fastest on 8 GPUs of 24 GB: ZeRO-2, 11 of 38 blocks kept (")
    assert "; as configured, ZeRO-3, 13 of 38 blocks kept: " in said[1]
    assert said[2].startswith(
        "nothing fits 8 GPUs of 1 GB: as configured, ZeRO-3, none of 38 blocks kept, the run needs"
    )
    assert said[3].startswith("fastest on 64 GPUs of 80 GB: ZeRO-2, all 38 blocks kept (")
    assert "; as configured, ZeRO-3, all 38 blocks kept: 0." in said[3]
    assert row(text, "blocks kept") == ["38", "38", "38"]
    assert row(text, "packs per rank") == ["8", "1", "refused"]


def test_device_memory_is_from_the_run_unless_overridden(config_path):
    config = load_config([config_path], ["memory_gib=80"])
    assert "fastest on 1 GPU of 80 GB: " in report(config, Assumptions(world_sizes="1"))[0]
    assert "fastest on 1 GPU of 40.5 GB: " in report(config, Assumptions(world_sizes="1", memory_gb="40.5"))[0]
    for wrong in ("x", "0", "80,", "nan"):
        with pytest.raises(ConfigError, match="--memory-gb must be numbers > 0"):
            report(config, Assumptions(memory_gb=wrong))


def test_dry_run_of_two_billion_parameters(tmp_path):
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere", model={"preset": "2b"})
    config = load_config([path], ["precision=bf16", "packs_per_step=64"])
    text, _ = report(config, Assumptions(world_sizes="8,64"))
    parameters = int(text.split("parameters: ")[1].split(" ")[0].replace(",", ""))
    assert 2.0e9 < parameters < 2.2e9
    assert [float(value) for value in row(text, "optimizer")] == pytest.approx(
        [8 * parameters / 8 / GIB, 8 * parameters / 64 / GIB], abs=0.006
    )
    assert f"checkpoint: {16 * parameters / 1e9:.2f} GB" in text


@pytest.mark.parametrize(("compiled", "kept"), [("off", 77.6), ("blocks", 40.5)])
def test_activations_fall_with_the_blocks_that_are_checkpointed(tmp_path, compiled, kept):
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere", model={"preset": "2b"})
    words = ["precision=bf16", "packs_per_step=64", "token_budget=16384", f"model.compile={compiled}"]
    texts = [
        report(
            load_config([path], [*words, f"model.activation_checkpointing={blocks}"]), Assumptions(world_sizes="64")
        )[0]
        for blocks in ("false", "20", "true")
    ]
    saved = 16384 * 1536 * (kept - 2) / GIB
    for text, blocks in zip(texts, (38, 18, 0)):
        assert row(text, "blocks kept") == [str(blocks)]
        assert f"a block that is not recomputed adds {saved:.2f}:" in text
    none, some, every = (float(row(text, "activations")[0]) for text in texts)
    assert none - some == pytest.approx(20 * saved, abs=0.011)
    assert some - every == pytest.approx(17 * saved, abs=0.011)  # one is being recomputed


def test_world_sizes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_sizes("") == [2, 8, 64]
    assert world_sizes("8,64") == [8, 64]
    for wrong in ("x", "0", "8,"):
        with pytest.raises(ConfigError, match="--world-size"):
            world_sizes(wrong)


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("hfu", {"hfu": 0.0}), ("hfu", {"hfu": 1.5}), ("gpus-per-node", {"gpus_per_node": 0}),
        ("peak-tflops", {"peak_tflops": -1.0}), ("num-clips", {"num_clips": 0}),
        ("bandwidth", {"bandwidth_gb_per_s": 0.0}), ("inside-node", {"inside_node_gb_per_s": -1.0}),
        ("memory-bandwidth", {"memory_gb_per_s": 0.0}), ("stage-3-block-ms", {"stage_3_block_ms": -1.0}),
    ],
)  # fmt: skip
def test_assumptions_out_of_range_are_errors(option, wrong):
    with pytest.raises(ConfigError, match=f"^--{option} must be .*, got {wrong[next(iter(wrong))]}$"):
        dataclasses.replace(Assumptions(), **wrong)
