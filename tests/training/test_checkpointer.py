import pytest

from flowception.checkpoint.format import checkpoint_dir, read_manifest
from flowception.checkpoint.reader import hashes
from flowception.errors import ConfigError
from flowception.training.checkpointer import lay_out
from flowception.training.resume import CheckpointConfig
from tests.distributed_worker import run_distributed

pytestmark = pytest.mark.xdist_group("saves")

WORKER = "tests.training.workers.saving_worker"


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Scenarios on two ranks: (folder, results of rank 0)."""
    folder = tmp_path_factory.mktemp("saves")
    return folder, run_distributed(WORKER, "scenarios", 2, folder=str(folder))[0]


def test_vectors_are_packed_into_buffers_without_splitting_any():
    places, used = lay_out([3, 4, 5, 3, 20, 1, 0], 8)
    assert places == [(0, 0), (0, 3), (1, 0), (1, 5), (2, 0), (3, 0), (3, 1)]
    assert used == [7, 8, 20, 1]
    assert lay_out([], 8) == ([], [])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_saved_state_is_that_at_the_start_of_the_save(saves, stage):
    folder, results = saves
    at_once, background = (folder / str(stage) / name for name in ("at_once", "background"))
    assert results[f"snapshot {stage}"]["nothing_yet"] == []
    assert hashes(checkpoint_dir(background, 2)) == hashes(checkpoint_dir(at_once, 2))
    later = hashes(checkpoint_dir(background, 4))
    assert all(later[title] != value for title, value in hashes(checkpoint_dir(background, 2)).items())
    state = read_manifest(checkpoint_dir(background, 4)).state
    assert state == {"step": 4, "optimizer_steps": 4, "world_size": 2, "zero_stage": stage}


def test_metrics_show_a_save(saves):
    metrics = saves[1]["snapshot 3"]["metrics"]
    assert metrics["failed_saves"] == 0
    assert metrics["save_blocked_s"] > 0
    assert metrics["save_s"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_fails_only_that_save(saves, rank):
    result = saves[1][f"failing {rank}"]
    why = f"cannot save the checkpoint of step 3: rank {rank}: [Errno 28] No space left on device"
    assert result["middle"] == [2, 1, why, [1, 2]], "the older checkpoints stay"
    assert result["names_then"] == ["step_00000001", "step_00000002"]
    assert result["reports"] == [f"WARNING: {why}; the newest is of step 2"]
    assert (result["saved_step"], result["failure"], result["metrics"]["failed_saves"]) == (4, None, 1)
    assert result["names"] == ["step_00000002", "step_00000004"]


def test_a_silent_rank_fails_the_save_on_timeout(saves):
    result = saves[1]["no_room_for_words"]
    assert result["saved_step"] is None
    assert "rank 1 did not finish within 0.2 s; check the storage" in result["failure"]
    assert result["reports"] == [f"WARNING: {result['failure']}; no earlier one exists"]
    assert result["names"] == []


def test_a_late_rank_does_not_damage_later_saves(saves):
    result = saves[1]["late"]
    assert len(result["left"]) == 1, "the late rank made its folder again"
    assert result["left"][0].startswith("step_00000001.")
    assert result["names"] == ["step_00000002"]
    assert (result["saved_step"], result["metrics"]["failed_saves"]) == (2, 1)


def test_only_one_save_runs_at_a_time(saves):
    result = saves[1]["one_at_a_time"]
    assert result["events"] == [["copied", "written", "committed"] * 3, ["copied", "written"] * 3]
    assert result["names"] == ["step_00000001", "step_00000002", "step_00000003"]


def test_leftovers_of_a_killed_job_are_never_mixed_with_a_new_attempt(saves):
    result = saves[1]["leftovers"]
    assert result["said"] == [
        "WARNING: cannot remove the files of an unfinished save ([Errno 28] No space left on device)"
    ]
    assert "rank 1: [Errno 28]" in result["failure"]
    assert result["names"] == ["step_00000001.killed-1.tmp", "step_00000001.replaced.tmp"]
    assert result["cleared"] == ["step_00000001"], "one about to be replaced is put back"


def test_the_newest_and_every_nth_checkpoint_are_kept(saves):
    steps = [int(name[5:]) for name in saves[1]["kept"]["names"]]
    assert steps == [0, 4, 8, 9, 10]


def test_old_checkpoints_that_cannot_be_removed_are_a_warning(saves):
    result = saves[1]["cannot_prune"]
    assert (result["saved_step"], result["metrics"]["failed_saves"]) == (1, 0)
    assert result["reports"] == ["WARNING: cannot remove old checkpoints ([Errno 28] No space left on device)"]


def test_a_failing_job_does_not_wait_long_for_dead_ranks(saves):
    result = saves[1]["leaving"]
    assert "rank 1 did not finish within 0.1 s" in result["reports"][0]
    assert result["names"] == []


@pytest.mark.parametrize("seconds", [0, -1, 1501, float("nan")])
def test_a_timeout_out_of_range_is_an_error(seconds):
    with pytest.raises(ConfigError, match="save_timeout_s"):
        CheckpointConfig(save_timeout_s=seconds)
