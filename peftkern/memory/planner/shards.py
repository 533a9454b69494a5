"""A model in several processes. Divided among cards by FSDP2 (`peftkern.memory.shard`): what of it lies on
each, and what is gathered beside that while a step runs. Whole in each (DistributedDataParallel): the buckets
in which gradients are averaged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from .base_bytes import base_bytes
from .ledger import Part

if TYPE_CHECKING:
    from .options import RunOptions
    from .shapes import Shape
    from .step import Step

__all__ = ["averaged_bytes", "bucket_part", "divided", "gathered_bytes", "loading_part", "replicated_bytes"]

# The layer at work, the next one, and the buffer in which that is gathered.
_GATHERED = 3
_STEP = ("forward", "loss", "mlp_backward", "attention_backward")
_DIVIDED = ("weights", "embedding, head", "adapters", "optimizer")
_SOURCE = "derived: peftkern.memory.shard; counted of weights and adapters: tests/memory"


def divided(step: Step, parts: list[Part]) -> list[Part]:
    """The parts that are there all the time, as each of `options.cards` cards has them."""
    cards, found = step.options.cards, []
    for part in parts:
        if part.group == "scratch":
            continue  # each process quantizes on its host
        if part.group not in _DIVIDED:
            found.append(part)
            continue
        whole = replicated_bytes(step.shape, step.options) if part.name == "block maxima" else 0
        nbytes = math.ceil((part.nbytes - whole) / cards) + whole
        found.append(replace(part, nbytes=nbytes, formula=f"({part.formula}) / {cards}"))
    return [*found, *_gathered(step)]


def replicated_bytes(shape: Shape, options: RunOptions) -> int:
    """Bytes of quantization states that every process holds: codebooks, offsets, second-level maxima."""
    if not options.four_bit:
        return 0
    one = 0
    for linear in shape.linears:
        blocks = math.ceil(linear.n * linear.k / options.blocksize)
        inner = 4 * math.ceil(blocks / 256) + 4 * (256 + 1) if options.nested else 0
        one += (inner + 4 * 16) * linear.count
    return one * shape.layers


def gathered_bytes(step: Step) -> int:
    """Bytes that a card receives in a step: all layers and the head, for the forward and for the backward,
    without its own part; and the gradients that it averages."""
    shape, options = step.shape, step.options
    moved = 2 * (shape.layers * _layer(step) + _head(step)) + shape.layers * step.layer_gradient
    return moved * (options.cards - 1) // options.cards * options.accumulation


def loading_part(step: Step) -> Part:
    """The 4-bit base in a process's host memory, whole before it is divided."""
    shape, options = step.shape, step.options
    tables = shape.embedding * options.dtype_bytes * (1 if shape.tied else 2)
    base = sum(base_bytes(shape, options)) + tables + shape.other * options.dtype_bytes
    return Part("the base as it loads", base, "host", ("load",), "the whole base", _SOURCE, "host")


def bucket_part(step: Step) -> Part:
    """Of DistributedDataParallel: each gradient once more, in the buckets that are sent."""
    nbytes, phases = step.shape.layers * step.layer_gradient, (*_STEP, "optimizer")
    source = "counted: tests/memory"
    return Part("gradients' buckets", nbytes, "device", phases, "adapters' elements", source, "gradients")


def averaged_bytes(step: Step) -> int:
    """Bytes that a replica receives in a step: the gradients, added up and spread in a ring, once for all its
    batches."""
    replicas = step.options.replicas
    return 2 * step.shape.layers * step.layer_gradient * (replicas - 1) // replicas


def _gathered(step: Step) -> list[Part]:
    shape, options = step.shape, step.options
    layer, count = _layer(step), min(_GATHERED, shape.layers)
    gradients = (2 if options.accumulation > 1 else 1) * step.layer_gradient
    table = shape.embedding * options.dtype_bytes
    found = [
        Part("gathered layers", count * layer, phases=_STEP, formula=f"{count} × a layer"),
        Part("gathered head", _head(step), phases=_STEP, formula="V·H"),
        Part("a unit on its way to its shards", max(layer, table), phases=("load",), formula="the largest"),
        Part("gradients being averaged", gradients, phases=_STEP[2:], formula="of a layer's adapters"),
    ]
    return [replace(part, source=_SOURCE, group="gathered") for part in found if part.nbytes]


def _layer(step: Step) -> int:
    """Bytes of a decoder layer, gathered."""
    shape, options = step.shape, step.options
    states = sum(base_bytes(shape, options)) - replicated_bytes(shape, options)
    return (states + shape.other * options.dtype_bytes) // shape.layers + step.layer_gradient


def _head(step: Step) -> int:
    return step.shape.embedding * step.options.dtype_bytes
