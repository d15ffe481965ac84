"""Stop on a signal: set a flag, finish the step, save, exit.

Install this before importing torch. That import takes seconds, during which the default action of SIGUSR1 would kill
the process.
"""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STOPPED = 85
"""Exit code of a run stopped by a signal, whether or not its save succeeded; a batch script requeues on it."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether a signal requested this process to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> StopFlag:
        """Install handlers for SIGTERM and SIGUSR1."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        """Whether to stop."""
        return self.signal_name is not None
