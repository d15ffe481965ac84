"""Diagnostics of a step besides its losses: velocity loss by noise level, and calibration of the insertion rate.

Both are sums over a rank's packs without importance weights. They stay on the device and are read once per step
together with the losses, so they need no extra synchronization or communication.

Shape legend: ``T`` tokens, ``C`` channels, ``F`` frame slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowception.data.pack import Pack
from flowception.flow.loss import rate_from_log
from flowception.packing.layout import ModelOutput

TIME_BINS = 4
"""Equal-width bins of each frame's time on [0, 1]: 0 is noise, 1 is data."""
OBSERVED = 2 * TIME_BINS + 2
"""Length of the vector that ``observe`` returns."""


@torch.no_grad()
def observe(output: ModelOutput, pack: Pack) -> Tensor:
    """Sums over one pack.

    Args:
        output: Output of the model.
        pack: Input of the model.

    Returns:
        float64 [OBSERVED]: squared error of each time bin, elements of each time bin, sum of predicted rates over the
        insertion sites, sum of true missing counts over the same sites.
    """
    error = torch.where(pack.velocity_mask[:, None], output.velocity.float() - pack.velocity_target.float(), 0.0)
    channels = error.shape[1]
    time = pack.time[pack.layout.token_frame]
    bins = (time * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    sums = error.new_zeros(2, TIME_BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, error.square().sum(dim=1).double())
    sums[1].index_add_(0, bins, pack.velocity_mask.double() * channels)
    sites = pack.insertion_mask
    rate = torch.where(sites, rate_from_log(output.log_rate), 0.0).sum(dtype=torch.float64)
    missing = torch.where(sites, pack.missing, 0).sum().double()
    return torch.cat([sums.flatten(), torch.stack([rate, missing])])


def observed_metrics(sums: list[float]) -> dict[str, float]:
    """Metrics of a step from the sums of all ranks.

    Args:
        sums: ``OBSERVED`` numbers, summed over packs and ranks.

    Returns:
        ``loss/velocity/LOW-HIGH``, the mean squared error of the elements in a bin (absent for an empty bin);
        ``rate/predicted`` and ``rate/true``.
    """
    metrics = {}
    for number, (error, elements) in enumerate(zip(sums[:TIME_BINS], sums[TIME_BINS : 2 * TIME_BINS])):
        if elements:
            metrics[f"loss/velocity/{number / TIME_BINS:g}-{(number + 1) / TIME_BINS:g}"] = error / elements
    return metrics | {"rate/predicted": sums[-2], "rate/true": sums[-1]}
