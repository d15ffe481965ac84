"""Distributes a step's clips over its packs: longest first by FLOPs under a token capacity, then exchanges.

Because of attention, the cost of a clip grows faster than its tokens. Packs are therefore balanced by FLOPs, and tokens
only limit what fits. Graham's rule (the longest clip first, to the pack with the least load) leaves nearly full packs a
percent apart, because the last clips go where they fit instead of where load is missing. Exchanging clips between the
most and least loaded packs removes most of this imbalance. Exchanges also merge the free tokens of two packs so that
another clip fits (``benchmarks/planning.py`` has the figures). If there are few large clips and no such exchange, the
step is packed again in another order.

Shape legend: ``K`` candidate clips, ``G`` packs, ``P`` pairs of packs, ``s`` slots of a pack.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from flowception import rng
from flowception.rng import Stream

CARRIED = -1
_FULL = 0.988
"""Room is made for unplaced clips until the packs are filled to this fraction of their tokens."""
_MAX_PLACED = 16
_MAX_ROUNDS = 48
_MAX_PAIRS = 64
_GOOD_IMBALANCE = 2e-3
"""Exchanges stop when no pack exceeds the mean load by more than this fraction."""
_BAD_IMBALANCE = 8e-3
_ATTEMPTS = 8
"""A full step with more than ``_BAD_IMBALANCE`` is packed again in slightly shuffled orders, up to this many times."""
_MAX_GIVERS = 32
_HELPS = 0.45
"""An exchange is rejected if it misses half the gap by more than this fraction of the gap."""


def pack_clips(
    tokens: NDArray[np.int64], flops: NDArray[np.float64], num_packs: int, token_budget: int, num_urgent: int = 0
) -> NDArray[np.int64]:
    """Assign each clip to a pack.

    Urgent clips, carried over for several steps, go first, then clips by decreasing FLOPs (ties: earlier first). Each
    goes to the least loaded pack with room for it. Then packs exchange clips. Packs are numbered by decreasing FLOPs,
    so that packs processed at the same time on different ranks have similar cost.

    Args:
        tokens: [K] tokens of each clip.
        flops: [K] FLOPs of each clip.
        num_packs: G.
        token_budget: Token capacity of a pack.
        num_urgent: Number of urgent clips; they come first in the arrays.

    Returns:
        [K] pack of each clip, or ``CARRIED`` for a clip that does not fit.
    """
    best = _pack_once(tokens, flops, flops, num_packs, token_budget, num_urgent)
    enough = 0.98 * num_packs * token_budget
    for attempt in range(_ATTEMPTS if tokens[best >= 0].sum() >= enough else 0):
        if imbalance(_load(flops, best, num_packs)) <= _BAD_IMBALANCE:
            break
        jitter = rng.uniforms(0, Stream.ORDER, clip=np.arange(len(tokens)), frame=attempt)[:, 0]
        other = _pack_once(tokens, flops, flops * (0.9 + 0.2 * jitter), num_packs, token_budget, num_urgent)
        better = imbalance(_load(flops, other, num_packs)) < imbalance(_load(flops, best, num_packs))
        best = other if better and tokens[other >= 0].sum() >= enough else best
    packed = np.flatnonzero(best >= 0)
    renumbered = np.empty(num_packs, dtype=np.int64)
    renumbered[np.argsort(-_load(flops, best, num_packs), kind="stable")] = np.arange(num_packs)
    best[packed] = renumbered[best[packed]]
    return best


def _load(flops: NDArray[np.float64], assigned: NDArray[np.int64], num_packs: int) -> NDArray[np.float64]:
    """FLOPs of each pack, [G]."""
    packed = assigned >= 0
    return np.bincount(assigned[packed], weights=flops[packed], minlength=num_packs).astype(np.float64)


def _pack_once(
    tokens: NDArray[np.int64],
    flops: NDArray[np.float64],
    precedence: NDArray[np.float64],
    num_packs: int,
    token_budget: int,
    num_urgent: int,
) -> NDArray[np.int64]:
    """Packs after all exchanges, [K]; clips are placed urgent first, then by precedence."""
    order = np.lexsort((-precedence, np.arange(len(tokens)) >= num_urgent))
    assigned = _longest_first(tokens, flops, order, num_packs, token_budget)
    _make_room(tokens, assigned, num_packs, token_budget)
    packed = np.flatnonzero(assigned >= 0)
    if num_packs > 1 and len(packed):
        assigned[packed] = _exchange(tokens[packed], flops[packed], assigned[packed], num_packs, token_budget)
    return assigned


def _longest_first(
    tokens: NDArray[np.int64],
    flops: NDArray[np.float64],
    order: NDArray[np.int64],
    num_packs: int,
    token_budget: int,
) -> NDArray[np.int64]:
    """Place clips in order, each into the least loaded pack with room; [K] packs or ``CARRIED``.

    Packs too full for a clip are set aside, sorted by room, until a clip fits.
    """
    assigned, load, free = np.full(len(tokens), CARRIED), np.zeros(num_packs), np.full(num_packs, token_budget)
    done = _deal_rounds(tokens, flops, order, assigned, load, free)
    packs, room, sizes, costs = assigned.tolist(), free.tolist(), tokens.tolist(), flops.tolist()
    smallest = int(tokens.min(initial=token_budget))
    by_load = [(pack_load, pack) for pack, pack_load in enumerate(load.tolist())]
    heapq.heapify(by_load)
    too_full: list[tuple[int, float, int]] = []
    for clip in order[done:].tolist():
        size = sizes[clip]
        while too_full and -too_full[0][0] >= size:
            _, pack_load, pack = heapq.heappop(too_full)
            heapq.heappush(by_load, (pack_load, pack))
        while by_load:
            pack_load, pack = by_load[0]
            if room[pack] >= size:
                packs[clip] = pack
                room[pack] -= size
                heapq.heapreplace(by_load, (pack_load + costs[clip], pack))
                break
            heapq.heappop(by_load)
            if room[pack] >= smallest:
                heapq.heappush(too_full, (-room[pack], pack_load, pack))
    return np.array(packs, dtype=np.int64)


def _deal_rounds(
    tokens: NDArray[np.int64],
    flops: NDArray[np.float64],
    order: NDArray[np.int64],
    assigned: NDArray[np.int64],
    load: NDArray[np.float64],
    room: NDArray[np.int64],
) -> int:
    """Deal one clip to each pack per round, least loaded first, while this equals longest-first placement.

    It does as long as every pack that gets a clip then has more load than any pack had before the round, and all clips
    fit. Changes ``assigned``, ``load`` and ``room`` in place. Returns the number of clips of ``order`` that were dealt.
    """
    num_packs = len(load)
    for start in range(0, len(order) - num_packs + 1, num_packs):
        clips, packs = order[start : start + num_packs], np.argsort(load, kind="stable")
        after = load[packs] + flops[clips]
        if after.min() <= load[packs[-1]] or np.any(tokens[clips] > room[packs]):
            return start
        assigned[clips], load[packs] = packs, after
        room[packs] -= tokens[clips]
    return len(order) // num_packs * num_packs


def _make_room(tokens: NDArray[np.int64], assigned: NDArray[np.int64], num_packs: int, token_budget: int) -> None:
    """Place unplaced clips, smallest first, until packs are filled to ``_FULL`` of their tokens; in place.

    The clip goes to the pack with the most room. That pack first frees the missing tokens by exchanging one of its
    clips for a shorter clip of a pack that has room for the difference.
    """
    carried = np.flatnonzero(assigned == CARRIED)
    missing = int(_FULL * num_packs * token_budget) - int(tokens[assigned != CARRIED].sum())
    room = token_budget - np.bincount(assigned[assigned >= 0], tokens[assigned >= 0], num_packs).astype(np.int64)
    for clip in carried[np.argsort(tokens[carried], kind="stable")][:_MAX_PLACED].tolist():
        if missing <= 0:
            return
        pack = int(room.argmax())
        givers = np.zeros(num_packs + 1, dtype=bool)
        givers[np.argsort(-room, kind="stable")[:_MAX_GIVERS]] = True
        givers[pack] = False  # and the last is the pack number of carried clips
        members, others = np.flatnonzero(assigned == pack), np.flatnonzero(givers[assigned])
        lacking = tokens[clip] - room[pack]
        given = tokens[members][:, None] - tokens[others]
        given = np.where((given >= lacking) & (given <= room[assigned[others]]), given, 2 * token_budget)
        if not given.size or given.min() > token_budget:
            return
        ours, theirs = np.unravel_index(given.argmin(), given.shape)
        mine, other = members[ours], others[theirs]
        room[pack] += given.min() - tokens[clip]
        room[assigned[other]] -= given.min()
        assigned[mine], assigned[other], assigned[clip] = assigned[other], pack, pack
        missing -= int(tokens[clip])


def _exchange(
    tokens: NDArray[np.int64],
    flops: NDArray[np.float64],
    assigned: NDArray[np.int64],
    num_packs: int,
    token_budget: int,
) -> NDArray[np.int64]:
    """Exchange clips between packs with high and low load until loads are balanced; [K] packs.

    Each round pairs the most loaded pack with the least loaded, the second with the second least, and so on. Each pair
    makes the exchange that brings its loads closest together, of up to two clips for up to two. One for one is too
    coarse: all frames have similar cost, so it moves a multiple of a frame, which may be half a percent of a pack.
    """
    counts = np.bincount(assigned, minlength=num_packs)
    starts = np.cumsum(counts) - counts
    by_pack = np.argsort(assigned, kind="stable")
    nothing = len(tokens)
    members = np.full((num_packs, int(counts.max()) + 2), nothing, dtype=np.int64)
    members[assigned[by_pack], np.arange(len(by_pack)) - np.repeat(starts, counts)] = by_pack
    size, cost = np.append(tokens, 0), np.append(flops, 0.0) / (flops.sum() / num_packs)
    load, room = cost[members].sum(axis=1), token_budget - size[members].sum(axis=1)
    shift = 0
    for _ in range(_MAX_ROUNDS):
        num_pairs = min(int((load > 1.0 + _GOOD_IMBALANCE).sum()), num_packs // 2, _MAX_PAIRS)
        if not num_pairs:
            break
        by_load = np.argsort(load, kind="stable")
        high, low = by_load[::-1][:num_pairs], by_load[(np.arange(num_pairs) + shift) % (num_packs - num_pairs)]
        from_high, from_low, helps = _best_exchange(
            cost[members[high]], cost[members[low]], size[members[high]], size[members[low]],
            load[high] - load[low], room[high], room[low],
        )  # fmt: skip
        shift = 0 if helps[0] else shift + num_pairs
        rows_high, rows_low = high[helps, None], low[helps, None]
        out, back = members[rows_high, from_high[helps]], members[rows_low, from_low[helps]]
        members[rows_high, from_high[helps]], members[rows_low, from_low[helps]] = back, out
        moved = (cost[out] - cost[back]).sum(axis=1)
        load[high[helps]] -= moved
        load[low[helps]] += moved
        grown = (size[out] - size[back]).sum(axis=1)
        room[high[helps]] += grown
        room[low[helps]] -= grown
    result = np.empty(nothing + 1, dtype=np.int64)
    result[members] = np.arange(num_packs)[:, None]
    return result[:-1]


def _best_exchange(
    cost_high: NDArray[np.float64],
    cost_low: NDArray[np.float64],
    size_high: NDArray[np.int64],
    size_low: NDArray[np.int64],
    gap: NDArray[np.float64],
    room_high: NDArray[np.int64],
    room_low: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Find the best exchange of each pair of packs.

    All pairs of slots of the low pack are sorted by cost. The best partner of a pair of slots of the high pack is then
    one of the two nearest to the cost that halves the gap.

    Args:
        cost_high: [P, s] FLOPs of the clips in the packs with high load; 0 for empty slots.
        cost_low: [P, s] FLOPs of the clips in the packs with low load.
        size_high: [P, s] tokens.
        size_low: [P, s] tokens.
        gap: [P] difference in load.
        room_high: [P] free tokens.
        room_low: [P] free tokens.

    Returns:
        The two slots to exchange in each high pack, [P, 2], those in each low pack, [P, 2], and whether the exchange
        shrinks the gap by at least a tenth, [P].
    """
    first, second = np.triu_indices(cost_high.shape[1], 1)
    row = 4.0 * np.arange(len(gap))[:, None]
    offered, wanted = cost_low[:, first] + cost_low[:, second], cost_high[:, first] + cost_high[:, second]
    order = np.argsort(offered, axis=1)
    sorted_offered = np.take_along_axis(offered, order, axis=1)
    target = wanted - 0.5 * gap[:, None]
    at = np.searchsorted((sorted_offered + row).ravel(), (target + row).ravel()).reshape(target.shape)
    at -= len(first) * np.arange(len(gap))[:, None]
    sizes_low, sizes_high = size_low[:, first] + size_low[:, second], size_high[:, first] + size_high[:, second]
    found = []
    for near in (at - 1, at):
        inside = near.clip(0, len(first) - 1)
        partner = np.take_along_axis(order, inside, axis=1)
        larger = sizes_high - np.take_along_axis(sizes_low, partner, axis=1)
        fits = (larger <= room_low[:, None]) & (-larger <= room_high[:, None])
        miss = np.where(fits, np.abs(np.take_along_axis(sorted_offered, inside, axis=1) - target), np.inf)
        found.append((miss, partner))
    (miss_below, below), (miss_above, above) = found
    miss, partner = np.minimum(miss_below, miss_above), np.where(miss_below <= miss_above, below, above)
    best = miss.argmin(axis=1)
    pair = np.arange(len(gap))
    chosen = partner[pair, best]
    return (
        np.stack([first[best], second[best]], axis=1),
        np.stack([first[chosen], second[chosen]], axis=1),
        miss[pair, best] < _HELPS * gap,
    )


def imbalance(load: NDArray[np.float64]) -> float:
    """Excess of the largest load over the mean: ``max / mean - 1``; 0 for no load."""
    mean = float(load.mean()) if len(load) else 0.0
    return float(load.max()) / mean - 1.0 if mean > 0 else 0.0
