"""Spreading a step's clips over its packs: longest first on FLOPs under a token capacity, then exchanges.

Attention makes a long clip cost more than its tokens say, so packs are balanced by FLOPs while tokens only bound what
fits. Graham's rule (the longest clip first, to the pack with the least load) leaves the packs a percent apart where
they are nearly full, because the last clips go where there is room and not where load is missing; exchanging clips
between the fullest and the emptiest packs takes most of that away. Exchanges also join the gaps of two packs to one
that a clip fits in (``benchmarks/planning.py`` has the figures). Where few large clips leave no such exchange, the
step is packed again in another order.

Shape legend: ``K`` clips offered, ``G`` packs, ``P`` pairs of packs, ``s`` slots of a pack.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from flowception import rng
from flowception.rng import Stream

CARRIED = -1
_FULL = 0.988
"""Room is made for clips that found none until the packs hold this share of their tokens."""
_MAX_PLACED = 16
_MAX_ROUNDS = 48
_MAX_PAIRS = 64
_GOOD_IMBALANCE = 2e-3
"""Exchanges end when no pack has more load than the mean by this share."""
_BAD_IMBALANCE = 8e-3
_ATTEMPTS = 8
"""A full step with more imbalance than that is packed again, as often, in orders that are a little shuffled."""
_MAX_GIVERS = 32
_HELPS = 0.45
"""An exchange that misses half the gap by more than this share of the gap is not made."""


def pack_clips(
    tokens: NDArray[np.int64], flops: NDArray[np.float64], num_packs: int, token_budget: int, num_urgent: int = 0
) -> NDArray[np.int64]:
    """Give each clip a pack.

    Urgent clips, left over by several steps, go first; then from the most FLOPs to the fewest (ties: earlier first).
    Each goes to the pack with the fewest FLOPs so far that has room. Then packs exchange clips, and are numbered from
    the most FLOPs to the fewest, so that packs which run at the same time on different ranks cost alike.

    Args:
        tokens: [K] tokens of each clip.
        flops: [K] FLOPs of each clip.
        num_packs: G.
        token_budget: Tokens a pack can hold.
        num_urgent: How many of the clips, at the front, are urgent.

    Returns:
        [K] pack of each clip, or ``CARRIED`` for a clip that fits in none.
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
    """Packs of clips that go urgent first and then by precedence, after all exchanges; [K]."""
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
    """Each clip, in the given order, to the pack with the least load that has room; [K] packs or ``CARRIED``.

    Packs too full for a clip are set aside by room until a clip comes that fits.
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
    """Deal clips round by round while that is what longest first does: one to each pack, the least loaded first.

    It is as long as a pack that got a clip has more load than any had before, and there is room. Changes ``assigned``,
    ``load`` and ``room``, and returns how many clips of ``order`` are dealt.
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
    """Place clips that found no room, the smallest first, until packs hold ``_FULL`` of their tokens; in place.

    The pack with most room gets the clip; what room it lacks, it gets by exchanging a clip for a shorter one of a pack
    that has room for the difference.
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
    """Exchange clips between packs of much and little load until loads are alike; [K] packs.

    In a round the pack of most load is paired with that of least, the second with the second last, and so on. Each
    pair makes the one exchange that brings its loads nearest together: up to two clips against up to two. Two, because
    frames are alike: one clip against one moves whole frames, and a frame may be half a percent of a pack.
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
    """What each pair of packs exchanges.

    All pairs of slots of the low pack are sorted by cost, so the best partner of a pair of slots of the high pack is
    one of the two nearest to what would close half the gap.

    Args:
        cost_high: [P, s] FLOPs of the clips of the packs of much load; 0 for empty slots.
        cost_low: [P, s] those of little load.
        size_high: [P, s] tokens.
        size_low: [P, s] tokens.
        gap: [P] difference of load.
        room_high: [P] free tokens.
        room_low: [P] free tokens.

    Returns:
        The two slots to exchange in each high pack, [P, 2], those in each low pack, [P, 2], and whether the exchange
        makes the gap at least a tenth smaller, [P].
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
    """How much longer the fullest pack takes than the mean: ``max / mean - 1``; 0 for no load."""
    mean = float(load.mean()) if len(load) else 0.0
    return float(load.max()) / mean - 1.0 if mean > 0 else 0.0
