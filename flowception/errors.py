"""Every error that Flowception raises on purpose.

A message says what was wrong, the value seen, and what to do about it. Catching ``FlowceptionError`` catches
them all; anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class FlowceptionError(Exception):
    """Base class of every error raised on purpose."""

    on_all_ranks = False
    """Whether every rank of a job raised this same error; then rank 0 alone prints it."""


class ConfigError(FlowceptionError):
    """A configuration value is unknown, out of range, or contradicts another."""


class DataError(FlowceptionError):
    """Input data (videos, shards, an index) cannot be used."""


class PlanError(FlowceptionError):
    """The plan of an epoch cannot be made, or is not the plan that a run began with."""


class CodecError(FlowceptionError):
    """A codec cannot encode or decode what it was given."""


class CheckpointError(FlowceptionError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


class CheckpointUnreadableError(CheckpointError):
    """A checkpoint cannot be read here and now; whether it is whole is not known, so none is taken in its place."""


class GuardError(FlowceptionError):
    """Training cannot go on by itself: step after step is refused by its guards."""


class RunDirectoryError(FlowceptionError):
    """A run directory is in use by another job or was made by another configuration."""


class MissingDependencyError(FlowceptionError):
    """An optional package is needed and not installed."""


class Problems:
    """What is wrong, collected so that a person hears of all of it at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, problem: object) -> None:
        """Note a problem; one that is known already is not noted again."""
        if str(problem) not in self.found:
            self.found.append(str(problem))

    @contextmanager
    def collected(self) -> Iterator[None]:
        """An error that Flowception raises inside is noted, and the code after goes on."""
        try:
            yield
        except FlowceptionError as error:
            self.add(error)

    def raise_if_any(self) -> None:
        """Raise what was found as one error.

        Raises:
            ConfigError: The problem, or a numbered list of them.
        """
        if len(self.found) == 1:
            raise ConfigError(self.found[0])
        if self.found:
            numbered = " ".join(f"[{number}] {text}" for number, text in enumerate(self.found, 1))
            raise ConfigError(f"{len(self.found)} problems: {numbered}")


def require(module: str, *, extra: str | None = None) -> ModuleType:
    """Import an optional package, or say which one to install.

    Args:
        module: Dotted name of the module to import.
        extra: Name of Flowception's extra that brings the package, if there is one.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: If the import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        command = f"pip install 'flowception[{extra}]'" if extra else f"pip install {package}"
        raise MissingDependencyError(
            f"{module} is required but cannot be imported ({error}); install it: {command}"
        ) from error
