"""Mutants: named faults in the code, each with the tests that must detect it.

A mutant replaces exact pieces of source that must occur exactly once in their file, so that a mutant of changed code
fails instead of going stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Edit:
    """One exact replacement."""

    path: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Apply the replacement in the copy at ``root``; the old source must occur exactly once."""
        file = root / self.path
        text = file.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.path} holds {self.old!r} {text.count(self.old)} times; a mutant needs it exactly once: "
                "bring tests/mutants up to date"
            )
        file.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Mutant:
    """A named fault and the tests that must detect it."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    """pytest node ids, the cheapest that suffice; without parameters, all cases of a test run."""


def mutant(name: str, tests: str | tuple[str, ...], *edits: tuple[str, str, str]) -> Mutant:
    """Make a mutant from ``(path under flowception, old, new)`` and tests under ``tests``."""
    node_ids = (tests,) if isinstance(tests, str) else tests
    changed = tuple(Edit(f"flowception/{path}", old, new) for path, old, new in edits)
    return Mutant(name, changed, tuple(f"tests/{node_id}" for node_id in node_ids))
