"""``p(context | n)`` and the number of present frames, compared with the tasks' draws frame by frame."""

import itertools
from collections import Counter

import pytest
import torch

from flowception.flow.context_law import CONTEXT_LAWS, context_probability, length_law, present_law
from flowception.flow.task import TASK_NUMBERS, TASKS, Role, RoleConfig, draw_roles, is_context

S, F, C, P = Role.START, Role.FREE, Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE
CONFIGS = [RoleConfig(), RoleConfig(num_start_frames=1, max_context_frames=2, max_keyframes=1, max_cuts=2)]
CLIPS = 20_000


def drawn(task, num_frames, config):
    generator = torch.Generator().manual_seed(num_frames)
    u_role = torch.rand(CLIPS, num_frames, dtype=torch.float64, generator=generator)
    return draw_roles(torch.full((CLIPS,), TASK_NUMBERS[task]), torch.full((CLIPS,), num_frames), u_role, config)


def given_of(roles, task):
    """Context roles in order, preceded by START if completion starts with it."""
    context = tuple(role for role in roles if role in (C, P))
    return (S, *context) if task == "completion" and context and roles[0] == S else context


def every_context(num_frames):
    """Every sequence that could be a context of a clip, START first or not."""
    for length in range(num_frames + 1):
        for context in itertools.product((C, P), repeat=length):
            yield context
            yield (S, *context)


def test_every_task_has_a_law():
    assert list(CONTEXT_LAWS) == [task.name for task in TASKS]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "small"])
@pytest.mark.parametrize("task", list(CONTEXT_LAWS))
def test_the_law_sums_to_one_and_is_that_of_the_draws(task, config):
    for num_frames in (1, 2, 3, 4, 7):
        law = {given: context_probability(task, given, num_frames, config) for given in every_context(num_frames)}
        assert sum(law.values()) == pytest.approx(1)
        seen = Counter(given_of(roles, task) for roles in drawn(task, num_frames, config).tolist())
        assert {given for given, p in law.items() if p > 0} == set(seen)
        for given, count in seen.items():
            p = law[given]
            assert count == pytest.approx(CLIPS * p, abs=4.5 * (CLIPS * p * (1 - p)) ** 0.5)


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "small"])
@pytest.mark.parametrize("task", list(CONTEXT_LAWS))
def test_the_number_of_present_frames_is_that_of_the_draws(task, config):
    for num_frames in (1, 2, 3, 4, 7, 12):
        law = present_law(task, num_frames, config)
        assert sum(law.values()) == pytest.approx(1)
        roles = drawn(task, num_frames, config)
        counts = zip(is_context(roles).sum(dim=1).tolist(), (roles == S).sum(dim=1).tolist(), strict=True)
        present = Counter(counts)
        assert set(present) <= set(law)
        for pair, p in law.items():
            seen = present[pair]
            assert seen == pytest.approx(CLIPS * p, abs=4.5 * (CLIPS * p * (1 - p)) ** 0.5)


def test_probabilities_worked_example():
    config = RoleConfig(max_context_frames=3, max_keyframes=2, max_cuts=3)
    assert context_probability("v2v", (P, C), 9, config) == 1 / 3
    assert context_probability("v2v", (P, C), 3, config) == 1 / 2
    assert context_probability("v2v", (C, C), 9, config) == 0
    assert context_probability("interpolation", (C, C, P), 9, config) == 1 / 3
    assert context_probability("interpolation", (C, C, P), 4, config) == 1 / 2
    assert context_probability("interpolation", (C, P), 3, config) == 1
    # Runs of 2 and 1 with the first given and the last generated: 3 cuts of C(8, 3), 6 frames in 2 pieces 5 ways.
    assert context_probability("completion", (P, C, C), 9, config) == pytest.approx(1 / 3 / 2 * 5 / 56)
    # The same run alone in the middle, after a start frame: 2 cuts of C(8, 2), 7 frames in 2 pieces 6 ways.
    assert context_probability("completion", (S, P, C), 9, config) == pytest.approx(1 / 3 / 2 * 6 / 28)
    assert context_probability("completion", (P, P), 9, config) == 0  # nothing to generate


def test_a_long_clip_costs_no_long_sum():
    assert sum(present_law("completion", 3000, RoleConfig()).values()) == pytest.approx(1)


def test_length_law_is_the_normalized_product():
    lengths = {3: 0.5, 4: 0.25, 12: 0.25}
    assert length_law("interpolation", (C, C, P), lengths, RoleConfig()) == pytest.approx(
        {4: (0.25 / 2) / (0.25 / 2 + 0.25 / 4), 12: (0.25 / 4) / (0.25 / 2 + 0.25 / 4)}
    )
    with pytest.raises(ValueError, match="context that task interpolation can produce in clips of"):
        length_law("interpolation", (C, C, C, P), {3: 1.0, 4: 0.0}, RoleConfig())
