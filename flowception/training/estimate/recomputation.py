"""Number of blocks to recompute in the backward pass if ``model.activation_checkpointing`` is ``auto``.

It is the smallest number that fits the memory of a device according to the dry run's estimate (``memory``), with a
margin (``arrangements.USABLE_SHARE``). The smallest device of all ranks decides, because all ranks must recompute the
same blocks; otherwise they would gather weights at different times.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace

import torch

from flowception.nn.build import count_parameters
from flowception.nn.presets import AUTO
from flowception.training.config import TrainConfig
from flowception.training.distributed.collectives import Ranks, gather_values
from flowception.training.estimate.arrangements import USABLE_SHARE, Job
from flowception.training.hardware import GIB

logger = logging.getLogger(__name__)


def settle_recomputation(config: TrainConfig, ranks: Ranks) -> None:
    """Replace ``auto`` with a number, the same on all ranks, and log it. Collective.

    If the estimate does not fit even with every block recomputed, this only warns, because it is an estimate.

    Args:
        config: The run, with ``model.in_channels`` set; ``model.activation_checkpointing`` is replaced.
        ranks: This rank.
    """
    if config.model.activation_checkpointing != AUTO:
        return
    memory_bytes, source = _device_memory(config, ranks)
    job = Job.of(config, count_parameters(config.model))
    layers = job.spec.num_layers
    fewest = job.fewest_checkpointed(config.zero, ranks.world_size, memory_bytes)
    blocks = layers if fewest is None else fewest
    config.model = replace(config.model, activation_checkpointing=blocks)
    estimate = job.memory(config.zero, ranks.world_size, blocks).total
    limit = f"{USABLE_SHARE:.0%} of {memory_bytes / GIB:.2f} GiB ({source})"
    if fewest is None:
        logger.warning(
            "activation_checkpointing auto: all %d blocks are recomputed, and the estimate of %.2f GiB is still above "
            "%s; if memory runs out, see configs/overlays/low_memory.yaml",
            layers,
            estimate / GIB,
            limit,
        )
    else:
        logger.info(
            "activation_checkpointing auto: %d of %d blocks are recomputed, %d kept: the most for which the estimate "
            "of %.2f GiB is within %s",
            blocks,
            layers,
            layers - blocks,
            estimate / GIB,
            limit,
        )


def _device_memory(config: TrainConfig, ranks: Ranks) -> tuple[float, str]:
    """Memory in bytes of the smallest device of all ranks, and the source of the figure. Collective."""
    if config.memory_gib is not None:
        return config.memory_gib * GIB, "memory_gib"
    if ranks.device.type == "cuda":
        own, what = torch.cuda.get_device_properties(ranks.device).total_memory, "GPU"
    else:
        own, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "rank's share of a node"
    places = gather_values((socket.gethostname(), float(own)))
    hosts = [host for host, _ in places]
    shares = [memory if ranks.device.type == "cuda" else memory / hosts.count(host) for host, memory in places]
    return min(shares), f"the smallest {what}"
