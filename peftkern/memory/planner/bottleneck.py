"""Bottleneck adapters in the plan: their elements, and what one place makes, keeps and frees in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from .ledger import Ledger
    from .step import Step

__all__ = ["PLACES", "READS", "Bottlenecks", "Branches"]

PLACES = ("attention", "mlp")
READS = ("output", "input", "sum")


@dataclass(frozen=True, kw_only=True)
class Bottlenecks:
    """Bottleneck adapters that are alike in all layers.

    size: their width, R. places: the sublayers of PLACES that have one. reads: what they read, one of READS:
    what the sublayer gives, what it is given, or the stream behind the layer ("sum", of an MLP alone). bias:
    whether the two products have one. scaling: trained elements of a place's scaling, 0 for a number.
    dropout: whether their activation has it.
    """

    size: int
    places: tuple[str, ...] = PLACES
    reads: str = "output"
    bias: bool = True
    scaling: int = 0
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size: got {self.size}, expected a width of at least 1")
        if not self.places or not set(self.places) <= set(PLACES):
            raise InputError(f"places: got {self.places}, expected some of {', '.join(PLACES)}")
        if self.reads not in READS:
            raise InputError(f"reads: got {self.reads!r}, expected one of {', '.join(READS)}")
        if self.reads == "sum" and self.places != ("mlp",):
            raise InputError(f"reads: got 'sum' for {', '.join(self.places)}, expected it of 'mlp' alone")

    def tensors(self, hidden: int) -> list[int]:
        """Elements of each trained tensor of one place: down and up, their biases, the scaling."""
        biases = [self.size, hidden] if self.bias else []
        return [self.size * hidden] * 2 + biases + ([self.scaling] if self.scaling else [])


class Branches:
    """The adapters of a layer in the schedule. Letters: h a hidden state, z [tokens, R] in the activations'
    dtype."""

    def __init__(self, step: Step, ledger: Ledger) -> None:
        self.step, self.ledger, self.made = step, ledger, step.options.bottleneck

    @property
    def outside(self) -> bool:
        """Whether the adapter stands around the layer, and so outside its checkpoint."""
        return self.made is not None and self.made.reads == "sum"

    def has(self, place: str) -> bool:
        return self.made is not None and place in self.made.places

    def saved(self, *places: str) -> dict[str, int]:
        """The names and bytes of what these places, all by default, keep for backward; what they read of a
        norm is not theirs."""
        found: dict[str, int] = {}
        for place in filter(self.has, places or PLACES):
            found[f"z_{place}"] = self._z * (2 if self.made.dropout else 1)
            if self.made.reads != "input":
                found[f"y_{place}"] = self.step.h
        return found

    def saved_bytes(self) -> int:
        return sum(self.saved().values())

    def release(self) -> None:
        self.ledger.free(*self.saved())

    def forward(self, phase: str, place: str, *, saved: bool) -> None:
        """The branch is added onto what the sublayer gave, in a tensor of its own."""
        if not self.has(place):
            return
        step, kept = self.step, self.saved(place)
        # The activation, and the same with a column of ones for the bias.
        inside = self._weight + (2 * self._z + step.m * step.e if self.made.bias else self._z)
        if not saved:
            inside, kept = inside + step.h + self._z * (2 if self.made.dropout else 1), {}
        elif self.made.reads == "input":
            inside += step.h  # the sublayer's own output
        pieces = {name: (nbytes, "h" if name[0] == "y" else "tokens·R") for name, nbytes in kept.items()}
        self.ledger.make(phase, f"the adapter of {place}", scratch=(inside, "tokens·(R + 1)"), **pieces)

    def backward(self, place: str) -> None:
        """The gradient of what the adapter reads. Attention's own backward begins after it: a count takes it
        for the MLP's."""
        if not self.has(place):
            return
        step, ledger = self.step, self.ledger
        if step.options.accumulation == 1:
            total = ledger.bytes_of("gradients") + step.branch_gradient
            ledger.keep("gradients", total, "adapters' elements", "gradients")
        scratch = 2 * self._z + 2 * self._weight, "2·tokens·R"
        pieces = {f"d_{place}": (step.h, "h")}
        ledger.make("mlp_backward", f"the adapter of {place}", scratch=scratch, **pieces)
        ledger.free(*self.saved(place))
        if self.made.reads == "input" and not (place == "mlp" and step.options.mlp_tile):
            ledger.free("n1" if place == "attention" else "n2")  # which frozen linears do not keep

    def end_of_gradient(self, place: str, reads: str) -> None:
        """The gradient that `backward` has made goes, if the adapters read what `reads` says."""
        if self.has(place) and self.made.reads == reads:
            self.ledger.free(f"d_{place}")

    @property
    def _z(self) -> int:
        return self.step.m * self.made.size * self.step.e

    @property
    def _weight(self) -> int:
        """A weight in the activations' dtype."""
        return self.made.size * self.step.shape.hidden * self.step.e
