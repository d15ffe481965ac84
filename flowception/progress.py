"""What a job says while it runs: progress as a bar on a terminal or plain lines in a log, and the package's log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def show_log() -> None:
    """Print what the package logs, such as which attention backend was chosen and why, from INFO on."""
    logger = logging.getLogger("flowception")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = _ToPresentStdout()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


class _ToPresentStdout(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stdout`` is when something is logged: another stream while output is captured."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


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
