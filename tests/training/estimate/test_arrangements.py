"""The ranking of arrangements, against manually computed cases."""

from dataclasses import replace

import pytest

from flowception.packing.flops import ModelSpec
from flowception.training.distributed.zero import ZeroConfig
from flowception.training.estimate.arrangements import (
    USABLE_SHARE,
    Job,
    answer,
    arrange,
    rank_arrangements,
    ways_to_shard,
)
from flowception.training.estimate.memory import INPUT_BYTES, KEPT_BYTES
from flowception.training.estimate.step_time import Cluster
from flowception.training.hardware import GIB

BILLION = 10**9
LAYERS, TOKENS, WIDTH = 10, 10_000, 1000
SPEC = ModelSpec(hidden_size=WIDTH, num_layers=LAYERS, num_heads=10, in_channels=8, mlp_hidden_size=2656)
JOB = Job(
    parameters=BILLION,
    spec=SPEC,
    token_budget=TOKENS,
    precision="bf16",
    compiled="off",
    packs_per_step=16,
    step_flops=4.8e15,
)
ZERO = ZeroConfig(stage=3, bucket_elements=1, max_live_elements=1)
CLUSTER = Cluster(
    peak_tflops=1000.0,
    hfu=0.5,
    gpus_per_node=8,
    between_nodes_gb_per_s=25.0,
    inside_node_gb_per_s=200.0,
    stage_3_block_ms=0.0,
    memory_gb_per_s=1000.0,
)
SLOW_HOST = replace(CLUSTER, stage_3_block_ms=2.0)
PLENTY = 1e15


def stages(world_size, memory_bytes=PLENTY, cluster=CLUSTER, job=JOB):
    """Stages in ranked order, groups as text."""
    ranked = rank_arrangements(job, cluster, ZERO, world_size, memory_bytes)
    return [str(found).removeprefix("ZeRO-") for found in ranked]


def time_of(stage, world_size, checkpointed=0, cluster=CLUSTER):
    return arrange(JOB, cluster, replace(ZERO, stage=stage), world_size, checkpointed).time


def test_a_step_on_one_node():
    """8 ranks, 2 packs each: 4.8e15 / 8 FLOPs at 500 TFLOP/s; a ring sends 3.5 GB for 4 GB of gradients."""
    one, two, three = (time_of(stage, 8) for stage in (1, 2, 3))
    assert one.compute_s == two.compute_s == three.compute_s == pytest.approx(1.2)
    assert one.communication_s == pytest.approx((2 * 3.5 + 3.5) / 200)  # one all-reduce, fp32 weights
    assert two.communication_s == pytest.approx((2 * 2 * 3.5 + 1.75) / 200)  # all-reduce for both packs, bf16 weights
    assert three.communication_s == pytest.approx((2 * 3.5 + 4 * 1.75) / 200)  # gathered forward and backward
    assert time_of(0, 8).update_s == pytest.approx(48 / 1000)
    assert one.update_s == two.update_s == three.update_s == pytest.approx(48 / 8 / 1000)
    assert stages(8) == ["1", "3", "0", "2"]  # 1.2585, 1.276, 1.283 and 1.28475 s


def test_host_time_counts_only_at_stage_3():
    assert [time_of(stage, 8, cluster=SLOW_HOST).host_s for stage in range(3)] == [0, 0, 0]
    assert time_of(3, 8, cluster=SLOW_HOST).host_s == pytest.approx(2 * 10 * 2e-3)
    assert stages(8, cluster=SLOW_HOST) == ["1", "0", "2", "3"]


def test_a_recomputed_block_costs_a_third_of_its_time():
    assert time_of(3, 8, checkpointed=5).compute_s == pytest.approx(1.2 * (1 + 5 / 10 / 3))


def test_a_step_on_several_nodes():
    """16 ranks, one pack each: an eighth of what is sent crosses nodes, at 25 GB/s, as slow as 200 inside."""
    share = 15 / 16
    assert time_of(1, 16).communication_s == pytest.approx((8 + 4) * share / 200)
    assert time_of(2, 16).communication_s == pytest.approx((8 + 2) * share / 200)
    assert time_of(3, 16).communication_s == pytest.approx((4 + 4) * share / 200)
    groups = arrange(JOB, CLUSTER, replace(ZERO, hierarchical_partition_size=8), 16, 0)
    assert groups.time.communication_s == pytest.approx((4 + 2) * share / 200 + 2 * 7 / 8 / 200)
    assert groups.between_nodes == pytest.approx((4 + 2) * 1e9 * share / 8)
    assert stages(16) == ["3 in groups of 8", "3", "2", "1", "0"]


def test_ways_to_shard():
    def groups(world_size, gpus_per_node, **zero):
        found = list(ways_to_shard(ZeroConfig(**zero), world_size, gpus_per_node))
        assert [way.stage for way in found[:4]] == [0, 1, 2, 3]
        return [way.hierarchical_partition_size for way in found[4:]]

    assert groups(16, 8) == [8]
    assert groups(16, 8, hierarchical_partition_size=4) == [4]
    assert groups(8, 8) == groups(12, 8) == groups(4, 1) == []


def test_as_many_blocks_are_kept_as_fit():
    """ZeRO-2 on 8 ranks: 2 GB of weights, 0.5 each of masters, gradients and EMA, 1 of moments; then the blocks."""
    kept, block_input = (1e7 * table for table in (KEPT_BYTES["off"]["bf16"], INPUT_BYTES["bf16"]))
    way, state = replace(ZERO, stage=2), 4.5e9 + 2 * 4

    def fewest(room):
        return JOB.fewest_checkpointed(way, 8, room / USABLE_SHARE)

    assert fewest(state + 10 * kept + 1) == 0
    assert fewest(state + 10 * kept - 1) == 1
    assert fewest(state + 6 * kept + 4 * block_input + 1) == 4
    assert fewest(state + 6 * kept + 4 * block_input - 1) == 5
    assert fewest(state + kept + 9 * block_input + 1) == 9  # the block being recomputed is stored anyway
    assert fewest(state + kept + 9 * block_input - 1) is None


def test_shardings_that_do_not_fit_are_not_ranked():
    def needed(stage, checkpointed):
        return JOB.memory(replace(ZERO, stage=stage), 8, checkpointed).total / USABLE_SHARE

    assert stages(8, needed(1, 10) - 1) == ["3", "2"]
    assert stages(8, needed(2, 10) - 1) == ["3"]
    assert stages(8, needed(3, 10) - 1) == []
    recomputes = rank_arrangements(JOB, CLUSTER, ZERO, 8, needed(1, 7) + 1)
    assert [(str(found), found.checkpointed_blocks) for found in recomputes][-1] == ("ZeRO-1", 7)


def test_summary_sentences():
    def said(memory_gb, checkpointed=0, stage=3):
        zero = replace(ZERO, stage=stage)
        ranked = rank_arrangements(JOB, CLUSTER, zero, 8, memory_gb * GIB)
        return answer(ranked, arrange(JOB, CLUSTER, zero, 8, checkpointed), LAYERS, 8, memory_gb)

    gib = JOB.memory(replace(ZERO, stage=1), 8, 0).total / GIB
    fastest = f"fastest on 8 GPUs of 80 GB: ZeRO-1, all 10 blocks kept ({gib:.1f} GiB, 1.26 s per step)"
    assert said(80) == f"{fastest}; as configured, ZeRO-3, all 10 blocks kept: 1.28 s"
    assert said(80, stage=1) == f"{fastest}, as configured"
    assert said(80, 4, stage=1) == f"{fastest}; as configured, ZeRO-1, 6 of 10 blocks kept: 1.42 s"
    small = said(6)
    assert small.startswith("fastest on 8 GPUs of 6 GB: ZeRO-3, 3 of 10 blocks kept")
    assert small.endswith("as configured, ZeRO-3, all 10 blocks kept, the run needs 10.2 GiB and does not fit")
    assert said(1, 10).startswith(
        "nothing fits 8 GPUs of 1 GB: as configured, ZeRO-3, none of 10 blocks kept, the run needs"
    )
