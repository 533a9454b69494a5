"""How long a step takes, from a card's stated rates: an expectation whose assumptions are named, not a
measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step import Step

__all__ = ["StepTime", "step_time"]


@dataclass(frozen=True)
class StepTime:
    """seconds: of one step, all its batches; flops: of its products. link_bytes: over PCIe, both directions
    together, and from other cards; disk_bytes: written and read. assumptions: what the seconds rest on.
    """

    seconds: float
    flops: float
    link_bytes: int
    disk_bytes: int
    bound: str
    assumptions: tuple[str, ...]


def step_time(step: Step) -> StepTime:
    """Products at the card's rate, and copies that the products of a layer do not hide."""
    shape, options, card = step.shape, step.options, step.card
    from .parts import adapter_elements, base_bytes
    from .shards import averaged_bytes, gathered_bytes

    m, layers = step.m, shape.layers
    width = shape.heads * shape.head_dim
    linear = 2 * m * shape.layer_weights
    attention = 2 * m * options.row[1] * width * layers  # two products, causal: half of the square
    head = 2 * m * shape.embedding
    adapters = 2 * m * adapter_elements(shape, options)
    forward = linear + attention + adapters
    backward = linear + 2.5 * attention + 2 * adapters
    flops = forward + backward + 3 * head
    if options.checkpointing:
        flops += forward
    flops *= options.accumulation
    seconds = flops / (card.tflops * 1e12)
    disk = options.on_disk(layers)
    copies = 2 * options.away(layers) * step.h * options.accumulation
    packed, maxima = base_bytes(shape, options)
    streamed = 2 * (packed + maxima) * options.accumulation if options.layers_on_host else 0
    looked_up = step.h * options.accumulation if options.embedding_on_host else 0
    on_disk = 2 * disk * step.h * options.accumulation
    rate = card.link * 1e9
    over_link = (copies + streamed) / 2 / rate if rate else 0.0  # each direction has a lane of its own
    from_disk = on_disk / (card.disk * 1e9)
    between = gathered_bytes(step) if options.cards > 1 else averaged_bytes(step)
    over_cards = between / rate if rate else 0.0
    bound, slowest = "products", seconds
    for name, needed in (("PCIe", over_link), ("disk", from_disk), ("the cards' link", over_cards)):
        if needed > slowest:
            bound, slowest = name, needed
    assumptions = [
        f"{card.tflops:g} TFLOP/s of 16-bit products ({card.name}: {card.stated})",
        "causal attention at that rate",
    ]
    if copies or streamed or looked_up:
        assumptions.append(
            f"{card.link:g} GB/s over PCIe each way, hidden behind products where these take longer"
        )
    if between:
        assumptions.append(f"{card.link:g} GB/s from the other cards, hidden behind products likewise")
    if on_disk:
        assumptions.append(f"{card.disk:g} GB/s to and from the disk")
    return StepTime(
        slowest, flops, copies + streamed + looked_up + between, on_disk, bound, tuple(assumptions)
    )
