"""The same run in several processes, as torchrun or `accelerate launch` starts them: process 0 opens the
folder and writes, all train. The process group is accelerate's, the gradients' average
DistributedDataParallel's, or FSDP2's with `--shard`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .folder import RunFolder, open_run

if TYPE_CHECKING:
    from .config import FinetuneConfig

__all__ = [
    "FollowedFolder",
    "is_first",
    "local_process_count",
    "lost_processes",
    "open_shared",
    "process_count",
    "process_group",
    "say",
]

# What a process says of whose peer is gone: gloo, NCCL, and the store that they meet at.
_LOST = ("gloo", "connection closed", "connection reset", "nccl", "tcpstore", "broken pipe", "timed out")


def process_count() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_process_count() -> int:
    """How many of them are on this machine, and share its host memory and disk; all, where the launcher does
    not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return process_count() == 1 or int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Print on the standard error output, once for all processes."""
    if is_first():
        print(text, file=sys.stderr)


@contextlib.contextmanager
def process_group(config: FinetuneConfig) -> Iterator[None]:
    """Inside, the processes can talk to each other; nothing happens where there is one.

    Raises InputError for options that only one process can serve.
    """
    if process_count() == 1:
        if config.shard:
            raise InputError(
                "--shard divides the model among several processes, and there is one: start them with"
                " `torchrun --standalone --nproc-per-node 2 -m -- peftkern finetune …`"
            )
        yield
        return
    _require_served(config)
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _require_served(config: FinetuneConfig) -> None:
    """What reads or writes by itself in the middle of a step, or changes what is trained under
    DistributedDataParallel."""
    for name in ("row_losses", "source_data", "unfreeze", "compare"):
        if getattr(config, name):
            raise InputError(
                f"--{name.replace('_', '-')} works in one process only, and the launcher has started"
                f" {process_count()}: drop it, or run `peftkern finetune` without the launcher"
            )


class FollowedFolder(RunFolder):
    """The run's folder as all processes but the first see it: they read there and write nothing."""

    def begin(self, record: dict[str, Any]) -> None:
        """Process 0 writes it."""

    def discard_unless_begun(self) -> None:
        """Process 0 does."""

    def list_files(self, files: Any) -> None:
        """Process 0 does."""

    def settle(self) -> None:
        """Process 0 does."""


@contextlib.contextmanager
def open_shared(config: FinetuneConfig) -> Iterator[RunFolder]:
    """As `open_run`, by process 0 for all; the others fail where it cannot, and wait for its end."""
    if process_count() == 1:
        with open_run(config) as folder:
            yield folder
        return
    import torch

    if is_first():
        with contextlib.ExitStack() as stack:
            work = [None]
            try:
                folder = stack.enter_context(open_run(config))
                work = [str(folder.work)]
            finally:
                torch.distributed.broadcast_object_list(work)
            yield folder
        torch.distributed.barrier()
        return
    work = [None]
    torch.distributed.broadcast_object_list(work)
    if work[0] is None:
        raise InputError("process 0 could not open the run's folder, as its message says")
    yield FollowedFolder(Path(config.output), Path(work[0]))
    torch.distributed.barrier()


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn what torch raises where another process has ended into a ConnectionError that says what to do."""
    try:
        yield
    except Exception as error:
        if process_count() == 1 or not _is_loss(error):
            raise
        raise ConnectionError(
            f"process {os.environ.get('RANK')} of {process_count()} lost contact with another one, which has"
            " ended or does not answer (its own message, if it had one, is above). The last checkpoint "
            "is whole:"
            f" the same command with --resume goes on from it. ({_first_line(error)})"
        ) from error


def _is_loss(error: BaseException | None) -> bool:
    from torch import distributed

    while error is not None:
        kinds = (distributed.DistError, RuntimeError, ConnectionError)
        if isinstance(error, kinds) and any(word in str(error).lower() for word in _LOST):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
