import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from flowception import run_directory
from flowception.checkpoint.format import checkpoint_dir, list_steps, read_manifest
from flowception.checkpoint.reader import hashes, latest_valid, read_full
from flowception.data.step_plan import Cursor, PackPlan
from flowception.errors import RunDirectoryError
from flowception.nn.dit import FlowceptionDiT
from flowception.shards.index import ClipIndex
from flowception.shards.schema import NullText
from flowception.training.config import load_config
from flowception.training.data import open_data
from tests.distributed_worker import run_distributed, run_on_two_ranks
from tests.training.workers.toy_set import read_metrics, write_config, write_set

pytestmark = [pytest.mark.xdist_group("runs"), pytest.mark.timeout(900)]  # one fixture makes all runs

WORKER = "tests.training.workers.trainer_worker"


def damage_all_clips(folder):
    """Shards of the same sizes that contain only zeros."""
    for path in folder.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))


def damage_last_step(folder):
    """Make every clip of epoch 0's last step unreadable."""
    plan = open_data(load_config([write_config(folder / "config.yaml", folder / "no_run", folder)])).plan
    last = plan.step(Cursor(0, plan.steps_in_epoch(0) - 1))
    for row in np.concatenate([pack.rows for pack in last.packs]):
        damage_one_clip(folder, int(row))


def damage_one_clip(folder, row=None):
    """Flip a byte in the latents of a training clip; returns its key."""
    index = ClipIndex.load(folder)
    row = int(index.split(0.2)[0][0]) if row is None else row
    clip = index.clips[row]
    path = sorted(folder.glob("*.tar"))[int(clip["shard"])]
    content = bytearray(path.read_bytes())
    content[int(clip["latents_offset"])] ^= 0x10
    path.write_bytes(content)
    return index.key(row)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_set(folder / "shards")
    write_set(folder / "other_shards", codec_fingerprint="0" * 64)
    shutil.copytree(folder / "shards", folder / "bad_shards")
    shutil.copytree(folder / "shards", folder / "dead_shards")
    damage_all_clips(folder / "dead_shards")
    shutil.copytree(folder / "shards", folder / "last_shards")
    damage_last_step(folder / "last_shards")
    shutil.copytree(folder / "shards", folder / "text_shards")
    meta = folder / "text_shards" / "meta.json"
    null_text = dataclasses.asdict(NullText.of(torch.zeros(1, 9)))
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"text_width": 9, "null_text": null_text}))
    (folder / "bad_key").write_text(damage_one_clip(folder / "bad_shards"))
    with run_directory.lock(folder / "locked"):
        return folder, run_on_two_ranks(WORKER, "scenarios", folder=str(folder))


@pytest.fixture(scope="module")
def troubled_runs(runs):
    folder, _ = runs
    return folder, run_on_two_ranks(WORKER, "troubles", folder=str(folder))


def losses(run_dir):
    return [line["loss"] for line in read_metrics(run_dir)]


def test_a_run_writes_the_files_of_the_design(runs):
    folder, results = runs
    run_dir = folder / "whole"
    assert results["whole"] is True
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    wanted = {
        "loss",
        "loss/velocity",
        "loss/insertion",
        "clips",
        "tokens",
        "fill",
        "attention_ratio",
        "lr",
        "grad_norm",
    }
    wanted |= {"step_s", "data_wait_s", "clips_per_s", "tokens_per_s", "time_left_s"}
    wanted |= {"flops", "tflops_per_s", "peak_memory_gib", "attention_ratio_expected", "rate/predicted", "rate/true"}
    assert all(wanted <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "validation/loss" in line] == [6, 12]
    assert list_steps(run_dir) == [0, 4, 8, 12]
    config = load_config([run_dir / "config.yaml"])
    assert (config.max_steps, config.zero.stage, config.model.num_classes) == (12, 3, 2)
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["parameters"] == sum(t.numel() for t in read_full(latest_valid(run_dir)).values())
    assert manifest["shards"]["codec"] == "patchify"


def test_the_loss_falls_and_is_the_weighted_sum_of_its_terms(runs):
    lines = read_metrics(runs[0] / "whole")
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/velocity"] + 0.1 * line["loss/insertion"], rel=1e-12)
    held_out = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert held_out[1] < held_out[0]


def test_step_metrics_match_the_plan_over_all_ranks(runs):
    run_dir = runs[0] / "whole"
    config = load_config([run_dir / "config.yaml"])
    plan, lines = open_data(config).plan, read_metrics(run_dir)
    for line in lines[: plan.steps_in_epoch(0)]:
        step = plan.step(Cursor(0, line["step"] - 1))
        rows, places = (np.concatenate([getattr(pack, name) for pack in step.packs]) for name in ("rows", "places"))
        draws = plan.clip_draws(PackPlan(0, 0, rows, places)).clips
        assert line["rate/true"] == int(draws.missing[draws.insertion_mask].sum())
        assert line["flops"] == step.flops
        assert line["tflops_per_s"] == pytest.approx(step.flops / line["step_s"] / 2 / 1e12)
        times = draws.shown_time[draws.flow_mask]
        bins = {f"loss/velocity/{low / 4:g}-{(low + 1) / 4:g}" for low in (times * 4).long().tolist()}
        assert {name for name in line if name.startswith("loss/velocity/")} == bins
    # before the first step the rate head predicts the data's mean count everywhere
    assert lines[0]["rate/predicted"] == pytest.approx(lines[0]["rate/true"], rel=0.5)
    assert not any("mfu" in line for line in lines)


def test_learning_rate_rises_over_the_warm_up(runs):
    assert [line["lr"] for line in read_metrics(runs[0] / "whole")][:5] == pytest.approx(
        [5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3]
    )


def test_step_0_is_the_untrained_model(runs):
    run_dir = runs[0] / "whole"
    model = FlowceptionDiT(load_config([run_dir / "config.yaml"]).model).initialize(0)
    for kind in ("weights", "ema"):
        saved = read_full(checkpoint_dir(run_dir, 0), kind)
        for name, parameter in model.named_parameters():
            assert saved[name].equal(parameter.detach()), name
    assert not saved["heads.velocity.weight"].any()


def test_a_signal_to_one_rank_stops_all_and_the_same_command_resumes(runs):
    folder, results = runs
    assert (results["stopped"], results["resumed"], results["finished_again"]) == (False, True, True)
    assert list_steps(folder / "stopped") == [0, 6, 8, 12]
    assert hashes(checkpoint_dir(folder / "stopped", 12)) == hashes(checkpoint_dir(folder / "whole", 12))
    assert losses(folder / "stopped") == losses(folder / "whole")


def test_changing_a_fixed_setting_is_an_error_that_names_it(runs):
    results = runs[1]
    assert results["changed_plan"].startswith("PlanError: the plan changed in the middle of epoch")
    assert results["changed_model"].startswith("RunDirectoryError:")
    assert "model.hidden_size was 32 and is 48" in results["changed_model"]
    assert "codec_fingerprint" in results["changed_codec"]
    assert load_config([runs[0] / "stopped" / "config.yaml"]).plan.token_budget == 96, "a refused start changed the run"


def test_prefetching_in_workers_changes_nothing(runs):
    folder, results = runs
    assert results["workers"] is True
    assert losses(folder / "workers") == losses(folder / "whole")[:6]


@pytest.mark.long
def test_a_full_disk_does_not_end_the_run(troubled_runs):
    folder, results = troubled_runs
    assert results["full_disk"] is True
    assert list_steps(folder / "full_disk") == [0, 8]
    assert not list((folder / "full_disk" / "checkpoints").glob("*.tmp"))
    assert losses(folder / "full_disk") == losses(folder / "whole")[:8]
    said = results["said_full_disk"]
    why = "WARNING: cannot save the checkpoint of step 4: rank 1: [Errno 28] No space left on device"
    assert said.count(f"{why}; the newest is of step 0\n") == 1
    assert said.count("WARNING: cannot remove old checkpoints ([Errno 13] Permission denied)\n") == 2
    counts = [line["failed_saves"] for line in read_metrics(folder / "full_disk")]
    assert counts[:4] == [0] * 4
    assert counts == sorted(counts)


@pytest.mark.long
def test_a_failed_last_save_is_an_error_unless_the_run_will_resume(troubled_runs):
    folder, results = troubled_runs
    assert results["full_at_stop"] is False
    assert "WARNING: cannot save the checkpoint of step 2" in results["said_full_at_stop"]
    assert "step 2 of 12: stopped by" in results["said_full_at_stop"]
    assert results["full_at_end"].startswith("CheckpointError: cannot save the checkpoint of step 3: rank 1:")
    assert list_steps(folder / "full_at_end") == [0]


def test_saves_are_timed(runs):
    lines = read_metrics(runs[0] / "whole")
    assert [line["step"] for line in lines if "save_blocked_s" in line] == [1, 5, 9]
    timed = [line["save_s"] for line in lines if "save_s" in line]
    assert timed
    assert min(timed) > 0
    assert {line["failed_saves"] for line in lines} == {0}


def test_a_second_job_is_refused_with_the_holder_of_the_lock(runs, tmp_path):
    assert "is in use by process" in runs[1]["locked"]
    with run_directory.lock(tmp_path), pytest.raises(RunDirectoryError, match="process"):
        run_directory.lock(tmp_path)
    run_directory.lock(tmp_path).release()


def test_init_from_starts_from_the_ema_of_the_other_run(runs):
    folder, results = runs
    assert results["init_from"] is True
    start = read_full(checkpoint_dir(folder / "init_from", 0), "weights")
    source = read_full(checkpoint_dir(folder / "whole", 12), "ema")
    assert all(start[name].equal(source[name]) for name in source)
    assert read_manifest(checkpoint_dir(folder / "init_from", 0)).state["optimizer_steps"] == 0
    assert "has no checkpoint" in results["init_from_nothing"]
    assert "whole was trained on shards of codec_fingerprint ffff" in results["init_from_codec"]
    assert not (folder / "other_codec" / "manifest.json").exists()


def test_fewer_packs_than_ranks_is_an_error(runs):
    assert runs[1]["too_few_packs"].startswith(
        "ConfigError: packs_per_step must be at least the number of ranks, got 1 and 2 ranks"
    )


def test_activation_checkpointing_and_stage_change_nothing(runs):
    folder, results = runs
    assert results["said_checkpointing"].startswith(
        "WARNING: activation_checkpointing auto: all 2 blocks are recomputed"
    )
    assert load_config([folder / "checkpointing/config.yaml"]).model.activation_checkpointing == 2
    assert load_config([folder / "stopped/config.yaml"]).model.activation_checkpointing == 0
    assert losses(folder / "checkpointing") == pytest.approx(losses(folder / "whole")[:3], rel=1e-6)
    assert losses(folder / "stage_2") == pytest.approx(losses(folder / "whole")[:6], rel=1e-4)


def test_bf16_is_close(runs):
    assert losses(runs[0] / "bf16") == pytest.approx(losses(runs[0] / "whole")[:3], rel=0.05)


def test_a_bad_clip_is_listed_and_skipped_from_the_next_epoch_on(runs):
    folder, results = runs
    assert results["bad_clip"] is True
    key = (folder / "bad_key").read_text()
    lines = read_metrics(folder / "bad_clip")
    seen = {epoch: sum(line["clips"] for line in lines if line["epoch"] == epoch) for epoch in (0, 1)}
    assert seen[0] == seen[1], "the bad clip was counted as seen"
    assert sum(line["bad_clips"] for line in lines if line["epoch"] == 0) == 1
    state = read_manifest(checkpoint_dir(folder / "bad_clip", 8)).state
    assert list(state["quarantine"]) == [key]
    assert state["plan_quarantine"] == [key]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)


@pytest.mark.long
def test_an_unreadable_last_step_of_an_epoch_does_not_stop_the_run(troubled_runs):
    folder, results = troubled_runs
    assert results["bad_last_step"] is True
    lines = read_metrics(folder / "bad_last_step")
    assert [line["epoch"] for line in lines][-1] >= 1
    assert sum(line["bad_clips"] for line in lines) > 0


@pytest.mark.long
def test_too_many_bad_clips_stop_every_rank(troubled_runs):
    folder, results = troubled_runs
    assert "1 clips of epoch 0 could not be read, more than data.max_bad_clips=0" in results["one_bad_clip_too_many"]
    assert results["dead_storage"].startswith("DataError: none of the ")
    assert "dead_shards" in results["dead_storage"]
    assert read_metrics(folder / "dead_storage") == []


@pytest.mark.long
def test_a_rank_that_cannot_read_stops_every_rank(troubled_runs):
    assert troubled_runs[1]["unreadable_on_rank_1"] == "CheckpointError: rank 1: the mount is gone"


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_renamed_and_does_not_displace_a_valid_one(troubled_runs):
    folder, results = troubled_runs
    assert results["damaged"] is True
    assert list_steps(folder / "damaged") == [0, 8, 10]
    assert (folder / "damaged" / "checkpoints" / "step_00000012.damaged").is_dir()


@pytest.mark.long
def test_max_steps_below_the_saved_step_is_reported(troubled_runs):
    folder, results = troubled_runs
    assert results["beyond"] is True
    assert "the run is already at step 10, beyond max_steps=9; nothing to do" in results["said_beyond"]
    assert "complete" not in results["said_beyond"]
    assert [line["step"] for line in read_metrics(folder / "damaged")] == list(range(1, 11))


def test_unused_text_is_reported(runs):
    assert runs[1]["text"] is True
    assert "the model does not use the text of the shard set; set model.text_dim=9" in runs[1]["said_text"]


def test_losses_are_the_same_at_another_world_size(runs, tmp_path):
    folder, _ = runs
    run_distributed(WORKER, "one_run", 1, folder=str(folder), name="alone", max_steps=5)
    assert losses(folder / "alone") == pytest.approx(losses(folder / "whole")[:5], rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_changes_of_world_size_and_stage_continue_the_loss_curve(tmp_path):
    """Weight decay on one group and a cosine schedule: 2 ranks at ZeRO-3, then 1, 4 and 2 ranks, each at a different
    stage.

    ``test_equivalence.py`` has the 50 steps after one change of world size; this is a chain, and all of the state.
    No job stops at a step of validation, which it would leave out.
    """
    write_set(tmp_path / "shards")
    settings = {"max_steps": 20, "packs_per_step": 4, "optim__lr_schedule": "cosine", "optim__weight_decay": 0.3}

    def job(world_size, stage, name, stop_after=None):
        jobs = run_distributed(
            WORKER, "one_run", world_size, timeout_s=240, folder=str(tmp_path), name=name, stop_after=stop_after,
            zero__stage=stage, **settings,
        )  # fmt: skip
        assert set(jobs) == {stop_after is None}

    job(2, 3, "never_changed")
    for world_size, stage, stop_after in ((2, 3, 6), (1, 0, 3), (4, 2, 3), (2, 3, None)):
        job(world_size, stage, "changed", stop_after)
    never, changed = (read_metrics(tmp_path / name) for name in ("never_changed", "changed"))
    assert [line["lr"] for line in changed] == [line["lr"] for line in never]
    for name in ("step", "epoch", "clips", "tokens", "rate/true", "skipped_steps", "bad_clips"):
        assert [line[name] for line in changed] == [line[name] for line in never], name
    for name in ("loss", "loss/velocity", "loss/insertion", "grad_norm"):
        assert [line[name] for line in changed] == pytest.approx([line[name] for line in never], rel=1e-4), name
    held_out = [[line["validation/loss"] for line in lines if "validation/loss" in line] for lines in (changed, never)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    ends = [checkpoint_dir(tmp_path / name, 20) for name in ("never_changed", "changed")]
    states = [read_manifest(folder).state for folder in ends]
    usual_norms = [state["guard"].pop("usual_norm") for state in states]
    assert usual_norms[1] == pytest.approx(usual_norms[0], rel=1e-4)
    assert states[1] == states[0]
    for kind in ("weights", "ema"):
        whole, again = (read_full(folder, kind) for folder in ends)
        assert all(torch.allclose(again[name], whole[name], rtol=1e-3, atol=1e-5) for name in whole)


def test_the_config_in_use_is_that_of_the_helper(tmp_path):
    config = load_config([write_config(tmp_path / "c.yaml", tmp_path, tmp_path)])
    assert config.zero.param_persistence_threshold == 0
