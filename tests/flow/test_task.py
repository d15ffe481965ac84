"""Roles: their law by task, fallbacks, and what the network is told."""

import itertools

import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow.task import (
    TASK_NUMBERS,
    TASKS,
    Role,
    RoleConfig,
    draw_roles,
    is_context,
    played_task,
    task_number,
)

T2V, I2V = TASK_NUMBERS["t2v"], TASK_NUMBERS["i2v"]
V2V, INTERPOLATION, COMPLETION = (TASK_NUMBERS[name] for name in ("v2v", "interpolation", "completion"))
A, S, F, C, P = Role.ABSENT, Role.START, Role.FREE, Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE


def many_roles(task, num_frames, num_start_frames, clips=20_000, longest=None, **config):
    generator = torch.Generator().manual_seed(task * 100 + num_frames)
    u_role = torch.rand(clips, longest or num_frames, dtype=torch.float64, generator=generator)
    config = RoleConfig(num_start_frames=num_start_frames, **config)
    return draw_roles(torch.full((clips,), task), torch.full((clips,), num_frames), u_role, config)


def frequencies(rows):
    """How many times each distinct row comes."""
    kinds, counts = torch.unique(rows, dim=0, return_counts=True)
    return {tuple(kind): count for kind, count in zip(kinds.tolist(), counts.tolist())}


def chi_square_per_degree(seen, law, total):
    """Below about 1 + 4 sqrt(2 / degrees) where ``seen`` follows ``law``; the supports must be the same."""
    assert seen.keys() == law.keys()
    assert sum(law.values()) == pytest.approx(1)
    return sum((seen[kind] - total * p) ** 2 / (total * p) for kind, p in law.items()) / (len(law) - 1)


@pytest.mark.parametrize(("task", "first", "others"), [(T2V, S, 2), (I2V, C, 3)])
def test_start_frames_are_a_uniform_subset_of_the_others(task, first, others):
    roles = many_roles(task, 6, 3)
    assert (roles[:, 0] == first).all()
    started = roles[:, 1:] == S
    assert (started.sum(dim=1) == others).all()
    assert ((roles[:, 1:] == S) | (roles[:, 1:] == F)).all()
    subsets, counts = torch.unique((started.long() * 2 ** torch.arange(5)).sum(dim=1), return_counts=True)
    assert len(subsets) == 10  # C(5, 2) = C(5, 3)
    chi_square = ((counts - 2000) ** 2 / 2000.0).sum().item()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_roles_worked_example():
    u_role = torch.tensor([[0.0, 0.9, 0.2, 0.5, 0.1, 0.3]]).double().expand(5, 6)
    task = torch.tensor([T2V, T2V, I2V, I2V, T2V])
    roles = draw_roles(task, torch.tensor([6, 4, 6, 3, 2]), u_role, RoleConfig())
    assert roles.tolist() == [
        [S, F, S, F, S, F],
        [S, F, S, S, A, A],
        [C, F, S, F, S, S],
        [C, S, S, A, A, A],
        [S, S, A, A, A, A],
    ]


def test_no_start_frames():
    assert (many_roles(I2V, 5, 0, clips=10) == torch.tensor([C, F, F, F, F])).all()
    assert (many_roles(T2V, 5, 0, clips=10) == torch.tensor([S, F, F, F, F])).all()
    assert (many_roles(T2V, 5, 1, clips=10) == torch.tensor([S, F, F, F, F])).all()


def test_continuation_gives_the_first_frames_and_starts_random_others():
    """7 frames, 1 to 4 given, 2 starts: 4 x C(7 - c, 2) equally likely places of each c."""
    roles = many_roles(V2V, 7, 2, max_context_frames=4)
    law = {}
    for c in range(1, 5):
        subsets = list(itertools.combinations(range(c, 7), 2))
        for subset in subsets:
            tail = [S if i in subset else F for i in range(c, 7)]
            law[(*[P] * (c - 1), C, *tail)] = 1 / 4 / len(subsets)
    assert chi_square_per_degree(frequencies(roles), law, len(roles)) < 1 + 4 * (2 / len(law)) ** 0.5


def test_a_short_clip_has_fewer_context_and_start_frames():
    roles = many_roles(V2V, 3, 2, clips=4000)
    seen = frequencies(roles)
    assert set(seen) == {(C, S, S), (P, C, S)}
    assert seen[C, S, S] == pytest.approx(2000, abs=130)  # 4 standard deviations


def test_interpolation_gives_both_ends_and_random_keyframes():
    roles = many_roles(INTERPOLATION, 7, 3, max_keyframes=2)
    law = {}
    for m in range(3):
        subsets = list(itertools.combinations(range(1, 6), m))
        for subset in subsets:
            law[(C, *[C if i in subset else F for i in range(1, 6)], P)] = 1 / 3 / len(subsets)
    assert chi_square_per_degree(frequencies(roles), law, len(roles)) < 1 + 4 * (2 / len(law)) ** 0.5
    assert set(frequencies(many_roles(INTERPOLATION, 4, 3, clips=500))) == {(C, F, F, P), (C, C, F, P), (C, F, C, P)}
    assert set(frequencies(many_roles(INTERPOLATION, 3, 3, clips=500))) == {(C, F, P)}


def roles_of_completion(given):
    """The rule of docs/method.md frame by frame."""
    roles = []
    for i, here in enumerate(given):
        following = given[i + 1] if i + 1 < len(given) else None
        if here:
            roles.append(C if following is False else P)
        else:
            roles.append(S if i == 0 else F)
    return tuple(roles)


@pytest.mark.parametrize(("num_frames", "max_cuts"), [(6, 3), (5, 9), (2, 4)])
def test_completion_cuts_at_random_places(num_frames, max_cuts):
    roles = many_roles(COMPLETION, num_frames, 3, clips=40_000, max_cuts=max_cuts)
    most, law = min(max_cuts, num_frames - 1), {}
    for k in range(1, most + 1):
        places = list(itertools.combinations(range(1, num_frames), k))
        for cuts in places:
            for first in (False, True):
                given = [first ^ bool(sum(c <= i for c in cuts) % 2) for i in range(num_frames)]
                law[roles_of_completion(given)] = 1 / most / len(places) / 2
    assert chi_square_per_degree(frequencies(roles), law, len(roles)) < 1 + 4 * (2 / len(law)) ** 0.5


def test_roles_of_context_tasks_worked_example():
    u_role = torch.tensor([[0.55, 0.9, 0.2, 0.5, 0.1, 0.3]]).double().expand(4, 6)
    task, num_frames = torch.tensor([V2V, INTERPOLATION, COMPLETION, COMPLETION]), torch.tensor([6, 6, 6, 4])
    roles = draw_roles(task, num_frames, u_role, RoleConfig(num_start_frames=1))
    assert roles.tolist() == [
        [P, P, C, F, S, F],  # c = 1 + floor(0.55 * 5) = 3; frame 4 has the least uniform of the rest
        [C, F, C, F, C, P],  # m = floor(0.55 * 4) = 2: frames 4 and 2 of those between
        [S, F, P, C, F, P],  # floor(0.55 * 8) = 4: 3 cuts, left of frames 4, 2 and 5; the first piece is generated
        [P, C, F, P, A, A],  # floor(0.55 * 6) = 3: 2 cuts, left of frames 2 and 3; the first piece is given
    ]


def test_a_clip_with_nothing_to_generate_falls_back_to_text_to_video():
    task, num_frames = torch.tensor([I2V, I2V, T2V, V2V, INTERPOLATION, COMPLETION]), torch.tensor([1, 2, 1, 1, 2, 1])
    roles = draw_roles(task, num_frames, torch.rand(6, 4, dtype=torch.float64), RoleConfig())
    assert roles.tolist() == [
        [S, A, A, A],
        [C, S, A, A],
        [S, A, A, A],
        [S, A, A, A],
        [S, S, A, A],
        [S, A, A, A],
    ]
    assert played_task(task, num_frames).tolist() == [T2V, I2V, T2V, T2V, T2V, T2V]


def test_every_task_has_frame_zero_present_and_something_to_generate():
    for number in range(len(TASKS)):
        for num_frames in range(1, 8):
            roles = many_roles(number, num_frames, 2, clips=200, longest=9)
            assert ((roles[:, 0] == S) | is_context(roles[:, 0])).all()
            assert ((roles == S) | (roles == F)).any(dim=1).all()
            assert ((roles == A).sum(dim=1) == 9 - num_frames).all()
            assert (roles[:, :num_frames] != A).all()
            passive_before_generated = (roles[:, :-1] == P) & ((roles[:, 1:] == F) | (roles[:, 1:] == S))
            assert not passive_before_generated.any()


@pytest.mark.parametrize(
    "wrong", [{"num_start_frames": -1}, {"max_context_frames": 0}, {"max_keyframes": -1}, {"max_cuts": 0}], ids=str
)
def test_a_number_of_frames_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be an integer >= [01], got -?[01]$"):
        RoleConfig(**wrong)


def test_an_unknown_task_is_refused_with_the_known_ones():
    assert task_number("i2v") == I2V
    with pytest.raises(ConfigError, match="task must be one of t2v, i2v, v2v, interpolation, completion, got 'v2x'"):
        task_number("v2x")
