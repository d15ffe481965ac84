"""The loss of one step, without processes or DeepSpeed: the engine only records the losses passed to backward."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from flowception.data.loader import PackLoader
from flowception.flow.loss import insertion_loss_sum, velocity_loss_sum
from flowception.training.config import load_config
from flowception.training.data import open_data
from flowception.training.distributed.collectives import Ranks
from flowception.training.step import run_micro_steps
from tests.training.workers.toy_set import write_config, write_set

INSERTION_LOSS_WEIGHT = 0.3


class NotingEngine:
    """A network with one number. Like DeepSpeed's engine, it divides a loss by the number of micro-steps and sums
    gradients."""

    def __init__(self, micro_steps):
        self.micro_steps, self.gradient = micro_steps, 0.0
        self.number = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def __call__(self, pack):
        return SimpleNamespace(velocity=self.number * pack.noisy, log_rate=self.number * (1 + pack.time))

    def zero_optimization_stage(self):
        return 0

    def backward(self, loss):
        self.gradient += torch.autograd.grad(loss / self.micro_steps, self.number)[0].item()

    def step(self):
        pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    path = write_config(
        folder / "config.yaml", folder / "run", write_set(folder / "shards"), insertion_share=0.8, packs_per_step=3
    )
    return open_data(load_config([path]))


def first_batch(data, rank, world_size):
    return next(iter(PackLoader(data.plan, data.reader, rank, world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loss_does_not_depend_on_the_number_of_ranks(data, world_size):
    """The mean gradient over ranks equals that of the weighted sums over the plan's denominators."""
    gradients, sums = [], torch.zeros(2)
    for rank in range(world_size):
        batch = first_batch(data, rank, world_size)
        engine = NotingEngine(len(batch.packs))
        ranks = Ranks(rank=rank, local_rank=rank, world_size=world_size, device=torch.device("cpu"))
        phases = []

        def phase(name, phases=phases):
            phases.append(name)
            return nullcontext()

        result = run_micro_steps(engine, batch, ranks, INSERTION_LOSS_WEIGHT, phase)
        assert phases == [*["forward", "backward"] * len(batch.packs), "backward"]
        assert result.not_finite == []
        gradients.append(engine.gradient)
        sums += torch.tensor([result.velocity_sum, result.insertion_sum])

    whole, network = first_batch(data, 0, 1), NotingEngine(1)
    assert sum(pack.velocity_mask.any().item() for pack in whole.packs) == 3
    velocity = insertion = 0.0
    for pack in whole.packs:
        output = network(pack)
        velocity += velocity_loss_sum(output.velocity, pack.velocity_target, pack.velocity_mask, pack.weight_token)
        insertion += insertion_loss_sum(output.log_rate, pack.missing, pack.insertion_mask, pack.weight_frame)
    plan = whole.step_plan
    network.backward(
        velocity / plan.velocity_denominator + INSERTION_LOSS_WEIGHT * insertion / plan.insertion_denominator
    )
    assert sum(gradients) / world_size == pytest.approx(network.gradient, rel=1e-5)
    assert sums.tolist() == pytest.approx([velocity.item(), insertion.item()], rel=1e-5)
