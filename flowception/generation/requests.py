"""What each clip of a job is asked to show: its class, its prompt, its seed.

Clips cycle over prompts, as they do over classes and context files: with P prompts clip i has prompt ``i % P``, and as
many context files are one for each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowception.errors import ConfigError
from flowception.generation.prompt import Prompt
from flowception.shards.schema import NO_CLASS


@dataclass(frozen=True)
class ClipRequest:
    """One clip's."""

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
    """The wish of every clip of a job.

    Args:
        count: Clips; of each prompt, where there are several.
        prompts: None, one, or several.
        seed: The job's.
        class_label: Number or name of a class, ``null`` for none, None to cycle over all.
        class_names: Names, where the training set has them.
        num_classes: Classes the model knows.

    Returns:
        One for each clip, in order.

    Raises:
        ConfigError: If the model has no such class.
    """
    words = [(class_label, "`class_label`")]
    if prompts:
        words = [words[0] if p.class_label is None else (p.class_label, p.place) for p in prompts]
    numbers = [None if word is None else class_number(word, class_names, num_classes, place) for word, place in words]
    wishes = []
    for clip in range(count * max(1, len(prompts))):
        round_number, slot = divmod(clip, max(1, len(prompts)))
        number, prompt = numbers[slot], prompts[slot] if prompts else None
        if number is None:
            number = clip % num_classes if num_classes else NO_CLASS
        own_seed = None if prompt is None else prompt.seed
        wishes.append(
            ClipRequest(
                class_label=number,
                prompt=None if prompt is None else prompt.text,
                seed=seed + clip if own_seed is None else own_seed + round_number,
            )
        )
    return wishes


def class_number(word: str, class_names: Sequence[str], num_classes: int, place: str) -> int:
    """The class that a word names.

    Args:
        word: Number or name of a class, or ``null`` for none.
        class_names: Names, where the training set has them.
        num_classes: Classes the model knows.
        place: Where the word was given, for messages.

    Returns:
        Its number; -1 is none.

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
