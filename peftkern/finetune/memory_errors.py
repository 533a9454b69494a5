"""What a run says when memory has run out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .config import FinetuneConfig
from .memory import out_of_memory

__all__ = ["memory_errors"]


@contextlib.contextmanager
def memory_errors(config: FinetuneConfig) -> Iterator[None]:
    """Turn every way in which memory runs out into a MemoryError that says what to lower, and what --resume
    allows of it."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        rows = (config.batch_size or 1) * (config.grad_accumulation or 1)
        from .fitting import explanation  # the planner, which only a run out of memory needs

        planned = explanation(config)
        raise MemoryError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}). Go "
            "on with"
            f" --resume and less at a time: --batch-size 1 --grad-accumulation {rows} (now --batch-size"
            f" {config.batch_size} --grad-accumulation {config.grad_accumulation}; the product stays), or"
            " --gradient-checkpointing, or --fit SIZE. Where that does not do, start again with a "
            "lower --seq-length"
            f" (now {config.seq_length}) or --quantization nf4: --overwrite, or another --output"
            + (f". {planned}" if planned else "")
        ) from error
