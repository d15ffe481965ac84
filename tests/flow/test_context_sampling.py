"""Tasks with context through the real sampler, against exact laws.

Content-free clips: an oracle gives the exact posterior mean of what is missing. The length law that must come out is
``p(n) p(context | n)``, normalized, and the frames between what is given are shared out as training shares them.
"""

import itertools
from collections import Counter
from math import comb

import pytest
import torch

from flowception.evaluation.lengths import total_variation
from flowception.flow import Context, Role, RoleConfig, SamplerConfig, length_law, sample, sample_states

SHAPE, CLIPS, STEPS = (1, 1, 1), 6000, 50
S, F, C, P = Role.START, Role.FREE, Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE
LENGTHS = {6: 0.3, 9: 0.2, 14: 0.5}
CONFIG = RoleConfig(num_start_frames=2, max_context_frames=6, max_keyframes=4, max_cuts=4)
LIMIT = 0.03  # of total variation; sampling alone has a mean of about 0.01 at 6000 clips


def context_of(roles, starts=0):
    """A sampler's context with the given roles; START first means that the clip starts with a start frame."""
    context = [role for role in roles if role != S]
    return Context(
        frames=torch.ones(len(context), *SHAPE), active=[role == C for role in context], num_start_frames=starts,
        begins_with_start=roles[0] == S,
    )  # fmt: skip


def run(predict, roles, starts=0, clips=CLIPS):
    config = SamplerConfig(num_inference_steps=STEPS)
    context = [context_of(roles, starts)] * clips
    return sample(predict, frame_shape=SHAPE, batch_size=clips, config=config, context=context)


def visible_pieces(roles):
    """Generated frames of a clip in each piece: left of the context if it begins there, and right of each active."""
    sizes, at = [], None
    for role in roles:
        if role == C:
            sizes.append(0)
            at = len(sizes) - 1
        elif role == P:
            at = None
        else:
            if at is None:
                sizes.append(0)
                at = len(sizes) - 1
            sizes[at] += 1
    return tuple(sizes)


def pieces_of(result):
    edges = result.cu_frames.tolist()
    return Counter(visible_pieces(result.roles[a:b].tolist()) for a, b in itertools.pairwise(edges))


def enumeration_oracle(prior, least, has_start):
    """Exact rates by enumerating every way to share the generated frames out over the pieces.

    Args:
        prior: Probability of each tuple of piece sizes.
        least: Frames known to be visible in each piece from the beginning.
        has_start: Whether piece 0 is without an active frame on its left.
    """
    cache = {}

    def missing(visible, clock):
        """Posterior mean of the missing frames of each piece."""
        if (visible, clock) not in cache:
            weights, expected = 0.0, [0.0] * len(visible)
            for sizes, probability in prior.items():
                likelihood = probability
                for size, seen, known in zip(sizes, visible, least):
                    free, shown = size - known, seen - known
                    if shown > free:
                        likelihood = 0.0
                        break
                    likelihood *= comb(free, shown) * clock**shown * (1 - clock) ** (free - shown)
                weights += likelihood
                for i, (size, seen) in enumerate(zip(sizes, visible)):
                    expected[i] += likelihood * (size - seen)
            cache[visible, clock] = [value / weights if weights else 0.0 for value in expected]
        return cache[visible, clock]

    def predict(state):
        rate, clock, edges = [], float(state.clock[0]), state.cu_frames.tolist()
        roles = state.roles.tolist()
        for a, b in itertools.pairwise(edges):
            visible = visible_pieces(roles[a:b])
            mean = missing(visible, clock) if clock < 1 else [0.0] * len(visible)
            sites = [seen + 1 - (has_start and i == 0) for i, seen in enumerate(visible)]
            piece, row = -1, []
            for i, role in enumerate(roles[a:b]):
                piece += role == C or (i == 0 and role == S)
                row.append(0.0 if role == P else mean[piece] / sites[piece])
            rate += row
        return torch.zeros_like(state.frames), torch.tensor(rate, dtype=torch.float64)

    return predict


def compositions(total, parts, least):
    """Every way to write ``total`` as ``parts`` ordered numbers of at least ``least``."""
    for cuts in itertools.combinations(range(total - parts * least + parts - 1), parts - 1):
        edges = (-1, *cuts, total - parts * least + parts - 1)
        yield tuple(b - a - 1 + least for a, b in itertools.pairwise(edges))


def prior_of(task, roles, pieces, least):
    """Probability of each tuple of piece sizes given the context: length law, then uniform over compositions."""
    prior = {}
    for n, share in length_law(task, roles, LENGTHS, CONFIG).items():
        ways = list(compositions(n - sum(role != S for role in roles), pieces, least))
        prior |= {sizes: share / len(ways) for sizes in ways}
    return prior


def lengths_from(pieces, given):
    histogram = Counter()
    for sizes, count in pieces.items():
        histogram[sum(sizes) + given] += count
    total = sum(histogram.values())
    return {n: count / total for n, count in histogram.items()}


@pytest.mark.parametrize("given", [1, 4])
def test_continuation_has_its_length_law(given):
    """c context frames and s = 2 random starts: sites are the active frame and every generated one, all alike."""
    roles, starts = [P] * (given - 1) + [C], 2
    law = length_law("v2v", roles, LENGTHS, CONFIG)
    assert len(law) == 3

    def predict(state):
        clock = float(state.clock[0])
        visible = state.clip_frames - given
        table = torch.zeros(20, dtype=torch.float64)
        for v in range(starts, 20):
            weights = {
                n: p * comb(n - given - starts, v - starts) * clock ** (v - starts) * (1 - clock) ** (n - given - v)
                for n, p in law.items()
                if v <= n - given
            }
            if sum(weights.values()) > 0:
                mean = sum(w * (n - given - v) for n, w in weights.items()) / sum(weights.values())
                table[v] = mean / (v + 1)
        return torch.zeros_like(state.frames), table[visible][state.frame_clip]

    result = run(predict, roles, starts)
    assert total_variation(lengths_from(pieces_of(result), given), law) < LIMIT


@pytest.mark.parametrize("keyframes", [0, 2])
def test_interpolation_has_its_length_law_and_its_gaps(keyframes):
    """n - K free frames lie in K - 1 gaps, every composition as likely as any other."""
    roles = [C] * (1 + keyframes) + [P]
    gaps = keyframes + 1
    prior = prior_of("interpolation", roles, gaps, least=0)
    clips = CLIPS if keyframes == 0 else 2000
    pieces = pieces_of(run(enumeration_oracle(prior, (0,) * gaps, False), roles, clips=clips))
    law = length_law("interpolation", roles, LENGTHS, CONFIG)
    assert total_variation(lengths_from(pieces, len(roles)), law) < (LIMIT if keyframes == 0 else 0.05)
    for gap in range(gaps):
        seen = sum(sizes[gap] * count for sizes, count in pieces.items()) / clips
        assert seen == pytest.approx(sum(sizes[gap] * p for sizes, p in prior.items()), abs=0.3)


@pytest.mark.parametrize(
    ("roles", "pieces"),
    [((P, C), 1), ((S, P, P), 1), ((S, P, C), 2), ((C, P, C), 2), ((S, C, P), 2)],
    ids=["kept first", "kept last", "kept in the middle", "two kept runs", "two kept runs after a start"],
)
def test_completion_has_its_length_law(roles, pieces):
    """Every piece has a frame at least; the one that begins the clip shows its own from the beginning."""
    has_start = roles[0] == S
    prior = prior_of("completion", roles, pieces, least=1)
    known = (int(has_start), *[0] * (pieces - 1))
    clips = 2500
    seen = pieces_of(run(enumeration_oracle(prior, known, has_start), roles, clips=clips))
    given = sum(role != S for role in roles)
    law = length_law("completion", roles, LENGTHS, CONFIG)
    assert total_variation(lengths_from(seen, given), law) < 0.05
    for piece in range(pieces):
        mean = sum(sizes[piece] * count for sizes, count in seen.items()) / clips
        assert mean == pytest.approx(sum(sizes[piece] * p for sizes, p in prior.items()), abs=0.3)
    assert sum(count for sizes, count in seen.items() if 0 in sizes) < 0.02 * clips


@pytest.mark.parametrize("insertion", ["thinning", "bernoulli", "poisson"])
@pytest.mark.parametrize("roles", [(P, P, C), (C, C, P), (S, P, C), (S, P, C, C, P, P), (P, C, P)], ids=str)
def test_context_stays_and_passive_frames_never_gain_a_right_neighbor(roles, insertion):
    context = context_of(roles)
    count = len(context.frames)
    context.frames = torch.arange(1.0, count + 1)[:, None, None, None]
    config = SamplerConfig(num_inference_steps=8, insertion=insertion, max_frames=60)

    def predict(state):  # wants frames everywhere, and pushes every frame
        return torch.full_like(state.frames, 7.0), torch.full((len(state.frames),), 0.4)

    states = list(
        sample_states(predict, frame_shape=SHAPE, batch_size=40, config=config, context=[context] * 40, seed=3)
    )
    for state in states:
        for a, b in itertools.pairwise(state.cu_frames.tolist()):
            shown = state.roles[a:b].tolist()
            assert [role for role in shown if role in (C, P)] == [role for role in roles if role != S]
            values = [float(x) for x, role in zip(state.frames[a:b].flatten(), shown) if role in (C, P)]
            assert values == list(range(1, count + 1))
            assert all(after in (C, P) for role, after in itertools.pairwise(shown) if role == P)
            assert [role for role in shown if role == S] == [S] * (roles[0] == S)
            assert shown[0] == roles[0]
    assert states[-1].clip_frames.min() < states[-1].clip_frames.max()


def test_a_start_frame_alone_left_of_a_passive_run_can_grow():
    context = Context(frames=torch.zeros(2, *SHAPE), active=[False, False], num_start_frames=0, begins_with_start=True)
    config = SamplerConfig(num_inference_steps=4)

    def predict(state):
        return torch.zeros_like(state.frames), torch.full((len(state.frames),), 2.0)

    result = sample(predict, frame_shape=SHAPE, batch_size=1, config=config, context=[context])
    roles = result.roles.tolist()
    assert roles[0] == S
    assert roles[-2:] == [P, P]
    assert set(roles[1:-2]) == {F}
