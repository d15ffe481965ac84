"""Spreading a step's clips over its packs: longest-processing-time first on FLOPs, under a token capacity.

Attention makes a long clip cost more than its tokens say, so packs are balanced by FLOPs (Graham's LPT rule: at worst
4/3 of the optimum, in practice a fraction of a percent with 20 clips a pack) while tokens only bound what fits.

Shape legend: ``K`` clips offered, ``G`` packs.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

CARRIED = -1


def pack_clips(
    tokens: NDArray[np.int64], flops: NDArray[np.float64], num_packs: int, token_budget: int, num_urgent: int = 0
) -> NDArray[np.int64]:
    """Give each clip a pack.

    Urgent clips, left over by several steps, go first; then from the most FLOPs to the fewest (ties: earlier first).
    Each goes to the pack with the fewest FLOPs so far that has room. Packs are then numbered from the most FLOPs to
    the fewest, so that packs which run at the same time on different ranks cost alike.

    Args:
        tokens: [K] tokens of each clip.
        flops: [K] FLOPs of each clip.
        num_packs: G.
        token_budget: Tokens a pack can hold.
        num_urgent: How many of the clips, at the front, are urgent.

    Returns:
        [K] pack of each clip, or ``CARRIED`` for a clip that fits in none.
    """
    assigned = np.full(len(tokens), CARRIED, dtype=np.int64)
    smallest = int(tokens.min(initial=token_budget))
    heap = [(0.0, pack) for pack in range(num_packs)]
    room = [token_budget] * num_packs
    size, cost = tokens.tolist(), flops.tolist()
    for clip in np.lexsort((-flops, np.arange(len(tokens)) >= num_urgent)).tolist():
        passed_over = []
        while heap:
            load, pack = heapq.heappop(heap)
            if room[pack] >= size[clip]:
                assigned[clip] = pack
                room[pack] -= size[clip]
                heapq.heappush(heap, (load + cost[clip], pack))
                break
            if room[pack] >= smallest:
                passed_over.append((load, pack))
        for entry in passed_over:
            heapq.heappush(heap, entry)
    packed = assigned >= 0
    load_of = np.bincount(assigned[packed], weights=flops[packed], minlength=num_packs)
    renumbered = np.empty(num_packs, dtype=np.int64)
    renumbered[np.argsort(-load_of, kind="stable")] = np.arange(num_packs)
    assigned[packed] = renumbered[assigned[packed]]
    return assigned


def imbalance(load: NDArray[np.float64]) -> float:
    """How much longer the fullest pack takes than the mean: ``max / mean - 1``; 0 for no load."""
    mean = float(load.mean()) if len(load) else 0.0
    return float(load.max()) / mean - 1.0 if mean > 0 else 0.0
