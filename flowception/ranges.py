"""Range checks of configuration values. All messages have one form.

    check_ranges("optim", self, {"lr": number(above=0), "warmup_steps": integer(at_least=0)})

raises ``optim.lr must be a number > 0, got -1``. NaN and booleans are not numbers here, nor is infinity by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from flowception.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A condition on a value."""

    words: str
    """The condition in words, as in "lr must be ..."."""
    holds: Callable[[Any], bool]
    """The condition as a predicate."""

    def check(self, name: str, value: object) -> None:
        """Check a value.

        Args:
            name: The value's name for the user: its dotted key, or an option such as ``--bandwidth``.
            value: The value.

        Raises:
            ConfigError: If the rule does not hold.
        """
        if not self.holds(value):
            raise ConfigError(f"{name} must be {self.words}, got {shown(value)}")

    def or_null(self, meaning: str) -> Rule:
        """The same rule, but also allowing null, which means ``meaning``."""
        return Rule(f"{self.words}, or null for {meaning}", lambda value: value is None or self.holds(value))


def check_ranges(section: str, config: object, rules: Mapping[str, Rule]) -> None:
    """Check the fields of a configuration.

    Args:
        section: Dotted key of the configuration, such as ``optim``; empty if its keys are top-level.
        config: The dataclass, or any object with these attributes.
        rules: Rules by field, checked in this order.

    Raises:
        ConfigError: For the first field that breaks its rule, with the key, the rule and the value.
    """
    prefix = f"{section}." if section else ""
    for name, rule in rules.items():
        rule.check(prefix + name, getattr(config, name))


def shown(value: object) -> str:
    """A value as YAML writes it, with strings in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    infinite: bool = False,
    note: str = "",
) -> Rule:
    """A finite number, with at most one bound on each side.

    Args:
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        infinite: Whether infinity is allowed too, for a limit that may be off.
        note: Note for the message, in parentheses, such as a unit.
    """
    low, opening = (at_least, "[") if above is None else (above, "(")
    high, closing = (at_most, "]") if below is None else (below, ")")
    words = "a number"
    if low is not None and high is not None:
        words += f" in {opening}{low}, {high}{closing}"
    elif low is not None:
        words += f" {'>' if above is not None else '>='} {low}"
    elif high is not None:
        words += f" {'<' if below is not None else '<='} {high}"

    def holds(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            x = float(value)
        except OverflowError:  # an integer beyond the largest float
            return False
        above_low = low is None or (x > low if above is not None else x >= low)
        below_high = high is None or (x < high if below is not None else x <= high)
        return (math.isfinite(x) or (infinite and math.isinf(x))) and above_low and below_high

    return Rule(words + _in_parentheses(note), holds)


def integer(*, at_least: int, at_most: int | None = None, note: str = "") -> Rule:
    """An integer.

    Args:
        at_least: Smallest allowed value.
        at_most: Largest allowed value; None for no bound.
        note: Note for the message, in parentheses, such as a unit.
    """
    words = f"an integer >= {at_least}" if at_most is None else f"an integer from {at_least} to {at_most}"

    def holds(value: Any) -> bool:
        is_integer = isinstance(value, Integral) and not isinstance(value, bool)
        return is_integer and value >= at_least and (at_most is None or value <= at_most)

    return Rule(words + _in_parentheses(note), holds)


def one_of(choices: Sequence[str] | Mapping[str, object]) -> Rule:
    """One of these strings, or a key of this mapping."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in tuple(choices))


def list_of(rule: Rule, *, length: int | None = None) -> Rule:
    """A list whose entries all satisfy ``rule``, with ``length`` entries, or one or more if ``length`` is None."""

    def holds(values: Any) -> bool:
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            return False
        length_is_ok = len(values) > 0 if length is None else len(values) == length
        return length_is_ok and all(rule.holds(value) for value in values)

    return Rule(f"a list of {'1 or more' if length is None else length}, each {rule.words}", holds)


def _in_parentheses(note: str) -> str:
    return f" ({note})" if note else ""
