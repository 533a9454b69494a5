"""Signals that ask a run to end: training finishes its batch and saves, everything else ends at once and in
order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Interrupted", "StopSignals", "stop_signals"]

# Ctrl-C, a scheduler's end of time, a closed terminal, and what schedulers send ahead on request (Slurm's
# --signal=USR1@60).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_WAITING = b"\nStopping after this batch, then saving a checkpoint. Once more: stop at once.\n"


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `status` is the exit status that says so (128 + its number: SIGTERM 143, SIGINT
    130)."""

    def __init__(
        self,
        number: int,
        saved: str = "the same command with --resume goes on from the last checkpoint, if there is one",
    ) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}: {saved}")
        self.number = number
        self.status = 128 + number


class StopSignals:
    """What `stop_signals` yields: whether a signal came, and whether it may wait."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a first signal is noted in `number`, for the block to look at; outside, it raises
        Interrupted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all of them; from the second one on, a signal acts as if we were not here."""
        self.number = number
        for other in _SIGNALS:
            if signal.getsignal(other) == self.handle:
                signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
        if not self._deferred:
            raise Interrupted(number)
        os.write(2, _WAITING)  # print could be interrupted in the middle of itself


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle the signals that would end this process, in the main thread; handlers that the program has set
    itself stay."""
    stop = StopSignals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
