"""Roles: their law by task, fallbacks, and what the network is told."""

import pytest
import torch

from flowception.errors import ConfigError
from flowception.flow.task import (
    TASK_NUMBERS,
    TASKS,
    Role,
    draw_roles,
    is_context,
    model_role,
    played_task,
    task_number,
)
from flowception.nn.layout import ModelRole

T2V, I2V = TASK_NUMBERS["t2v"], TASK_NUMBERS["i2v"]
A, S, F, C = Role.ABSENT, Role.START, Role.FREE, Role.CONTEXT_ACTIVE


def many_roles(task, num_frames, num_start_frames, clips=20_000, longest=None):
    generator = torch.Generator().manual_seed(task * 100 + num_frames)
    u_role = torch.rand(clips, longest or num_frames, dtype=torch.float64, generator=generator)
    return draw_roles(torch.full((clips,), task), torch.full((clips,), num_frames), u_role, num_start_frames)


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


def test_roles_by_hand():
    u_role = torch.tensor([[0.0, 0.9, 0.2, 0.5, 0.1, 0.3]]).double().expand(5, 6)
    task = torch.tensor([T2V, T2V, I2V, I2V, T2V])
    roles = draw_roles(task, torch.tensor([6, 4, 6, 3, 2]), u_role, 3)
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


def test_a_clip_with_nothing_to_generate_falls_back_to_text_to_video():
    task, num_frames = torch.tensor([I2V, I2V, T2V]), torch.tensor([1, 2, 1])
    roles = draw_roles(task, num_frames, torch.rand(3, 4, dtype=torch.float64), 3)
    assert roles.tolist() == [[S, A, A, A], [C, S, A, A], [S, A, A, A]]
    assert played_task(task, roles).tolist() == [T2V, I2V, T2V]


def test_every_task_has_frame_zero_present_and_something_to_generate():
    for number in range(len(TASKS)):
        for num_frames in range(1, 6):
            roles = many_roles(number, num_frames, 2, clips=50, longest=6)
            assert ((roles[:, 0] == S) | is_context(roles[:, 0])).all()
            assert ((roles == S) | (roles == F)).any(dim=1).all()
            assert ((roles == A).sum(dim=1) == 6 - num_frames).all()


def test_the_network_is_told_generated_active_or_passive():
    told = model_role(torch.tensor([A, S, F, C, Role.CONTEXT_PASSIVE]))
    generated, active, passive = ModelRole.GENERATED, ModelRole.ACTIVE, ModelRole.PASSIVE
    assert told.tolist() == [generated, generated, generated, active, passive]
    assert told.dtype == torch.int64


def test_an_unknown_task_is_refused_with_the_known_ones():
    assert task_number("i2v") == I2V
    with pytest.raises(ConfigError, match="'v2x'.*t2v, i2v"):
        task_number("v2x")
