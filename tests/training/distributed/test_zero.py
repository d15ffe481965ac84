import pytest
import torch

from flowception.errors import ConfigError
from flowception.training.distributed.zero import ZeroConfig, build_engine, deepspeed_config
from flowception.training.optim import build_optimizer
from tests.training.workers import small_engine
from tests.training.workers.small_engine import EMA_DECAY, OPTIM, WIDTH, Small, initialize, micro_batch

pytestmark = pytest.mark.xdist_group("stages")

STAGES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def plain():
    """The same training in plain PyTorch in one process: (losses, norms, model, EMA)."""
    torch.set_num_threads(1)
    model = Small()
    initialize(model)
    optimizer = build_optimizer(model, OPTIM, torch.device("cpu"))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, norms = [], []
    for step in range(11):
        batches = [micro_batch(step, i) for i in range(3)]
        total = sum((model(x, label) - target).square().sum() for x, label, target in batches)
        loss = total / sum(len(x) for x, *_ in batches)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad_norm)))
        losses.append(float(loss.detach()))
        if step == 10:  # skipped by the optimizer
            break
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr / (1 + step)
        optimizer.step()
        for name, p in model.named_parameters():
            ema[name] = EMA_DECAY * ema[name] + (1 - EMA_DECAY) * p.detach()
    return losses, norms, model, ema


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_equal_plain_pytorch(stages, plain, stage):
    losses, norms = zip(*stages[stage]["losses"])
    assert losses == pytest.approx(plain[0][:10], rel=1e-4)
    assert norms == pytest.approx(plain[1][:10], rel=1e-4)
    assert max(norms) > OPTIM.clip_grad_norm, "clipping was never needed"


@pytest.mark.parametrize("stage", STAGES)
def test_ema_equals_plain_pytorch_and_the_swap_is_exact(stages, plain, stage):
    _, _, model, ema = plain
    x, label, _ = micro_batch(99, 0)
    weights, average, weights_again = stages[stage]["end"]
    assert weights == weights_again
    assert weights == pytest.approx(model(x, label).flatten().tolist(), abs=2e-6)
    expected = torch.func.functional_call(model, ema, (x, label))
    assert average == pytest.approx(expected.flatten().tolist(), abs=2e-6)
    assert average != pytest.approx(weights, abs=1e-3)


@pytest.mark.parametrize("stage", [*STAGES, *(f"{stage} bf16" for stage in STAGES)])
def test_initial_weights_are_exact_including_zeros(stages, stage):
    model = Small()
    initialize(model)
    assert not model.last.weight.any()
    expected = model.last.bias.repeat(len(micro_batch(99, 0)[0]))
    bf16 = stage.endswith("bf16")
    for out in stages[stage]["begin"]:
        assert out == pytest.approx(expected.tolist(), abs=4e-3 if bf16 else 1e-7)
    assert not bf16 or out == expected.bfloat16().float().tolist()


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32(stages, stage):
    low = [loss for loss, _ in stages[f"{stage} bf16"]["losses"]]
    full = [loss for loss, _ in stages[stage]["losses"]]
    assert low == pytest.approx(full, rel=0.05)
    assert low != full


@pytest.mark.parametrize("stage", [*STAGES, *(f"{stage} bf16" for stage in STAGES)])
@pytest.mark.parametrize("why", ["poisoned", "refused"])
def test_a_skipped_step_changes_nothing(stages, stage, why):
    """One whose gradient is not finite, on rank 1 only, and one that the caller skips."""
    step = stages[stage][why]
    assert not step["applied"]
    assert step["unchanged"], "masters, moments or EMA moved"
    assert step["end"] == stages[stage]["end"]
    assert step["optimizer_steps"] == stages[stage]["optimizer_steps"] == 10
    assert (step["refused"] == "the gradient is not finite") == (why == "poisoned")


@pytest.mark.parametrize("stage", STAGES)
def test_the_norm_of_a_skipped_step_is_that_of_its_gradient(stages, plain, stage):
    _, _, model, _ = plain
    x, label, _ = micro_batch(0, 0)
    gradients = torch.autograd.grad(model(x, label).sum(), list(model.parameters()))
    norm = float(torch.nn.utils.get_total_norm(gradients))
    assert float(stages[stage]["refused"]["refused"].split()[0]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_gradient_does_not_leak_into_the_next_step(stages, plain, stage):
    assert stages[stage]["after"] == pytest.approx((plain[0][10], plain[1][10]), rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_model_is_built_on_the_device_of_the_run(monkeypatch, stage):
    """The meta device replaces a GPU. Stage 3 partitions weights as they are created, on DeepSpeed's own device."""
    import deepspeed

    meta = torch.device("meta")
    monkeypatch.setattr(deepspeed, "initialize", lambda model, optimizer, config: (model, optimizer))
    config = deepspeed_config(ZeroConfig(stage=stage), "fp32", 1, None, meta)
    model = build_engine(Small, lambda model: build_optimizer(model, OPTIM, meta), config, meta)
    assert {parameter.device for parameter in model.parameters()} == {meta}


def test_config_out_of_range_is_an_error():
    for wrong in ({"stage": 4}, {"param_persistence_threshold": -1}, {"bucket_elements": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ZeroConfig(**wrong)


def test_shards_split_parameters_of_the_small_model():
    """Shards must not end at parameter boundaries, or the tests above prove less."""
    sizes = [p.numel() for p in Small().parameters()]
    assert any(size % 2 for size in sizes)
    assert any(size < 30 for size in sizes), "none would stay gathered"
    assert small_engine.WIDTH == WIDTH
