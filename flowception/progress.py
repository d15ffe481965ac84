"""Console output of a job: progress as a bar on a terminal or as lines in a log, and the package's log.

Modules log and do not print; only a command's output is printed. ``show_log`` sends the log to the console. It is
called once per process: by a command, or by ``init_distributed`` for a rank of a training job.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Literal, Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
_PACKAGES = ("flowception", "data_prep")
EVERY_RANK = {"every_rank": True}
"""For lines that differ between ranks: ``logger.info(..., extra=EVERY_RANK)``."""


def show_log(rank: int = 0, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print the package's log at INFO and above; warnings start with ``WARNING:``, errors with ``ERROR:``.

    Ranks other than 0 print only errors and lines logged with ``EVERY_RANK``, because all other lines are the same on
    every rank.

    Args:
        rank: This process's rank in the job.
        stream: Output stream. Commands whose output is parsed by programs use stderr.
    """
    console = _Console(stream)
    console.addFilter(lambda record: rank == 0 or record.levelno >= logging.ERROR or hasattr(record, "every_rank"))
    for name in _PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Console)] + [console]
        logger.propagate = False  # otherwise a package that configures the root logger prints every line twice


class _Console(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stdout`` or ``sys.stderr``, which differs while output is captured."""

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        self._name_of_stream = stream
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout if self._name_of_stream == "stdout" else sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname}: {message}" if record.levelno >= logging.WARNING else message


class Progress:
    """Progress of work toward a total that may turn out smaller."""

    def __init__(self, total: int, label: str) -> None:
        """Start counting.

        Args:
            total: Expected units of work.
            label: Description of the work.
        """
        self.total, self.label, self.done = total, label, 0
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, desc=label, leave=True) if sys.stderr.isatty() else None

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` units as done."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line(note)

    def _line(self, note: str) -> None:
        share = min(1.0, self.done / max(1, self.total))
        seconds = time.monotonic() - self._started
        print(f"{self.label}: {share:.0%} after {seconds:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(max(0, self.total - self._bar.n))
            self._bar.close()
        elif kind is None:
            self.done = self.total
            self._line("")
