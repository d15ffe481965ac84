"""Rules for configuration values: what each accepts, and the message for what it rejects."""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from flowception.errors import ConfigError
from flowception.ranges import check_ranges, integer, list_of, number, one_of

NAN, INF = float("nan"), float("inf")
SHARE = number(at_least=0, below=1)


@dataclass
class Settings:
    lr: float = 0.1
    steps: int = 3


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (number(), -1e9), (number(above=0), 1), (number(above=0), np.float32(0.5)), (SHARE, 0), (SHARE, 0.999),
        (number(above=0, at_most=1), 1), (number(at_most=1), -5.0), (integer(at_least=0), 0),
        (integer(at_least=1, at_most=3), 3), (integer(at_least=1), np.int64(2)), (one_of(("a", "b")), "b"),
        (one_of({"a": 1}), "a"), (list_of(SHARE), [0.5]), (list_of(SHARE, length=2), [0, 0.5]),
        (integer(at_least=1).or_null("off"), None), (integer(at_least=1).or_null("off"), 1),
        (number(above=0, infinite=True), INF),
    ],
)  # fmt: skip
def test_valid_values_pass(rule, value):
    rule.check("key", value)


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        (number(above=0), -1, "key must be a number > 0, got -1"),
        (number(above=0), np.float64(-0.5), "key must be a number > 0, got -0.5"),
        (number(above=0), 0.0, "key must be a number > 0, got 0.0"),
        (number(at_least=1), 0.5, "key must be a number >= 1, got 0.5"),
        (number(at_most=1), 2, "key must be a number <= 1, got 2"),
        (number(below=1), 1, "key must be a number < 1, got 1"),
        (SHARE, 1, "key must be a number in [0, 1), got 1"),
        (number(above=0, at_most=1), 0, "key must be a number in (0, 1], got 0"),
        (number(), NAN, "key must be a number, got nan"),
        (number(above=0), INF, "key must be a number > 0, got inf"),
        (number(at_most=0), -INF, "key must be a number <= 0, got -inf"),
        (number(), True, "key must be a number, got true"),
        (number(), 10**400, f"key must be a number, got {10**400}"),
        (number(above=0, infinite=True), NAN, "key must be a number > 0, got nan"),
        (number(above=0, infinite=True), -INF, "key must be a number > 0, got -inf"),
        (number(), "fast", "key must be a number, got 'fast'"),
        (number(), None, "key must be a number, got null"),
        (number(above=0, note="GB/s"), 0, "key must be a number > 0 (GB/s), got 0"),
        (integer(at_least=1), 0, "key must be an integer >= 1, got 0"),
        (integer(at_least=1), 1.5, "key must be an integer >= 1, got 1.5"),
        (integer(at_least=1), NAN, "key must be an integer >= 1, got nan"),
        (integer(at_least=1), True, "key must be an integer >= 1, got true"),
        (integer(at_least=0, at_most=3), 4, "key must be an integer from 0 to 3, got 4"),
        (integer(at_least=1, note="1 is off"), 0, "key must be an integer >= 1 (1 is off), got 0"),
        (integer(at_least=1).or_null("off"), 0, "key must be an integer >= 1, or null for off, got 0"),
        (one_of(("a", "b")), "c", "key must be one of a, b, got 'c'"),
        (one_of({"a": 1}), None, "key must be one of a, got null"),
        (list_of(integer(at_least=0)), [], "key must be a list of 1 or more, each an integer >= 0, got []"),
        (list_of(integer(at_least=0)), [0, -1], "key must be a list of 1 or more, each an integer >= 0, got [0, -1]"),
        (list_of(integer(at_least=0)), 3, "key must be a list of 1 or more, each an integer >= 0, got 3"),
        (list_of(integer(at_least=0), length=2), "12", "key must be a list of 2, each an integer >= 0, got '12'"),
        (list_of(SHARE, length=2), [0.5], "key must be a list of 2, each a number in [0, 1), got [0.5]"),
    ],
)
def test_invalid_values_are_rejected_in_one_form(rule, value, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        rule.check("key", value)


def test_the_first_wrong_field_is_named_with_its_section():
    rules = {"lr": number(above=0), "steps": integer(at_least=1)}
    check_ranges("optim", Settings(), rules)
    with pytest.raises(ConfigError, match=r"^optim\.lr must be"):
        check_ranges("optim", Settings(lr=0, steps=0), rules)
    with pytest.raises(ConfigError, match=r"^steps must be"):
        check_ranges("", Settings(steps=0), rules)
