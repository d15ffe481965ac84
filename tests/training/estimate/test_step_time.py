import pytest

from flowception.training.estimate.communication import TrafficPerStep
from flowception.training.estimate.step_time import Cluster, StepTime, bytes_between_nodes, communication_s, compute_s


def test_recomputation_adds_a_forward_pass():
    forward, backward = 1e12, 2e12
    assert compute_s(forward + backward, 1.0, 0.0) == 3.0
    assert compute_s(forward + backward, 1.0, 1.0) == 4.0
    assert compute_s(forward + backward, 2.0, 0.5) == 1.75


def test_step_time_is_the_maximum_or_the_sum_of_its_parts():
    assert (StepTime(3.0, 1.0).overlapped_s, StepTime(3.0, 1.0).sequential_s) == (3.0, 4.0)
    assert StepTime(1.0, 5.0).overlapped_s == 5.0
    waits = StepTime(3.0, 1.0, host_s=0.5, update_s=0.25)
    assert (waits.overlapped_s, waits.sequential_s) == (3.75, 4.75)


def ring(world_size, gpus_per_node, pieces=1):
    """Bytes of an all-gather that leave the first node, counted hop by hop.

    One ring for each GPU of a node, each with its share of the tensor; ring r leaves a node by its GPU r.
    """
    leaving = [0.0] * gpus_per_node
    for number in range(gpus_per_node):
        order = [
            node * gpus_per_node + (number + 1 + k) % gpus_per_node
            for node in range(world_size // gpus_per_node)
            for k in range(gpus_per_node)
        ]
        for here, there in zip(order, [*order[1:], order[0]]):
            if here < gpus_per_node <= there:
                assert here % gpus_per_node == number
                # every rank forwards all parts except the one that its neighbor started with
                leaving[number] += pieces * (world_size - 1) / world_size / gpus_per_node
    return leaving


@pytest.mark.parametrize("world_size", [8, 16, 64])
def test_traffic_per_gpu_is_what_its_ring_sends_out_of_the_node(world_size):
    sent = (world_size - 1) / world_size
    traffic = TrafficPerStep(gathered=sent, gathered_in_group=7.0, reduced=2 * sent)
    crossing = bytes_between_nodes(traffic, world_size=world_size, gpus_per_node=8, group_size=8)
    assert crossing == pytest.approx(ring(world_size, 8, pieces=3)[0])
    assert (crossing == 0) == (world_size == 8)


def test_only_groups_larger_than_a_node_cross_nodes():
    traffic = TrafficPerStep(gathered=8.0, gathered_in_group=16.0, reduced=0.0)
    assert bytes_between_nodes(traffic, world_size=64, gpus_per_node=8, group_size=8) == 1.0
    assert bytes_between_nodes(traffic, world_size=64, gpus_per_node=8, group_size=16) == 3.0


def cluster(between, inside):
    return Cluster(
        peak_tflops=1.0, hfu=0.5, gpus_per_node=8, between_nodes_gb_per_s=between, inside_node_gb_per_s=inside,
        stage_3_block_ms=0.0, memory_gb_per_s=1.0,
    )  # fmt: skip


def test_the_slower_links_limit_a_ring():
    """800 GB per rank: on one node all of it stays inside; over several nodes 700 GB stay inside and 100 GB cross."""
    traffic = TrafficPerStep(gathered=500e9, gathered_in_group=0.0, reduced=300e9)

    def seconds(world_size, between, inside):
        return communication_s(traffic, cluster(between, inside), world_size=world_size, group_size=None)

    assert seconds(8, 25.0, 200.0) == 4.0
    assert seconds(64, 25.0, 350.0) == 4.0
    assert seconds(64, 100.0, 70.0) == 10.0


def test_a_group_within_a_node_uses_inside_links_and_a_larger_one_both():
    traffic = TrafficPerStep(gathered=0.0, gathered_in_group=800e9, reduced=0.0)
    in_node, across = (
        communication_s(traffic, cluster(25.0, 400.0), world_size=64, group_size=group) for group in (8, 16)
    )
    assert (in_node, across) == (2.0, 4.0)
