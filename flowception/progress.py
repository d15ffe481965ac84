"""What a job says while it runs: progress as a bar on a terminal or plain lines in a log, and the package's log.

Modules of the package log and do not print; what is printed is a command's output. ``show_log`` puts the log on the
console. It is called once a process: by a command, or for a rank of a training job by ``init_distributed``.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Literal, Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


EVERY_RANK = {"every_rank": True}
"""For a line that its own rank alone can say: ``logger.info(..., extra=EVERY_RANK)``."""


def show_log(rank: int = 0, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print what the package logs, from INFO on; warnings begin with ``WARNING:``, errors with ``ERROR:``.

    Ranks other than 0 print errors, and lines logged with ``EVERY_RANK``: of all others each rank logs the same.

    Args:
        rank: This process among those of a job.
        stream: Where to; a command whose output is read by programs keeps its log out of it.
    """
    console = _Console(stream)
    console.addFilter(lambda record: rank == 0 or record.levelno >= logging.ERROR or hasattr(record, "every_rank"))
    logger = logging.getLogger("flowception")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Console)] + [console]
    logger.propagate = False  # else a package that configures the root logger prints every line once more


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what the stream is when something is logged: another one while output is captured."""

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
    """Counts work up to a total that may turn out smaller."""

    def __init__(self, total: int, label: str) -> None:
        """Begin.

        Args:
            total: Units of work expected.
            label: What is being done.
        """
        self.total, self.label, self.done = total, label, 0
        self._began = self._last_line = time.monotonic()
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
        seconds = time.monotonic() - self._began
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
