"""What is in memory all the time: weights, adapters, optimizer state, the driver's own; and what lies on the
host."""

from __future__ import annotations

import math

from ..sliced_quantize import staging_bytes
from .base_bytes import base_bytes, packed_bytes
from .budgets import Limits
from .cards import GIB
from .ledger import PHASES, Part
from .options import RunOptions
from .shapes import LinearShape, Shape
from .shards import bucket_part, divided, loading_part
from .step import Step

__all__ = [
    "BLOCK",
    "adapter_elements",
    "base_bytes",
    "fixed_parts",
    "host_parts",
    "loading_bytes",
    "packed_bytes",
    "total",
]

BLOCK = 64 << 20  # a block of pinned memory: peftkern.memory.store
_PROCESS = 2 * GIB  # torch, transformers, tokenizer and data: an assumption
_SMALL = 4096  # elements below which bitsandbytes keeps fp32 states
_COUNT = "counted: tests/memory"
_STEP = ("forward", "loss", "mlp_backward", "attention_backward")


def adapter_elements(shape: Shape, options: RunOptions) -> int:
    """Trained elements: r (n + k) of each linear, of DoRA its n magnitudes too; or those of bottlenecks, or
    of a prefix."""
    return sum(_trained(shape, options))


def fixed_parts(step: Step) -> list[Part]:
    """Parts on the device that do not depend on the tokens."""
    shape, options, card = step.shape, step.options, step.card
    parts = [*_weights(shape, options)]
    elements = adapter_elements(shape, options)
    if elements:
        kind = f"{elements:,} elements × {options.adapter_bytes} B"
        parts.append(
            Part("adapters", elements * options.adapter_bytes, formula=kind, source=_COUNT, group="adapters")
        )
        parts.append(_optimizer_state(shape, options, elements))
        if options.optimizer == "adamw" and step.card.is_gpu:
            parts.append(
                Part(
                    "optimizer's temporaries",
                    4 * elements,
                    phases=("optimizer",),
                    formula="4 B × elements",
                    source="torch's foreach AdamW: one square root of a state",
                    group="optimizer",
                )
            )
    parts += [bucket_part(step)] if options.replicas > 1 else []
    if card.is_gpu:
        parts.append(
            Part(
                "CUDA context and kernels",
                card.context,
                formula="0.45 GiB",
                source="an assumption: 0.3 to 0.6",
                group="driver",
                allocator=False,
            )
        )
        parts.append(
            Part(
                "cuBLAS workspaces",
                card.blas_workspace,
                formula="2 × 8.1 MiB, from sm_90 on 2 × 32 MiB",
                source="CublasHandlePool: forward's thread and autograd's",
                group="driver",
            )
        )
    parts.append(
        Part(
            "a tensor being quantized",
            loading_bytes(shape, options),
            phases=("load",),
            formula="a slice of 1 M elements, absmax of the largest tensor in fp32",
            source=_COUNT,
            group="scratch",
        )
    )
    parts = [part for part in parts if part.nbytes]
    return divided(step, parts) if options.cards > 1 else parts


def loading_bytes(shape: Shape, options: RunOptions) -> int:
    """Bytes beside the result while the largest linear is quantized from slices: peftkern.memory.loading."""
    if not options.four_bit:
        return 0
    numel = max((one.n * one.k for one in shape.linears), default=0)
    return staging_bytes(numel, options.dtype_bytes, nested=options.nested, blocksize=options.blocksize)


def _weights(shape: Shape, options: RunOptions) -> list[Part]:
    packed, maxima = base_bytes(shape, options)
    e, found = options.dtype_bytes, []
    bits = "½ B" if options.four_bit else f"{e} B"
    if options.layers_on_host:
        slots = min(options.layer_slots, shape.layers)
        each = (packed + maxima) // shape.layers
        found.append(
            Part("streamed layers", slots * each, formula=f"{slots} slots × a layer", group="weights")
        )
    else:
        formula = f"{shape.layer_weights:,} weights × {bits}"
        found.append(Part("packed weights", packed, formula=formula, source=_COUNT, group="weights"))
        kind = "1 B + 4/256 B a block" if options.nested else "4 B a block"
        found.append(
            Part(
                "block maxima",
                maxima,
                formula=f"{kind} of {options.blocksize}",
                source=_COUNT,
                group="weights",
            )
        )
    table = shape.embedding * e
    if shape.tied:
        found.append(
            Part("embedding and head (tied)", table, formula="V·H", source=_COUNT, group="embedding, head")
        )
    else:
        found.append(Part("head", table, formula="V·H", source=_COUNT, group="embedding, head"))
        if not options.embedding_on_host:
            found.append(Part("embedding", table, formula="V·H", source=_COUNT, group="embedding, head"))
    formula = f"{shape.other:,} × {e} B"
    found.append(
        Part("norms, biases and the rest", shape.other * e, formula=formula, source=_COUNT, group="weights")
    )
    return found


def _optimizer_state(shape: Shape, options: RunOptions, elements: int) -> Part:
    if options.optimizer == "adamw":
        nbytes, formula = 2 * options.adapter_bytes * elements, f"2 × {options.adapter_bytes} B × elements"
    else:
        small = sum(count for count in _trained(shape, options) if count < _SMALL)
        blocks = math.ceil((elements - small) / 256)
        nbytes = 8 * small + 2 * (elements - small) + 2 * 4 * blocks
        formula = "2 × (1 B + 4/256 B) × elements; 8 B of tensors under 4,096"
    paged = options.optimizer.startswith("paged")
    source = "bitsandbytes; " + ("managed memory, which may move to the host" if paged else _COUNT)
    name = f"optimizer state ({options.optimizer})"
    return Part(name, nbytes, formula=formula, source=source, group="optimizer", allocator=not paged)


def _trained(shape: Shape, options: RunOptions) -> list[int]:
    """Elements of each trained tensor."""
    made = options.bottleneck
    layer = [] if made is None else made.tensors(shape.hidden) * len(made.places)
    layer += [count for linear in shape.linears for count in _tensors(linear, options)]
    prefix = 2 * options.prefix * shape.layers * shape.kv_heads * shape.head_dim
    return layer * shape.layers + ([prefix] if prefix else [])


def _tensors(linear: LinearShape, options: RunOptions) -> list[int]:
    """Elements of each trained tensor of a linear."""
    rank = options.rank_of(linear.name)
    sizes = [rank * linear.k, rank * linear.n] + ([linear.n] if options.dora else [])
    return sizes * linear.count if rank else []


def host_parts(step: Step, limits: Limits) -> list[Part]:
    """Parts in pinned and pageable memory and on the disk. What should be pinned is pageable beyond the
    limit."""
    shape, options = step.shape, step.options
    found = [
        Part("process and libraries", _PROCESS, "host", formula="2 GiB", source="an assumption", group="host")
    ]
    found += [loading_part(step)] if options.cards > 1 else []
    room = limits.pinned if step.card.is_gpu else 0
    if options.layers_on_host:
        streamed = sum(base_bytes(shape, options))
        tier = "pinned" if streamed <= room else "host"
        room -= streamed if tier == "pinned" else 0
        found.append(Part("packed layers", streamed, tier, formula="all layers", group="host"))
    if options.embedding_on_host and not shape.tied:
        table = shape.embedding * options.dtype_bytes
        found.append(Part("embedding", table, "host", formula="V·H", group="host"))
    disk = options.on_disk(shape.layers)
    away = (options.away(shape.layers) - disk) * step.h
    blocks = min(math.ceil(away / BLOCK), max(room, 0) // BLOCK) * BLOCK
    names = f"{options.away(shape.layers) - disk} layers' inputs × h, in blocks of 64 MiB"
    for tier, nbytes in (("pinned", blocks), ("host", max(away - blocks, 0)), ("disk", disk * step.h)):
        if nbytes:
            formula = f"{disk} layers' inputs × h" if tier == "disk" else names
            found.append(Part("checkpoints", nbytes, tier, _STEP, formula, "counted: the store", "host"))
    return found


def total(parts: list[Part], *tiers: str) -> int:
    """Bytes of these tiers together, in their fullest phase."""
    return max(
        sum(part.nbytes for part in parts if part.tier in tiers and phase in part.phases) for phase in PHASES
    )
