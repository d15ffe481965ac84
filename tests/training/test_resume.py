import shutil

import pytest

from flowception.checkpoint.format import checkpoint_dir, read_manifest
from flowception.checkpoint.reader import hashes, latest_valid, read_full
from tests.distributed_worker import run_distributed

pytestmark = pytest.mark.xdist_group("resumes")

WORKER = "tests.training.workers.small_engine"
NAMES = ("0-fp32", "1-bf16", "2-bf16", "3-fp32", "3-bf16")


@pytest.mark.parametrize("name", NAMES)
def test_resume_equals_uninterrupted_to_the_bit(resumes, name):
    folder, results = resumes
    uninterrupted, resumed = results[name]
    assert resumed["losses"] == uninterrupted["losses"][3:]
    assert resumed["end"] == uninterrupted["end"]
    hash_of = [hashes(checkpoint_dir(folder / f"{name}-{part}", 6)) for part in ("whole", "again")]
    assert hash_of[0] == hash_of[1]
    assert len(set(hash_of[0].values())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_the_weights_and_the_ema(resumes, name):
    folder, results = resumes
    saved = checkpoint_dir(folder / f"{name}-whole", 6)
    for kind, title in (("weight", "weights"), ("ema", "ema")):
        sums = {key: value.double().sum().item() for key, value in read_full(saved, title).items()}
        assert sums == pytest.approx(results[name][0]["sums"][kind], abs=1e-12)
    assert results[name][0]["sums"]["weight"] != results[name][0]["sums"]["ema"]


@pytest.mark.parametrize(("world_size", "stages"), [(1, [0, 3]), (3, [3, 1, 2])])
def test_another_world_size_and_stage_load_the_same_state(resumes, tmp_path, world_size, stages):
    folder, _ = resumes
    source = folder / "3-fp32-whole"
    run_distributed(WORKER, "load_and_save", world_size, source=str(source), folder=str(tmp_path), stages=stages)
    expected = hashes(checkpoint_dir(source, 3))
    for stage in stages:
        saved = checkpoint_dir(tmp_path / f"stage-{stage}", 3)
        assert len(list(saved.glob("*.safetensors"))) == world_size
        assert hashes(saved) == expected


@pytest.mark.long
def test_resumes_on_two_four_one_three_and_two_ranks(resumes, tmp_path):
    """Each part loads what the previous one saved, at all stages; the last continues like an uninterrupted run."""
    folder, results = resumes
    start = source = folder / "3-fp32-whole"
    for world_size, stages in ((4, (0, 1, 2, 3)), (1, (1, 2)), (3, (0, 2, 3)), (2, (1, 0, 2, 3))):
        here = tmp_path / f"ranks-{world_size}"
        run_distributed(WORKER, "load_and_save", world_size, source=str(source), folder=str(here), stages=stages)
        saved = [checkpoint_dir(here / f"stage-{stage}", 3) for stage in stages]
        assert all(hashes(path) == hashes(checkpoint_dir(start, 3)) for path in saved)
        states = [read_manifest(path).state for path in saved]
        assert [(state["world_size"], state["zero_stage"]) for state in states] == [(world_size, s) for s in stages]
        source = here / f"stage-{stages[-1]}"
    resumed = run_distributed(WORKER, "run", 2, stage=3, steps=6, run_dir=str(source), load_step=3, save_steps=[6])[0]
    assert resumed["losses"] == results["3-fp32"][0]["losses"][3:]
    assert hashes(checkpoint_dir(source, 6)) == hashes(checkpoint_dir(start, 6))


def test_a_damaged_checkpoint_is_skipped(resumes, tmp_path, caplog):
    folder, _ = resumes
    shutil.copytree(folder / "3-fp32-whole", tmp_path / "run")
    newest = checkpoint_dir(tmp_path / "run", 6) / "rank_00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert latest_valid(tmp_path / "run") == checkpoint_dir(tmp_path / "run", 3)
    (said,) = caplog.messages
    assert "truncated" in said
    assert "step 6" in said
