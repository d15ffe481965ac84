import hashlib
import json

import pytest
import torch

from flowception.checkpoint import format as format_module
from flowception.checkpoint import reader as reader_module
from flowception.checkpoint.format import KINDS, checkpoint_dir, list_steps, read_manifest
from flowception.checkpoint.reader import SliceReader, hashes, latest_valid, read_full, verify
from flowception.errors import CheckpointError, CheckpointUnreadableError


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_saved_values_are_read_back(tmp_path, save, expected, writers):
    folder = save(tmp_path, 7, writers)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    for kind, title in (("weight", "weights"), ("ema", "ema")):
        found = read_full(folder, title)
        assert found.keys() == expected(kind).keys()
        for name, value in expected(kind).items():
            assert found[name].shape == value.shape
            assert found[name].equal(value)


def test_a_range_across_files(tmp_path, save, expected):
    folder = save(tmp_path, 1, writers=3)
    assert len(read_manifest(folder).parameters["a.weight"].slices) == 3
    whole = expected("exp_avg")["a.weight"].view(-1)
    reader = SliceReader(folder)
    for start in range(12):
        for stop in range(start, 13):
            assert reader.read("exp_avg", "a.weight", start, stop).equal(whole[start:stop])


def test_hashes_depend_on_the_contents_but_not_on_the_files(tmp_path, save):
    one, three = save(tmp_path / "one", 4, writers=1), save(tmp_path / "three", 4, writers=3)
    assert hashes(one) == hashes(three)
    assert list(hashes(one)) == ["weights", "ema", "optimizer"]
    other_step = hashes(save(tmp_path / "other", 5, writers=1))
    assert other_step["optimizer"] != hashes(one)["optimizer"]
    assert other_step["ema"] == hashes(one)["ema"]


def test_the_hash_is_the_documented_one(tmp_path, save, expected):
    digest = hashlib.sha256()
    for name, shape in (("a.weight", "(3, 4)"), ("b.bias", "(5,)"), ("c.scale", "()")):
        digest.update(f"ema/{name}{shape}".encode() + expected("ema")[name].numpy().tobytes())
    assert hashes(save(tmp_path, 1))["ema"] == digest.hexdigest()


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "rank_00001.safetensors").unlink(), "is missing"),
        (
            lambda f: (f / "rank_00001.safetensors").write_bytes((f / "rank_00001.safetensors").read_bytes()[:-4]),
            "truncated",
        ),
        (lambda f: flip(f / "rank_00000.safetensors", -1), "sha256 of its weight does not match"),
        (lambda f: flip(f / "rank_00000.safetensors", 20), "sha256 of its header does not match"),
        (lambda f: (f / "manifest.json").unlink(), "is not a complete checkpoint"),
        (lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:-9]), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged"),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('_steps": 6', '_steps": 7')
            ),
            "checksum does not match",
        ),
    ],
)
def test_damage_is_found_and_the_previous_checkpoint_is_used(tmp_path, save, damage, reason, caplog):
    save(tmp_path, 3)
    newest = save(tmp_path, 6)
    assert latest_valid(tmp_path) == newest
    damage(newest)
    with pytest.raises(CheckpointError, match=reason):
        verify(newest)
    assert latest_valid(tmp_path) == checkpoint_dir(tmp_path, 3)
    (said,) = caplog.messages
    assert "skipping the checkpoint of step 6" in said


def test_an_unreadable_file_does_not_fall_back_to_an_earlier_checkpoint(tmp_path, save, monkeypatch):
    save(tmp_path, 3)
    newest = save(tmp_path, 6)
    real = reader_module.sha256_bytes

    def sha256_bytes(path, start, stop):
        if path.parent == newest:
            raise OSError(5, "Input/output error")
        return real(path, start, stop)

    monkeypatch.setattr(reader_module, "sha256_bytes", sha256_bytes)
    for look in (lambda: verify(newest), lambda: latest_valid(tmp_path)):
        with pytest.raises(CheckpointUnreadableError, match=r"cannot read .* \(Input/output error\)"):
            look()


def test_a_failed_listing_is_a_checkpoint_error(tmp_path, save, monkeypatch):
    save(tmp_path, 3)

    def iterdir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(format_module.Path, "iterdir", iterdir)
    with pytest.raises(CheckpointError, match="Permission denied"):
        list_steps(tmp_path)


def test_ranks_can_split_verification(tmp_path, save):
    folder = save(tmp_path, 1, writers=3)
    flip(folder / "rank_00002.safetensors", -1)
    verify(folder, part=0, parts=3)
    verify(folder, part=1, parts=3)
    with pytest.raises(CheckpointError):
        verify(folder, part=2, parts=3)


def place_of(path, kind, name="a.weight"):
    """Offset of a tensor's last byte in a file."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    return 8 + size + header[f"{kind}/{name}"]["data_offsets"][1] - 1


@pytest.mark.parametrize("name", ["a.weight", "b.bias", "c.scale"])
@pytest.mark.parametrize("damaged", KINDS)
def test_one_kind_can_be_verified_separately(tmp_path, save, damaged, name):
    """A flipped bit in one kind is found by readers of that kind only."""
    folder = save(tmp_path, 1, writers=1)
    flip(folder / "rank_00000.safetensors", place_of(folder / "rank_00000.safetensors", damaged, name))
    for kind in KINDS:
        if kind == damaged:
            with pytest.raises(CheckpointError, match=f"sha256 of its {kind} does not match"):
                verify(folder, kinds=(kind,))
        else:
            verify(folder, kinds=(kind,))
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(folder)


def test_only_the_verified_kind_is_read(tmp_path, save, monkeypatch):
    folder = save(tmp_path, 1, writers=1)
    read = []
    real = reader_module.sha256_bytes
    monkeypatch.setattr(reader_module, "sha256_bytes", lambda *where: read.append(where[1:]) or real(*where))
    verify(folder, kinds=("ema",))
    size = int.from_bytes((folder / "rank_00000.safetensors").read_bytes()[:8], "little")
    data = 8 + size
    assert read == [(0, data), (data, data + 4 * (12 + 5 + 1))]


def test_hashes_must_cover_the_file(tmp_path, save, edit_manifest):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda content: content["files"][0][2].pop())
    with pytest.raises(CheckpointError, match="do not cover its"):
        read_manifest(folder)


def test_no_checkpoint_and_only_damaged_ones(tmp_path, save):
    assert latest_valid(tmp_path) is None
    assert list_steps(tmp_path) == []
    (save(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("name", ["../../rank_00000.safetensors", "/etc/passwd", "rank_0.pt"])
def test_a_manifest_cannot_list_other_files(tmp_path, save, edit_manifest, name):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda content: content["files"][0].__setitem__(0, name))
    with pytest.raises(CheckpointError, match="must be rank_NNNNN.safetensors"):
        read_manifest(folder)


@pytest.mark.parametrize("slices", [[[0, 0, 3]], [[0, 0, 3], [1, 4, 12]], [[0, 0, 9], [1, 3, 12]], [[0, 0, 13]], []])
def test_slices_must_cover_the_parameter(tmp_path, save, edit_manifest, slices):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda content: content["parameters"]["a.weight"].__setitem__("slices", slices))
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        read_manifest(folder)


def test_a_slice_longer_than_its_tensor_is_refused(tmp_path, save, edit_manifest):
    folder = save(tmp_path, 1, writers=2)
    edit_manifest(folder, lambda content: content["parameters"]["a.weight"].__setitem__("slices", [[0, 0, 12]]))
    with pytest.raises(CheckpointError, match="cannot read weight/a.weight"):
        read_full(folder, "weights")


def test_an_unknown_parameter_means_another_model(tmp_path, save):
    with pytest.raises(CheckpointError, match="another model"):
        SliceReader(save(tmp_path, 1)).read("weight", "d.weight")


@pytest.mark.parametrize("version", [1, 3, 99, "2"])
def test_another_format_is_refused(tmp_path, save, edit_manifest, version):
    folder = save(tmp_path, 1)
    edit_manifest(folder, lambda content: content.__setitem__("format_version", version))
    with pytest.raises(CheckpointUnreadableError, match=f"must have format version 2, got {version!r}; read it with"):
        verify(folder)


def test_reading_needs_no_process_group(tmp_path, save):
    save(tmp_path, 1)
    assert not torch.distributed.is_initialized()
