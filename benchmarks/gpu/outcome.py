"""Checks, their outcomes, and how outcomes are saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowception.files import write_atomically

PASS, MEASURED, NEEDS_GPU, FAIL = "pass", "measured", "needs a GPU", "FAIL"
VERDICTS = (PASS, MEASURED, NEEDS_GPU, FAIL)


class CheckFailed(Exception):
    """A check failed; ``figures`` are its measurements so far."""

    def __init__(self, reason: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.figures = dict(figures or {})


@dataclass
class Outcome:
    """The outcome of a check."""

    verdict: str
    summary: str
    """Its key figures, or the reason, in one line."""
    figures: dict[str, Any] = field(default_factory=dict)
    """All figures, JSON-serializable."""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")
        self.summary = " ".join(self.summary.split())

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """The outcome in a file; None if there is no file."""
        return cls(**json.loads(path.read_text())) if path.is_file() else None


@dataclass(frozen=True)
class Check:
    """One of the twelve checks."""

    number: int
    name: str
    what: str
    """What it does and when it passes, for the page."""
    function: str
    """``module:function``; takes a ``Scene`` and returns an ``Outcome``."""
    limit_s: float
    """Seconds after which it is killed."""
    reserved_s: float = 0.0
    """Seconds that earlier checks must leave for it."""


@dataclass
class Record:
    """A finished check."""

    number: int
    name: str
    seconds: float
    outcome: Outcome

    def line(self) -> str:
        """One line for the console."""
        return (
            f"{self.number:>2} {self.name:<24} {self.outcome.verdict:<11} {self.outcome.summary} ({self.seconds:.1f} s)"
        )
