"""Streams that record the order of what they are given, and copy as late as the events allow."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from torch import Tensor


class FakeStreams:
    """Two streams, "compute" and "copy". What is computed happens at once. A copy happens only when the
    computing stream or the host waits for an event behind it: data that nobody waited for is not there.

    log: what was asked for, in order.
    """

    asynchronous = True
    copy = "copy"

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self._queue: list[tuple[Tensor, Tensor] | int] = []
        self._events = 0
        self._lock = threading.RLock()

    def current(self) -> str:
        return "compute"

    def record(self, stream: str) -> int:
        with self._lock:
            self._events += 1
            self.log.append(("record", stream, self._events))
            if stream == "copy":
                self._queue.append(self._events)
            return self._events

    def wait(self, stream: str, event: int) -> None:
        with self._lock:
            self.log.append(("wait", stream, event))
            if stream == "compute":
                self._run_to(event)

    def finish(self, event: int) -> None:
        with self._lock:
            self.log.append(("finish", threading.current_thread().name, event))
            self._run_to(event)

    def move(self, target: Tensor, source: Tensor) -> None:
        with self._lock:
            self.log.append(("move", source.nbytes))
            self._queue.append((target, source))

    def thread(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _run_to(self, event: int) -> None:
        if event not in self._queue:
            return  # it has happened, or belongs to the computing stream
        while self._queue:
            item = self._queue.pop(0)
            if item == event:
                return
            if isinstance(item, tuple):
                item[0].copy_(item[1])
