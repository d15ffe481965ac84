"""A step and a validation on a fake ``cuda`` device: packs arrive complete, and the host synchronizes only where
intended."""

from dataclasses import fields, replace
from functools import lru_cache

import pytest
import torch

from flowception.data.loader import PackLoader
from flowception.data.pack import Pack, empty_pack
from flowception.data.shared_memory import SentPacks
from flowception.nn import FlowceptionDiT
from flowception.training.config import load_config
from flowception.training.data import heldout_plan, open_data
from flowception.training.diagnostics import OBSERVED
from flowception.training.distributed.collectives import Ranks
from flowception.training.step import run_micro_steps
from flowception.training.validation import Validation, ValidationConfig
from tests.fake_cuda import DEVICE, FakeCuda, content, gradients
from tests.training.workers.toy_set import write_config, write_set

ROPE = "to device: nn/rope.py:VideoRoPE._constants (_to_copy)"
"""Constants of the rotary positions, once per device."""
STEP = {
    ROPE,
    "to device, non_blocking: packing/layout.py:HoldsTensors.to.<lambda> (_to_copy)",
    "wait: training/step.py:run_micro_steps (_local_scalar_dense)",
}
"""Packs come from pinned memory; all sums of a step are read once, after its last backward pass."""
VALIDATION = {
    "to device: packing/layout.py:HoldsTensors.to.<lambda> (_to_copy)",
    "wait: training/validation.py:Validation._sums (_local_scalar_dense)",
    "to device: training/distributed/collectives.py:all_sum (_to_copy)",
    "wait: training/distributed/collectives.py:all_sum (_local_scalar_dense)",
}
"""The sums of each pack, and the sums of ranks at each time, are read separately: validation is rare."""


class Engine:
    """Stand-in for DeepSpeed's engine; keeps the gradients of every loss."""

    def __init__(self, model: FlowceptionDiT, cuda: FakeCuda | None = None) -> None:
        self.model, self.cuda = model.requires_grad_(), cuda
        self.losses: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.crossings_before_the_end = 0

    def __call__(self, pack):
        return self.model(pack)

    def backward(self, loss):
        self.losses.append(loss)
        if loss.requires_grad:
            find = torch.autograd.grad if self.cuda is None else gradients
            self.gradients += find(loss, list(self.model.parameters()))
        if self.cuda is not None:
            self.crossings_before_the_end = len([c for c in self.cuda.crossings if c.startswith(("wait", "to host"))])

    def zero_optimization_stage(self):
        return 1

    def step(self):
        pass

    def eval(self):
        self.model.eval()

    def train(self):
        self.model.train()


@pytest.fixture(autouse=True)
def _stream_of_its_own(monkeypatch):
    """The copy stream is cached per process; drop it after a test."""
    monkeypatch.setattr("flowception.data.transfer._copy_stream", lru_cache(lambda device: torch.cuda.Stream(device)))


def ranks(device):
    return Ranks(rank=0, local_rank=0, world_size=1, device=torch.device(device))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_cuda")
    config = load_config([write_config(folder / "c.yaml", folder / "run", write_set(folder / "shards"))])
    return config, open_data(config)


@pytest.fixture(scope="module")
def batch(data):
    """A step of one rank: two packs of clips, and one padding pack."""
    _, opened = data
    batch = next(iter(PackLoader(opened.plan, opened.reader, 0, 1)))
    return replace(batch, packs=[*batch.packs[:2], empty_pack(opened.plan)])


@pytest.fixture
def network(data):
    """The network of the run, without zero weights."""
    config, _ = data

    def build():
        model = FlowceptionDiT(config.model).initialize(0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_synchronizes_once_at_its_end_and_matches_the_cpu(network, batch, precision):
    on_cpu = Engine(network())
    expected = run_micro_steps(on_cpu, batch, ranks("cpu"), 0.3)
    with FakeCuda() as cuda:
        engine = Engine(cuda.to_cuda(network().bfloat16() if precision == "bf16" else network()), cuda)
        with torch.enable_grad():
            result = run_micro_steps(engine, batch, ranks(DEVICE), 0.3)
    assert set(cuda.crossings) == STEP
    assert engine.crossings_before_the_end == 0
    assert len([c for c in cuda.crossings if c.startswith("wait")]) == (2 + OBSERVED) * len(batch.packs)
    assert [loss.device for loss in engine.losses] == [DEVICE] * len(batch.packs)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    for ours, plain in zip(engine.losses, on_cpu.losses, strict=True):
        torch.testing.assert_close(content(ours), plain, rtol=tolerance, atol=tolerance)
    for ours, plain in zip(engine.gradients, on_cpu.gradients, strict=True):
        assert ours.device == DEVICE
        assert (content(ours).float() - plain).norm() <= tolerance * plain.norm() + 1e-6
    sums = [[r.velocity_sum, r.insertion_sum, *r.observed] for r in (result, expected)]
    assert sums[0] == pytest.approx(sums[1], rel=tolerance, abs=tolerance)
    assert result.not_finite == []


def test_values_that_are_not_finite_need_no_extra_synchronization(network, batch):
    batch = replace(batch, packs=[batch.packs[0], replace(batch.packs[1], noisy=batch.packs[1].noisy * torch.nan)])
    with FakeCuda() as cuda:
        engine = Engine(cuda.to_cuda(network()), cuda)
        result = run_micro_steps(engine, batch, ranks(DEVICE), 0.3)
    assert result.not_finite == [1]
    assert engine.crossings_before_the_end == 0


def tensors_of(item, path=""):
    """Every tensor of a pack and its layout by the path of its fields."""
    found = {}
    for known in fields(item):
        value = getattr(item, known.name)
        if isinstance(value, torch.Tensor):
            found[path + known.name] = value
        elif known.name == "layout":
            found |= tensors_of(value, "layout.")
    return found


def test_every_tensor_of_a_pack_arrives(batch):
    """As a worker sends it, with text; the keys and the host's copy of lengths do not change."""
    sent = replace(batch.packs[0], text=torch.randn(len(batch.packs[0].layout.text_token), 5))
    (pack,) = SentPacks.of([sent]).packs()
    with FakeCuda() as cuda:
        there = pack.to(DEVICE, non_blocking=True)
    assert isinstance(there, Pack)
    assert {c.split(":")[0] for c in cuda.crossings} == {"to device, non_blocking"}
    before, after = tensors_of(pack), tensors_of(there)
    assert len(cuda.crossings) == len(before) == len(after) > 20
    for name, tensor in before.items():
        assert (after[name].device, after[name].dtype) == (DEVICE, tensor.dtype), name
        assert torch.equal(content(after[name]), tensor), name
    assert (there.keys, there.bad_clips) == (pack.keys, pack.bad_clips)
    assert there.layout.segment_lengths == pack.layout.segment_lengths


def test_validation_matches_the_cpu(data, network, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    config, opened = data
    plan = heldout_plan(config, opened)
    settings = ValidationConfig(num_clips=3, global_times=[0.5])
    expected = Validation(settings, plan, opened.reader, ranks("cpu")).run(Engine(network()))
    with FakeCuda() as cuda:
        engine = Engine(cuda.to_cuda(network()))
        measured = Validation(settings, plan, opened.reader, ranks(DEVICE)).run(engine)
    assert set(cuda.crossings) == VALIDATION | {ROPE}
    assert measured == pytest.approx(expected, rel=1e-5)
