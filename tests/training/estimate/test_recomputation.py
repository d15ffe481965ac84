"""Automatic recomputation keeps as many blocks as the smallest device allows, and all ranks decide alike."""

import socket

import pytest
import torch

from flowception.errors import ConfigError
from flowception.nn import count_parameters
from flowception.progress import show_log
from flowception.training.config import load_config
from flowception.training.distributed.collectives import Ranks
from flowception.training.estimate import recomputation
from flowception.training.estimate.arrangements import USABLE_SHARE, Job
from flowception.training.estimate.recomputation import settle_recomputation
from flowception.training.hardware import GIB
from tests.training.workers.toy_set import write_config

MAIN, OTHER = (Ranks(rank, rank, 2, torch.device("cpu")) for rank in (0, 1))


@pytest.fixture
def make_config(tmp_path):
    path = write_config(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "nowhere", token_budget=10_000)
    return lambda *words: load_config([path], ["model.num_layers=6", "model.activation_checkpointing=auto", *words])


def room_for(config, checkpointed):
    """GiB of a device that just fits this many checkpointed blocks."""
    job = Job.of(config, count_parameters(config.model))
    return job.memory(config.zero, 2, checkpointed).total / USABLE_SHARE / GIB * (1 + 1e-9)


@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_as_many_blocks_are_kept_as_fit(make_config, console, blocks):
    memory_gib = room_for(make_config(), blocks)
    for ranks in (OTHER, MAIN):
        show_log(ranks.rank)
        config = make_config(f"memory_gib={memory_gib!r}")
        settle_recomputation(config, ranks)
        assert config.model.activation_checkpointing == config.model.checkpointed_blocks() == blocks
    (line,) = console.readouterr().out.splitlines()  # from rank 0
    assert line.startswith(f"activation_checkpointing auto: {blocks} of 6 blocks are recomputed, {6 - blocks} kept")
    assert line.endswith(f"{memory_gib * USABLE_SHARE:.2f} GiB is within 90% of {memory_gib:.2f} GiB (memory_gib)")


def test_if_nothing_fits_all_blocks_are_recomputed_with_a_warning(make_config, console):
    config = make_config(f"memory_gib={room_for(make_config(), 6) * 0.99}")
    settle_recomputation(config, MAIN)
    assert config.model.checkpointed_blocks() == 6
    assert console.readouterr().out.startswith("WARNING: activation_checkpointing auto: all 6 blocks are recomputed")


def test_a_number_is_not_changed(make_config, console):
    config = make_config("model.activation_checkpointing=1", "memory_gib=1e-9")
    settle_recomputation(config, MAIN)
    assert config.model.activation_checkpointing == 1
    assert console.readouterr().out == ""


def test_the_smallest_share_of_a_machine_decides(make_config, monkeypatch, console):
    """Two machines of equal memory, one with three ranks, which get a third of it each."""
    third_gib = room_for(make_config(), 2)
    own = []

    def gather(value):
        own.append(value)
        return [(host, 3 * third_gib * GIB) for host in ("a", "b", "a", "a")]

    monkeypatch.setattr(recomputation, "gather_values", gather)
    config = make_config()
    settle_recomputation(config, MAIN)
    assert config.model.checkpointed_blocks() == 2
    assert f"{third_gib:.2f} GiB (the smallest rank's share of a node)" in console.readouterr().out
    ((host, memory_bytes),) = own
    assert host == socket.gethostname()
    assert GIB / 4 < memory_bytes < 2**50


def test_the_smallest_gpu_decides(make_config, monkeypatch, console):
    gib = room_for(make_config(), 3)
    properties = type("Properties", (), {"total_memory": 7})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(recomputation, "gather_values", lambda value: [value, ("a", gib * GIB), ("a", gib * GIB)][1:])
    config = make_config()
    settle_recomputation(config, Ranks(0, 0, 2, torch.device("cuda:0")))
    assert config.model.checkpointed_blocks() == 3
    assert "(the smallest GPU)" in console.readouterr().out


@pytest.mark.parametrize("memory_gib", [0, -1, "inf"])
def test_memory_out_of_range_is_an_error(make_config, memory_gib):
    with pytest.raises(
        ConfigError,
        match=f"memory_gib must be a number > 0, or null for the memory of the devices, got {float(memory_gib)}",
    ):
        make_config(f"memory_gib={memory_gib}")
