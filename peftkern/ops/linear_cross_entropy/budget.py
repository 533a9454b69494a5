"""Bytes of logits that may be there at a time, where the caller has a say."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

__all__ = ["given", "logits_bytes"]

_GIVEN: contextvars.ContextVar[int | None] = contextvars.ContextVar("peftkern_logits_bytes", default=None)


@contextlib.contextmanager
def logits_bytes(budget: int | None) -> Iterator[None]:
    """Let the op's calls inside have at most this many bytes of logits at a time, 16 rows at least; None: as
    they choose."""
    token = _GIVEN.set(budget)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given() -> int | None:
    """What `logits_bytes` says around this call."""
    return _GIVEN.get()
