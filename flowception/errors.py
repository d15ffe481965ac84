"""All errors that Flowception raises on purpose.

A message says what was wrong, the value, and what to do. Catching ``FlowceptionError`` catches them all; any other
exception is a bug in Flowception.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class FlowceptionError(Exception):
    """Base class of every error raised on purpose."""

    on_all_ranks = False
    """Whether every rank of a job raised this same error; if so, only rank 0 prints it."""


class ConfigError(FlowceptionError):
    """A configuration value is unknown, out of range, or contradicts another."""


class DataError(FlowceptionError):
    """Input data (videos, shards, an index) cannot be used."""


class PlanError(FlowceptionError):
    """The plan of an epoch cannot be made, or differs from the plan that a run started with."""


class CodecError(FlowceptionError):
    """A codec cannot be loaded, or cannot encode or decode its input."""


class CheckpointError(FlowceptionError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


class CheckpointUnreadableError(CheckpointError):
    """A checkpoint cannot be read right now. It may still be valid, so no other checkpoint is used instead."""


class GuardError(FlowceptionError):
    """Training cannot continue on its own: its guards reject step after step."""


class RunDirectoryError(FlowceptionError):
    """A run directory is in use by another job or was made with another configuration."""


class MissingDependencyError(FlowceptionError):
    """A required optional package is not installed."""


class Problems:
    """Collects problems, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: object) -> None:
        """Record a problem, unless it is already recorded."""
        if str(problem) not in self.found:
            self.found.append(str(problem))

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Record a ``FlowceptionError`` raised inside the block instead of raising it."""
        try:
            yield
        except FlowceptionError as error:
            self.add(error)

    def raise_if_any(self) -> None:
        """Raise all recorded problems as one error.

        Raises:
            ConfigError: With the problem, or a numbered list of problems.
        """
        if len(self.found) == 1:
            raise ConfigError(self.found[0])
        if self.found:
            numbered = " ".join(f"[{number}] {text}" for number, text in enumerate(self.found, 1))
            raise ConfigError(f"{len(self.found)} problems: {numbered}")


def require(module: str, *, extra: str | None = None) -> ModuleType:
    """Import an optional package.

    Args:
        module: Dotted name of the module to import.
        extra: Flowception's extra that installs the package, if there is one.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: If the import fails; the message has the command that installs the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        command = f"pip install 'flowception[{extra}]'" if extra else f"pip install {package}"
        raise MissingDependencyError(
            f"{module} is required but cannot be imported ({error}); install it: {command}"
        ) from error
