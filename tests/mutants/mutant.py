"""What a mutant is: a named wrong change of the code, and the tests that must notice it.

A mutant replaces exact pieces of source, each found exactly once in its file, so that a mutant of code that has changed
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
        """Replace in the copy at ``root``; the old source must be there exactly once."""
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
    """A named fault and what must find it."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    """pytest node ids, the cheapest that are enough; without their arguments all of a test's cases run."""


def mutant(name: str, tests: str | tuple[str, ...], *edits: tuple[str, str, str]) -> Mutant:
    """A mutant from ``(path under flowception, old, new)`` and tests under ``tests``."""
    node_ids = (tests,) if isinstance(tests, str) else tests
    changed = tuple(Edit(f"flowception/{path}", old, new) for path, old, new in edits)
    return Mutant(name, changed, tuple(f"tests/{node_id}" for node_id in node_ids))
