"""The distribution of context frames, ``p(context | n)``, and of the number of frames present at clock 0.

The sampler sees the order of the context frames but not their positions. Its posterior over the length is therefore
``p(n) p(context | n)``, normalized, and its samples should follow that law (docs/method.md). Closed forms of the
laws that ``task.draw_roles`` samples from:

* ``v2v``, c context frames: ``1 / M``, M = ``min(max_context_frames, n - 1)``, for c = 1 to M.
* ``interpolation``, m keyframes between the ends: ``1 / (1 + M)``, M = ``min(max_keyframes, n - 3)``, for m = 0 to M.
* ``completion``, k cuts, G generated pieces with g frames in total, and context runs of known lengths:
  ``C(g - 1, G - 1) / (2 M C(n - 1, k))``, M = ``min(max_cuts, n - 1)``. Of the ``C(n - 1, k)`` ways to cut, those
  that keep the runs differ only in how they distribute the g frames over the G pieces.

Start frames are always present and only their positions are unknown. With ``num_start_frames = s``, a clip with fewer
than s frames right of the context is therefore outside the law of such a sampler.

Shape legend: ``n`` frames of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import comb

from flowception.flow.task import TASKS, Role, RoleConfig, task_number

Given = Sequence[Role]
"""The ordered part of a sampler's initial state: the role of every context frame, preceded by START if the clip starts
with its only start frame (``completion``). Random start frames are excluded."""

PresentLaw = Mapping[tuple[int, int], float]
"""Probability of each (context frames, start frames) pair at clock 0."""

ACTIVE, PASSIVE = Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE


def _text_to_video(given: Given, n: int, config: RoleConfig) -> float:
    return float(not given)


def _image_to_video(given: Given, n: int, config: RoleConfig) -> float:
    return float(list(given) == [ACTIVE])


def _video_to_video(given: Given, n: int, config: RoleConfig) -> float:
    most = min(config.max_context_frames, n - 1)
    is_continuation = 1 <= len(given) <= most and list(given) == [PASSIVE] * (len(given) - 1) + [ACTIVE]
    return is_continuation / most


def _interpolation(given: Given, n: int, config: RoleConfig) -> float:
    most = min(config.max_keyframes, n - 3)
    is_interpolation = 2 <= len(given) <= 2 + most and list(given) == [ACTIVE] * (len(given) - 1) + [PASSIVE]
    return is_interpolation / (1 + most)


def _pieces(given: Given) -> tuple[int, int] | None:
    """Numbers of context runs and generated pieces; None if this is not a completion."""
    starts_first = bool(given) and given[0] == Role.START
    context = list(given)[starts_first:]
    if not context or any(role not in (ACTIVE, PASSIVE) for role in context):
        return None
    active = sum(role == ACTIVE for role in context)
    return active + (context[-1] == PASSIVE), active + starts_first


def _completion(given: Given, n: int, config: RoleConfig) -> float:
    pieces = _pieces(given)
    generated = n - sum(role != Role.START for role in given)
    if pieces is None or generated < 1:
        return 0.0
    runs, generated_pieces = pieces
    most, cuts = min(config.max_cuts, n - 1), runs + generated_pieces - 1
    if generated_pieces < 1 or cuts > most:
        return 0.0
    return comb(generated - 1, generated_pieces - 1) / (2 * most * comb(n - 1, cuts))


CONTEXT_LAWS: dict[str, Callable[[Given, int, RoleConfig], float]] = {
    "t2v": _text_to_video,
    "i2v": _image_to_video,
    "v2v": _video_to_video,
    "interpolation": _interpolation,
    "completion": _completion,
}
"""``(given, n, config) -> p(context | n)`` of each task, for a clip long enough for the task."""


def _played(task: str, n: int) -> str:
    """The task of a clip of n frames, after the fallback to text-to-video."""
    return task if n >= TASKS[task_number(task)].min_frames else "t2v"


def context_probability(task: str, given: Given, num_frames: int, config: RoleConfig) -> float:
    """Probability that a task selects exactly these context frames, at any positions.

    Args:
        task: Name of the task.
        given: Roles of the context frames in order, preceded by START if frame 0 is completion's start frame.
        num_frames: n, latent frames of the clip, at least 1.
        config: Numbers of start and context frames.

    Returns:
        ``p(context | n)``. A clip too short for its task falls back to text-to-video and has no context.
    """
    return CONTEXT_LAWS[_played(task, num_frames)](given, num_frames, config)


def length_law(task: str, given: Given, lengths: Mapping[int, float], config: RoleConfig) -> dict[int, float]:
    """The length law that a task's sampler should follow: ``p(n) p(context | n)``, normalized.

    Args:
        task: Name of the task.
        given: As in ``context_probability``.
        lengths: ``p(n)`` of the training clips.
        config: Numbers of start and context frames.

    Returns:
        Probability of each possible length.

    Raises:
        ValueError: If no length is compatible with this context.
    """
    joint = {n: share * context_probability(task, given, n, config) for n, share in lengths.items()}
    total = sum(joint.values())
    if not total > 0:
        raise ValueError(
            f"given must be a context that task {task} can produce in clips of {sorted(lengths)} frames, got "
            f"{list(given)}"
        )
    return {n: share / total for n, share in joint.items() if share > 0}


def present_law(task: str, num_frames: int, config: RoleConfig) -> PresentLaw:
    """The number of frames of a clip present at clock 0.

    Args:
        task: Name of the task.
        num_frames: n, at least 1.
        config: Numbers of start and context frames.

    Returns:
        Probability of each (context frames, start frames) pair.
    """
    n, played = num_frames, _played(task, num_frames)
    if played == "t2v":
        return {(0, min(n, max(1, config.num_start_frames))): 1.0}
    law: dict[tuple[int, int], float] = {}
    for context, starts, probability in _context_counts(played, n, config):
        law[context, starts] = law.get((context, starts), 0.0) + probability
    return law


def _context_counts(task: str, n: int, config: RoleConfig) -> list[tuple[int, int, float]]:
    """(Context frames, start frames, probability) for every case of a task with context."""
    if task == "i2v":
        return [(1, min(n - 1, config.num_start_frames), 1.0)]
    if task == "v2v":
        most = min(config.max_context_frames, n - 1)
        return [(c, min(n - c, config.num_start_frames), 1 / most) for c in range(1, most + 1)]
    if task == "interpolation":
        most = min(config.max_keyframes, n - 3)
        return [(2 + m, 0, 1 / (1 + most)) for m in range(most + 1)]
    most = min(config.max_cuts, n - 1)
    cases = []
    for cuts in range(1, most + 1):
        for starts in (0, 1):
            runs = (cuts + 2 - starts) // 2
            ways = 2 * most * comb(n - 1, cuts)
            for c in range(runs, n - (cuts + 1 - runs) + 1):
                cases.append((c, starts, comb(c - 1, runs - 1) * comb(n - c - 1, cuts - runs) / ways))
    return cases
