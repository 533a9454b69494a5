"""The sizes, in bytes of one batch, that the schedule of a training step is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...ops.linear import cpu_rows
from .cards import Card
from .options import RunOptions
from .scratch import Member, Operators
from .shapes import LinearShape, Shape

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """What the schedule needs of a run, in bytes of one batch."""

    shape: Shape
    options: RunOptions
    card: Card
    isa: str | None = None

    @property
    def m(self) -> int:
        return self.options.tokens

    @property
    def e(self) -> int:
        return self.options.dtype_bytes

    @cached_property
    def ops(self) -> Operators:
        return Operators(self.card, self.e, self.options.adapter_bytes, self.isa)

    @cached_property
    def h(self) -> int:
        return self.m * self.shape.hidden * self.e

    @cached_property
    def q(self) -> int:
        return self.m * self.shape.heads * self.shape.head_dim * self.e

    @cached_property
    def k(self) -> int:
        return self.m * self.shape.kv_heads * self.shape.head_dim * self.e

    @cached_property
    def i(self) -> int:
        return self.m * self.shape.intermediate * self.e * max(self.shape.active_experts, 1)

    @property
    def rstd(self) -> int:
        return 4 * self.m

    @property
    def by_tiles(self) -> bool:
        """Whether attention without a fused kernel runs by tiles: `attention_by_groups`."""
        return self.shape.dense_attention and self.options.kv_groups

    @property
    def masked(self) -> bool:
        """Whether SDPA is given a mask: for a window no longer than the sequence, for rows of several
        documents, and for rows that are filled up."""
        window, (_, length) = self.shape.window, self.options.row
        apart = self.options.rows != "whole"
        return (apart or (window is not None and length >= window)) and not self.shape.dense_attention

    @property
    def square(self) -> int:
        """Elements of a mask: of each row the square of its tokens."""
        rows, length = self.options.row
        return rows * length**2

    @property
    def own_attention(self) -> bool:
        """Whether this CPU runs our kernel of attention in bf16 tiles, which reads a mask as it is."""
        return not self.card.is_gpu and self.e == 2 and bool(self.isa) and cpu_rows.row(self.isa).attention

    @property
    def starts_late(self) -> bool:
        """Whether no gradient goes as far as the first layer's input: its first trained part is not what
        reads that input's norm."""
        return self.options.bottleneck is not None or bool(self.options.prefix)

    @property
    def lse(self) -> int:
        """A row's log-sum-exp; by tiles its greatest score and its sum; eager attention keeps neither."""
        numbers = (2 if self.by_tiles else 0) if self.shape.dense_attention else 1
        return 4 * numbers * self.m * self.shape.heads

    def xa(self, part: str) -> int:
        """xa of all adapters of a part of the layer."""
        return sum(4 * self.m * self.options.rank_of(one.name) for one in self.shape.of(part))

    def reads(self, part: str) -> bool:
        """Whether an adapter of the part wants its input again in backward."""
        return any(self.options.rank_of(one.name) for one in self.shape.of(part))

    def members(self, part: str) -> list[Member]:
        """The part's linears as its operator sees them."""
        rank, dense = self.options.rank_of, not self.options.four_bit
        return [Member(one.n, one.k, rank(one.name), dense) for one in self.shape.of(part)]

    def keeps_norm(self, part: str) -> bool:
        """Whether the norm's output that a part reads is saved, for the part's adapters or a bottleneck."""
        made, place = self.options.bottleneck, {"qkv": "attention", "gate_up": "mlp"}.get(part)
        branch = made is not None and made.reads == "input" and place in made.places
        return branch or (self.reads(part) and not self.options.rebuild_norms)

    def again(self, part: str) -> bool:
        """Whether that norm's output is computed again."""
        return self.reads(part) and self.options.rebuild_norms

    def gradient(self, part: str) -> int:
        """Of all adapters of a part."""
        return sum(self.adapter(linear) for linear in self.shape.of(part))

    def adapter(self, linear: LinearShape) -> int:
        """Bytes of a linear's adapters: A, B, and of DoRA the magnitude."""
        rank = self.options.rank_of(linear.name)
        elements = rank * (linear.n + linear.k) + (linear.n if rank and self.options.dora else 0)
        return elements * self.options.adapter_bytes * linear.count

    @property
    def branch_gradient(self) -> int:
        """Of the bottleneck at one place."""
        made = self.options.bottleneck
        return 0 if made is None else sum(made.tensors(self.shape.hidden)) * self.options.adapter_bytes

    @property
    def prefix_elements(self) -> int:
        """Of a layer: keys and values of the prefix. All layers' are one parameter."""
        return 2 * self.options.prefix * self.shape.kv_heads * self.shape.head_dim

    @property
    def layer_gradient(self) -> int:
        prefix = self.prefix_elements * self.options.adapter_bytes
        places = 0 if self.options.bottleneck is None else len(self.options.bottleneck.places)
        return (
            sum(self.adapter(linear) for linear in self.shape.linears)
            + places * self.branch_gradient
            + prefix
        )

    @property
    def rope(self) -> int:
        """cos and sin."""
        return 2 * self.options.row[1] * self.shape.head_dim * self.e

    @property
    def ids(self) -> int:
        """Token ids, labels, positions and shifted labels, int64."""
        return 32 * self.m

    @property
    def fused_qkv(self) -> bool:
        return len(self.shape.of("qkv")) == 1

    @property
    def saves_input(self) -> bool:
        """Whether the first layer's input is part of the graph."""
        return self.options.checkpointing
