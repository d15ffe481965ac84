"""Class, prompt and seed of each clip of a job."""

import pytest

from flowception.errors import ConfigError
from flowception.generation.prompt import Prompt
from flowception.generation.requests import ClipRequest, class_number, clip_requests

NAMES = ["red", "green", "blue"]


def requests(count, prompts=(), *, seed=0, class_label=None, class_names=NAMES, num_classes=3):
    return clip_requests(
        count, prompts, seed=seed, class_label=class_label, class_names=class_names, num_classes=num_classes
    )


@pytest.mark.parametrize(
    ("word", "expected"), [(None, [0, 1, 2, 0]), ("green", [1] * 4), ("2", [2] * 4), ("null", [-1] * 4)]
)
def test_classes(word, expected):
    assert [request.class_label for request in requests(4, class_label=word)] == expected


def test_classes_of_a_model_without_classes():
    assert [request.class_label for request in requests(2, class_names=[], num_classes=0)] == [-1, -1]
    with pytest.raises(ConfigError, match="`class_label`: the model was trained without classes, got class '1'"):
        requests(2, class_label="1", class_names=[], num_classes=0)


def test_clips_cycle_over_prompts_and_classes():
    a, b = Prompt(text="a"), Prompt(text="b", seed=50, class_label="blue")
    assert requests(3, [a, b], seed=7) == [
        ClipRequest(0, "a", 7), ClipRequest(2, "b", 50),
        ClipRequest(2, "a", 9), ClipRequest(2, "b", 51),
        ClipRequest(1, "a", 11), ClipRequest(2, "b", 52),
    ]  # fmt: skip
    assert requests(3, [a], class_label="1") == [ClipRequest(1, "a", clip) for clip in range(3)]
    assert requests(2, seed=4, class_label="null") == [ClipRequest(-1, None, 4), ClipRequest(-1, None, 5)]


def test_an_unknown_class_is_reported_with_its_source():
    assert class_number("null", [], 0, "here") == -1
    with pytest.raises(
        ConfigError, match=r"--prompts x, line 3: class must be a number from 0 to 2 or one of red.*, got '3'"
    ):
        requests(1, [Prompt(text="a", class_label="3", place="--prompts x, line 3")])
