"""Sampling options, shared by ``Run.sample`` and ``flowception generate`` under the same names.

Messages put option names in backticks, such as `num_frames`; the command line prints them as flags, ``--num-frames``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from flowception.flow import task_number
from flowception.flow.insertion import INSERTION_RULES
from flowception.generation.context import check_context
from flowception.generation.context_source import ContextItem, ContextSource, context_sources
from flowception.generation.prompt import LARGEST_SEED, Prompt
from flowception.ranges import Rule, integer, list_of, number, one_of


def _is_prompt(value: object) -> bool:
    given = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return len(given) > 0 and all(isinstance(item, str | Prompt) for item in given)


_RULES = {
    "num": integer(at_least=1),
    "seed": integer(at_least=0, at_most=LARGEST_SEED),
    "num_inference_steps": integer(at_least=1),
    "max_frames": integer(at_least=1),
    "batch_size": integer(at_least=1),
    "num_frames": integer(at_least=1).or_null("the length that the model chooses"),
    "cache_refresh": integer(at_least=1).or_null("off"),
    "guidance": number().or_null("off"),
    "rate_guidance": number().or_null("off"),
    "insertion": one_of(INSERTION_RULES),
    "keep": list_of(integer(at_least=0)).or_null("the task's default"),
    "prompt": Rule("a caption or a list of 1 or more", _is_prompt).or_null("no caption"),
    "size": list_of(integer(at_least=1), length=2).or_null("that of the training clips"),
}


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to sample. Everything that the run's configuration decides comes from the run."""

    task: str = "t2v"
    """``t2v``, ``i2v``, ``v2v``, ``interpolation`` or ``completion``."""
    context: ContextItem | Sequence[ContextItem] | None = None
    """Images or videos, depending on the task (``generation.context``); clips cycle over them."""
    keep: Sequence[int] | None = None
    """Latent frames of a context video to keep, counted from 0; None uses the task's default."""
    prompt: str | Sequence[str | Prompt] | None = None
    """One caption, or several that clips cycle over; None for clips without a caption."""
    class_label: int | str | None = None
    """Class number or name, or ``null`` for none. None cycles over the classes for t2v and means no class for the other
    tasks, where the context determines the content."""
    text_encoder: str | None = None
    """Folder or hub id of the T5 encoder for prompts; None uses the one that made the shards."""
    num: int = 1
    """Number of clips; with several prompts, clips per prompt."""
    seed: int = 0
    """Clip i has seed ``seed + i``, unless its prompt sets one."""
    num_inference_steps: int = 50
    """N, steps of a frame from noise to data; a clip takes at most 2 N evaluations."""
    guidance: float | None = None
    """Scale of classifier-free guidance on the velocity; None is off."""
    rate_guidance: float | None = None
    """Guidance scale on the insertion rate, in log space; None is off."""
    insertion: str = "thinning"
    """Insertion rule: ``thinning``, ``bernoulli`` or ``poisson``."""
    max_frames: int = 64
    """Cap on latent frames of a clip, context included."""
    num_frames: int | None = None
    """Latent frames of a clip, context included, for a run with a prescribed delay law; None otherwise."""
    cache_refresh: int | None = None
    """After the clock has ended, cache the keys and values of finished frames and recompute them only every this many
    steps (``generation.kv_cache``); None computes every frame in every step."""
    batch_size: int = 16
    """Clips sampled at once; a clip does not depend on it."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; None uses the size of the training clips."""

    def __post_init__(self) -> None:
        """Check ranges and contradictions, before anything is loaded.

        Raises:
            ConfigError: Naming the option.
            DataError: If a context file cannot be read, or an item is not an image or video.
        """
        task_number(self.task)
        for name, rule in _RULES.items():
            value = getattr(self, name)
            rule.check(f"`{name}`", value)
            if isinstance(value, Integral):
                object.__setattr__(self, name, int(value))  # also of numpy, whose integers JSON does not take
        check_context(self.task, self.sources(), self.kept_frames())

    def sources(self) -> list[ContextSource]:
        """The context items as sources."""
        return context_sources(self.context)

    def kept_frames(self) -> tuple[int, ...] | None:
        """``keep`` sorted, without duplicates."""
        return None if self.keep is None else tuple(sorted({int(frame) for frame in self.keep}))

    def prompts(self) -> list[Prompt]:
        """Prompts that clips cycle over; empty for clips without a prompt."""
        if self.prompt is None:
            return []
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [Prompt(text=item) if isinstance(item, str) else item for item in given]

    def class_word(self) -> str | None:
        """The class as a string: number or name, ``null`` for none; None to cycle over all."""
        if self.class_label is None:
            return "null" if self.sources() else None
        return str(self.class_label)
