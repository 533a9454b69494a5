"""Runs a function in several gloo processes: torch and the libraries are imported once, in a server from
which the processes are forked."""

from __future__ import annotations

import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

__all__ = ["run_processes"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run_processes(
    function: Callable[..., Any], count: int, folder: Path, *arguments: Any, seconds: float = 120
) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of `count` processes of one gloo group.

    Raises AssertionError with the traceback of the first process that fails, or after `seconds`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.memory.sharded"])
    results = context.Queue()
    store = folder / f"store-{time.monotonic_ns()}"
    processes = [
        context.Process(
            target=_run, args=(function, rank, count, str(store), results, arguments), daemon=True
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < count:
            rank, value, error = results.get(timeout=max(0.01, deadline - time.monotonic()))
            assert error is None, f"process {rank}: {error}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(
            f"after {seconds} s only processes {sorted(found)} of {count} were done"
        ) from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(found) == count else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(count)]


def _run(
    function: Callable[..., Any], rank: int, count: int, store: str, results: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(store, count), rank=rank, world_size=count
        )
        value = function(rank, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
