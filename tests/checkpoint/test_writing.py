import pytest
from safetensors import SafetensorError

from flowception.checkpoint import writing
from flowception.checkpoint.format import checkpoint_dir, hashes, latest_valid, list_steps, verify
from flowception.errors import CheckpointError


def test_a_missing_writer_is_found_and_nothing_appears(tmp_path):
    folder = writing.begin(tmp_path, 5)
    writing.write_slices(folder, 0, {}, {})
    with pytest.raises(CheckpointError, match="rank 1"):
        writing.commit(tmp_path, 5, 2, {})
    assert list_steps(tmp_path) == []
    assert latest_valid(tmp_path) is None


def test_an_unfinished_folder_is_not_a_checkpoint_and_is_removed_by_the_next(tmp_path, save):
    save(tmp_path, 2)
    left_over = writing.begin(tmp_path, 4)
    writing.write_slices(left_over, 0, {}, {})
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 2)
    save(tmp_path, 6)
    assert not left_over.exists()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path, save):
    first = hashes(save(tmp_path, 3))
    (checkpoint_dir(tmp_path, 3) / "rank_00000.safetensors").write_bytes(b"")
    assert hashes(save(tmp_path, 3)) == first
    verify(checkpoint_dir(tmp_path, 3))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (2, None, [0, 8, 10]),
        (None, None, [0, 2, 4, 6, 8, 10]),
        (2, 4, [0, 4, 8, 10]),
        (9, None, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_prune_keeps_the_newest_and_step_0(tmp_path, save, keep_last, keep_every, left):
    for step in range(0, 12, 2):
        save(tmp_path, step, writers=1)
    removed = writing.prune(tmp_path, 10, keep_last, keep_every)
    assert list_steps(tmp_path) == left
    assert sorted(removed + left) == [0, 2, 4, 6, 8, 10]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_damaged_checkpoints_after_the_resumed_step_are_set_aside_and_never_counted(tmp_path, save):
    for step in (0, 3, 4, 6, 8):
        save(tmp_path, step, writers=1)
    for step in (6, 8):
        (checkpoint_dir(tmp_path, step) / "manifest.json").unlink()
    save(tmp_path, 5, writers=1)
    writing.prune(tmp_path, 5, keep_last=2)
    assert list_steps(tmp_path) == [0, 4, 5, 6, 8], "only steps up to the one just saved count"
    (checkpoint_dir(tmp_path, 8).with_suffix(".damaged")).mkdir()
    moved = writing.set_aside(tmp_path, newer_than=5)
    assert [path.name for path in moved] == ["step_00000006.damaged", "step_00000008.damaged2"]
    assert list_steps(tmp_path) == [0, 4, 5]
    assert (moved[0] / "rank_00000.safetensors").is_file()
    save(tmp_path, 6, writers=1)
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 6)


def test_no_pickle_in_a_checkpoint(tmp_path, save):
    names = sorted(path.name for path in save(tmp_path, 1, writers=2).iterdir())
    assert names == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]


def test_a_disk_that_fills_up_is_an_error_of_ours(tmp_path, monkeypatch):
    """safetensors reports it as an error of its own, which is no OSError."""

    def save_file(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(writing, "save_file", save_file)
    with pytest.raises(CheckpointError, match="cannot be written: I/O error: No space left"):
        writing.write_slices(writing.begin(tmp_path, 1), 0, {}, {})
