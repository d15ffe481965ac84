"""The class, prompt and seed of each clip of a job.

Clips cycle over prompts, classes and context files: with P prompts, clip i has prompt ``i % P``, and P context files
give each prompt its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowception.errors import ConfigError
from flowception.generation.prompt import Prompt
from flowception.shards.schema import NO_CLASS


@dataclass(frozen=True)
class ClipRequest:
    """Class, prompt and seed of one clip."""

    class_label: int
    """-1 is none."""
    prompt: str | None
    seed: int


def clip_requests(
    count: int,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    class_label: str | None,
    class_names: Sequence[str],
    num_classes: int,
) -> list[ClipRequest]:
    """Assign class, prompt and seed to every clip of a job.

    Args:
        count: Number of clips; with several prompts, clips per prompt.
        prompts: Any number of prompts, or none.
        seed: Seed of the job.
        class_label: Class number or name, ``null`` for none, None to cycle over all.
        class_names: Class names, if the training set has them.
        num_classes: Number of classes of the model.

    Returns:
        One request per clip, in order.

    Raises:
        ConfigError: If the model has no such class.
    """
    words = [(class_label, "`class_label`")]
    if prompts:
        words = [words[0] if p.class_label is None else (p.class_label, p.place) for p in prompts]
    numbers = [None if word is None else class_number(word, class_names, num_classes, place) for word, place in words]
    requests = []
    for clip in range(count * max(1, len(prompts))):
        round_number, slot = divmod(clip, max(1, len(prompts)))
        number, prompt = numbers[slot], prompts[slot] if prompts else None
        if number is None:
            number = clip % num_classes if num_classes else NO_CLASS
        own_seed = None if prompt is None else prompt.seed
        requests.append(
            ClipRequest(
                class_label=number,
                prompt=None if prompt is None else prompt.text,
                seed=seed + clip if own_seed is None else own_seed + round_number,
            )
        )
    return requests


def class_number(word: str, class_names: Sequence[str], num_classes: int, place: str) -> int:
    """Resolve a class number or name.

    Args:
        word: Class number or name, or ``null`` for none.
        class_names: Class names, if the training set has them.
        num_classes: Number of classes of the model.
        place: Where the class was specified, for messages.

    Returns:
        The class number; -1 is none.

    Raises:
        ConfigError: If the model has no such class.
    """
    if word.lower() in ("null", "none"):
        return NO_CLASS
    if not num_classes:
        raise ConfigError(f"{place}: the model was trained without classes, got class {word!r}; drop it")
    number = list(class_names).index(word) if word in class_names else int(word) if word.isdigit() else -1
    if not 0 <= number < num_classes:
        named = f" or one of {', '.join(class_names)}" if class_names else ""
        raise ConfigError(f"{place}: class must be a number from 0 to {num_classes - 1}{named}, or null, got {word!r}")
    return number
