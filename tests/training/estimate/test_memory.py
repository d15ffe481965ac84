from functools import partial

import pytest
import torch

from flowception.nn import FlowceptionDiT
from flowception.nn.dit import compiled_block
from flowception.nn.fused_ops import compiled_ops
from flowception.nn.presets import COMPILE, DiTConfig
from flowception.packing.layout import ClipShape, PackInput, build_layout
from flowception.training.estimate.communication import traffic_per_step
from flowception.training.estimate.memory import INPUT_BYTES, KEPT_BYTES, checkpoint_bytes, memory_per_rank
from tests.distributed_worker import run_distributed
from tests.tracing import TRACED

WORKER = "tests.training.workers.memory_worker"
CASES = [f"{stage} {precision}" for stage in range(4) for precision in ("fp32", "bf16")] + ["3 fp32 in groups"]
WORLD_SIZE, MICRO_STEPS = 2, 2


@pytest.fixture
def partitioned(monkeypatch):
    """A compile backend that stores the same tensors for the backward pass as inductor, without compiling kernels."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=TRACED))
    caches = (compiled_ops, compiled_block)
    for cache in caches:
        cache.cache_clear()
    torch._dynamo.reset()
    yield
    for cache in caches:
        cache.cache_clear()
    torch._dynamo.reset()


WIDTH = 192
"""Three heads of 64; the hidden size of SwiGLU is then 8/3 of it, as in the 2b preset."""


def kept_bytes(num_layers, compiled, arithmetic, checkpointed=0):
    """Bytes that autograd stores for the backward pass, without weights, per token and unit of hidden size."""
    sizes = {"in_channels": 8, "hidden_size": WIDTH, "num_layers": num_layers, "num_heads": 3}
    config = DiTConfig(preset=None, compile=compiled, activation_checkpointing=checkpointed, **sizes)
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    model = FlowceptionDiT(config).initialize(0).to(dtype)
    layout = build_layout([ClipShape(8, 8, 8)] * 2)
    tokens, frames = layout.shape.token_budget, layout.shape.max_frames
    pack = PackInput(
        layout=layout,
        noisy=torch.zeros(tokens, 8),
        condition=torch.zeros(tokens, 8),
        time=torch.rand(frames),
        role=torch.zeros(frames, dtype=torch.int64),
        class_label=torch.full((2,), -1),
        text=None,
    )
    weights = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}  # and autocast's copies
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if tuple(sorted(tensor.shape)) not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with keeping, torch.autocast("cpu", dtype=torch.bfloat16, enabled=arithmetic == "autocast"):
        model(pack)
    return sum(size for size, _ in kept.values()) / tokens / WIDTH


@pytest.mark.parametrize("arithmetic", ["bf16", "autocast", "fp32"])
@pytest.mark.parametrize("compiled", COMPILE)
def test_activation_estimate_is_what_autograd_keeps(partitioned, compiled, arithmetic):
    """A checkpointed block stores only its input."""
    one, two = (kept_bytes(blocks, compiled, arithmetic) for blocks in (1, 2))
    precision = "fp32" if arithmetic == "fp32" else "bf16"
    per_block, block_input = KEPT_BYTES[compiled][precision], INPUT_BYTES[precision]
    assert two - one == pytest.approx(per_block, rel=0.03)
    saved = [two - kept_bytes(2, compiled, arithmetic, checkpointed) for checkpointed in (1, 2)]
    assert saved == pytest.approx([per_block - block_input, 2 * (per_block - block_input)], rel=0.03)


def sizes(
    stage, world_size, precision="bf16", parameters=10**9, group_size=None, checkpointed_blocks=38, compiled="off"
):
    spec = DiTConfig(preset="2b").spec()
    return memory_per_rank(
        parameters=parameters,
        world_size=world_size,
        stage=stage,
        spec=spec,
        token_budget=1000,
        precision=precision,
        compiled=compiled,
        checkpointed_blocks=checkpointed_blocks,
        bucket_elements=10**6,
        max_live_elements=10**8,
        group_size=group_size,
    )


def test_each_stage_shards_its_part_of_the_state():
    billion = 10**9
    assert (sizes(0, 8).optimizer, sizes(1, 8).optimizer, sizes(3, 8).optimizer) == (8 * billion, billion, billion)
    assert (sizes(0, 8).ema, sizes(1, 8).ema) == (4 * billion, billion / 2)
    assert (sizes(1, 8).gradients, sizes(2, 8).gradients) == (4 * billion, billion / 2)
    assert sizes(2, 8).weights == 2 * billion + billion / 2  # bf16 copies of all, fp32 masters of an eighth
    assert sizes(3, 8).weights == 6 * billion / 8
    assert sizes(3, 8, "fp32").weights == billion  # an eighth of the weights and of the masters
    assert sizes(3, 16, group_size=8).weights == 6 * billion / 16 + 2 * billion / 8  # and a second copy in the group
    assert sizes(3, 8).working_weights == 2 * 10**8
    totals = [sizes(stage, 8).total for stage in range(4)]
    assert totals == sorted(totals, reverse=True)
    assert sizes(3, 64).total < sizes(3, 8).total


@pytest.mark.parametrize(
    ("stage", "precision", "compiled"), [(0, "fp32", "off"), (0, "bf16", "leaves"), (3, "bf16", "blocks")]
)
def test_activations_fall_with_every_checkpointed_block(stage, precision, compiled):
    activations = [sizes(stage, 8, precision, checkpointed_blocks=n, compiled=compiled).activations for n in range(39)]
    per_block, block_input = (1000 * 1536 * kept[precision] for kept in (KEPT_BYTES[compiled], INPUT_BYTES))
    assert activations[0] == pytest.approx(38 * per_block)
    assert activations[1:38] == pytest.approx([(38 - n) * per_block + n * block_input for n in range(1, 38)])
    assert activations[38] == activations[37]  # the last block is recomputed at once, so nothing is saved
    assert activations == sorted(activations, reverse=True)


@pytest.fixture(scope="module")
def measured():
    """Bytes that two real processes stored, sent and saved, by case."""
    return run_distributed(WORKER, "measure_all", WORLD_SIZE, timeout_s=400, forked=False)


def arguments_of(case):
    stage, precision, *group = case.split()
    return {"stage": int(stage), "precision": precision, "group_size": WORLD_SIZE if group else None}


@pytest.mark.long
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_matches_the_memory_of_an_engine(measured, case):
    for found in (rank[case] for rank in measured):
        estimate = sizes(world_size=WORLD_SIZE, parameters=found["parameters"], **arguments_of(case))
        for part in ("weights", "gradients", "optimizer", "ema"):
            held = found[part] + (found["second_copies"] if part == "weights" else 0)
            assert getattr(estimate, part) == pytest.approx(held, rel=0.1), part


@pytest.mark.long
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("case", CASES)
def test_the_traffic_estimate_matches_the_collectives(measured, case):
    for found in (rank[case] for rank in measured):
        estimate = traffic_per_step(
            parameters=found["parameters"], world_size=WORLD_SIZE, micro_steps=MICRO_STEPS, **arguments_of(case)
        )
        sent = found["sent"]
        assert sent.get("all_gather_into_tensor", 0) == pytest.approx(estimate.gathered, rel=0.01)
        assert sent.get("in_group", 0) == pytest.approx(estimate.gathered_in_group, rel=0.01)
        assert sent.get("all_reduce", 0) + sent.get("reduce_scatter_tensor", 0) == pytest.approx(
            estimate.reduced, rel=0.01
        )


@pytest.mark.long
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_as_large_as_estimated(measured, case):
    found = measured[0][case]
    assert checkpoint_bytes(found["parameters"]) == pytest.approx(found["saved"], rel=0.1)


@pytest.mark.long
@pytest.mark.xdist_group("memory")
def test_groups_do_not_change_the_loss(measured):
    for rank in measured:
        assert rank["3 fp32 in groups"]["losses"] == rank["3 fp32"]["losses"]
        assert rank["3 fp32"]["losses"][1] < rank["3 fp32"]["losses"][0]
