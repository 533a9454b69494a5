"""Streams and events as the store and the host layers use them: CUDA's, or none on the CPU."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CpuStreams", "CudaStreams", "Streams", "streams_for"]


class Streams(Protocol):
    """What copies beside the computation need. A stream and an event are whatever the implementation says.

    asynchronous: copies run beside the computation, from and to pinned memory. copy: the side stream.
    """

    asynchronous: bool
    copy: Any

    def current(self) -> Any:
        """The stream that this thread computes on."""

    def record(self, stream: Any) -> Any:
        """An event that happens when all that the stream has been given so far is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let the stream, not the host, wait for the event."""

    def finish(self, event: Any) -> None:
        """Let the host's thread wait for the event. The computing thread never calls this."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream, of which the host does not wait for the end where it is asynchronous."""

    def thread(self) -> AbstractContextManager[Any]:
        """What a thread of its own has to enter before it uses these streams."""


class CpuStreams:
    """There is one stream: the program's order. A copy is done when `move` returns."""

    asynchronous = False
    copy = None

    def current(self) -> None:
        return None

    def record(self, stream: None) -> None:
        return None

    def wait(self, stream: None, event: None) -> None:
        return None

    def finish(self, event: None) -> None:
        return None

    def move(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def thread(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()


class CudaStreams:
    """One side stream of a device for copies in both directions."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.copy = torch.cuda.Stream(self.device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def move(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.copy):
            target.copy_(source, non_blocking=True)

    def thread(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)


def streams_for(device: torch.device | str) -> Streams:
    """The streams of a device; of one that is neither a GPU of CUDA or ROCm nor the CPU, an error."""
    device = torch.device(device)
    if device.type == "cuda":
        return CudaStreams(device)
    if device.type == "cpu":
        return CpuStreams()
    raise ValueError(f"device: got {device}, expected cuda or cpu; pass `streams` for another kind of device")
