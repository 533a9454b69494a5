"""What the processes of the tests of --fit compute; each sets what a launcher would have told it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Iterator
from typing import Any

from torch import distributed, nn

from peftkern import memory
from peftkern.finetune import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.fitting import Fit, choose_fit, install_fit
from peftkern.memory import Tier, ddp, shard
from peftkern.memory.planner.budgets import Limits
from peftkern.memory.planner.cards import CPU
from peftkern.memory.planner.options import RunOptions
from peftkern.memory.planner.shapes import shape_of

from ..memory.sharded import ROWS, adapted, furthest, rows_of, step

LIMITS = Limits(1 << 40, 1 << 30, 0, 1 << 30)


@contextlib.contextmanager
def launched(rank: int) -> Iterator[None]:
    """As torchrun does it, on one machine."""
    count = str(distributed.get_world_size())
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    try:
        yield
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]


def choices(rank: int, options: dict[str, Any], of_ranks: list[dict[str, Any]]) -> tuple[Any, ...]:
    """What a process gets that has its own budgets and lengths: options and limits, or the refusal; and what
    it printed. of_ranks: its `length`, and options of the configuration beside `options`."""
    mine = dict(of_ranks[rank])
    length = mine.pop("length")
    config = FinetuneConfig(**(options | mine)).resolved()
    told = io.StringIO()
    with launched(rank), contextlib.redirect_stderr(told):
        try:
            fit = choose_fit(config, options["model"], [length], packed=False)
        except InputError as error:
            return None, str(error), told.getvalue()
    return fit.options.to_dict(), dataclasses.asdict(fit.limits), told.getvalue()


def chosen_for(name: str) -> RunOptions:
    """Options as the planner may choose them, by what is named."""
    pieces: dict[str, Any] = {
        "whole": {"checkpointing": False},
        "tiers": {"keep_layers": 1, "disk_layers": 1, "mlp_tile": 8, "rebuild_norms": True},
        "host": {"keep_layers": 1, "layers_on_host": True, "embedding_on_host": True},
    }
    return RunOptions(length=12, rank=4, dtype_bytes=4, kv_groups=True, **pieces[name])


def installed(name: str) -> tuple[nn.Module, list[Any]]:
    """A patched model with that choice on it, and its handles; small tensors go the ways of large ones."""
    memory.layers_on_host = functools.partial(memory.host_layers.layers_on_host, min_bytes=1)
    memory.CheckpointStore = functools.partial(memory.store.CheckpointStore, min_tokens=1, min_elements=1)
    model, options = adapted("patched"), chosen_for(name)
    shape = shape_of(model.get_base_model().config)
    return model, install_fit(model, Fit(shape, options, LIMITS, CPU))


def gradient_errors(rank: int, names: list[str], way: str) -> dict[str, Any]:
    """How far the gradients with each choice are from those of one process with none, under `ddp` or `shard`;
    and the bytes that went to the file."""
    expected, found = step(adapted(""), ROWS), {}
    for name in names:
        with launched(rank):
            model, handles = installed(name)
        if way == "shard":
            shard(model)
        wrapped = ddp(model) if way == "ddp" else model
        found[name] = max(furthest(step(wrapped, rows_of(rank)), expected) for _ in range(2))
        stores = [handle.store for handle in handles if hasattr(handle, "store")]
        found[f"{name}: file"] = sum(store.peak[Tier.DISK] for store in stores)
    return found


def refused_in_shards(rank: int) -> list[str]:
    """What `shard` says of a model with layers, or an embedding, on the host."""
    told = []
    for put in (functools.partial(memory.layers_on_host, min_bytes=1), memory.embedding_on_host):
        model = adapted("patched")
        with put(model, device="cpu"):
            try:
                shard(model)
            except ValueError as error:
                told.append(str(error))
    return told


def bucket_bytes(rank: int) -> tuple[int, int]:
    """Bytes that a count finds of DistributedDataParallel, before and after two steps beside the gradients;
    and the planner's."""
    from peftkern.memory.count import MemoryCount
    from peftkern.memory.planner.parts import fixed_parts
    from peftkern.memory.planner.step import Step

    model = adapted("")
    with MemoryCount() as count:
        wrapped = ddp(model, gradient_as_bucket_view=False)
        for _ in range(2):
            wrapped(input_ids=rows_of(rank), labels=rows_of(rank), use_cache=False).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    options = RunOptions(rank=4, replicas=distributed.get_world_size())
    parts = fixed_parts(Step(shape_of(model.get_base_model().config), options, CPU))
    (planned,) = [part.nbytes for part in parts if part.name == "gradients' buckets"]
    return count.current - gradients, planned
