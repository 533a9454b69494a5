"""The MLP's part of the schedule: whole, tiled over the tokens, or of DoRA's separate linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bottleneck import Branches
from .ledger import Ledger
from .scratch import Member

if TYPE_CHECKING:
    from .step import Step

__all__ = ["MLP"]


class MLP:
    """gate, up, their product and down for one batch; see `schedule`."""

    def __init__(self, step: Step, ledger: Ledger, branches: Branches) -> None:
        self.step, self.ledger, self.branches = step, ledger, branches
        tile = step.options.mlp_tile
        self.tile = min(tile, step.m) if tile else None

    @property
    def tiled(self) -> bool:
        return self.tile is not None

    @property
    def down(self) -> Member:
        """The down projection; a mixture's experts are taken as one."""
        shape, options = self.step.shape, self.step.options
        found = self.step.members("down")
        return (
            found[0]
            if found
            else Member(shape.hidden, shape.intermediate, options.rank_of("down_proj"), not options.four_bit)
        )

    def of_tile(self, nbytes: int) -> int:
        """A tile's share of what a whole batch takes."""
        return nbytes * self.tile // self.step.m

    def saved(self) -> dict[str, int]:
        """The names and bytes of what is kept for backward, without the input."""
        step = self.step
        if self.tiled:
            return {"n2": step.h if self.keeps_input() else 0}
        pieces = {"n2": step.h if self.keeps_input() else 0}
        pieces |= {"gate": step.i, "up": step.i, "xa_gate_up": step.xa("gate_up"), "xa_down": step.xa("down")}
        if step.options.dora:
            pieces |= {"u_gate_up": 2 * step.i, "act": step.i, "product": step.i, "u_down": step.h}
        return pieces

    def saved_bytes(self) -> int:
        """Beside the input."""
        return sum(nbytes for name, nbytes in self.saved().items() if name != "n2")

    def keeps_input(self) -> bool:
        """Whether the second norm's output is saved: tiles need it in any case, to be computed again."""
        tiled = self.tiled and not self.step.options.rebuild_norms
        return tiled or self.step.keeps_norm("gate_up")

    def again(self) -> bool:
        """Whether it is computed again."""
        return self.step.again("gate_up") or (self.tiled and self.step.options.rebuild_norms)

    def release(self) -> None:
        self.ledger.free(*self.saved())

    def gradients(self, part: str) -> None:
        """Those of a part's adapters; of later batches they are added to what is there."""
        step = self.step
        if step.options.accumulation == 1:
            total = self.ledger.bytes_of("gradients") + step.gradient(part)
            self.ledger.keep("gradients", total, "adapters' elements", "gradients")

    def forward(self, phase: str, saved: bool) -> None:
        """n2 -> mlp_y, with a bottleneck's branch, then x_next = s + mlp_y."""
        step, ledger = self.step, self.ledger
        if self.tiled:
            self._tiled_forward(phase)
        else:
            self._whole_forward(phase, saved)
        if not self.branches.outside:
            self.branches.forward(phase, "mlp", saved=saved)
        if phase == "forward":
            ledger.make(phase, "residual", x_next=(step.h, "h"))
        if saved and not self.keeps_input():
            ledger.free("n2")

    def _whole_forward(self, phase: str, saved: bool) -> None:
        step, ledger, dora = self.step, self.ledger, self.step.options.dora
        scratch = step.ops.forward(step.members("gate_up"), step.m), "a slab of decoded weights"
        u = {"u_gate_up": (2 * step.i, "2i")} if dora else {}
        pieces = {"gate": (step.i, "i"), "up": (step.i, "i"), "xa_gate_up": (step.xa("gate_up"), "r each")}
        ledger.make(phase, "gate, up", scratch=scratch, **pieces, **u)
        if dora:
            if not saved:
                ledger.free("u_gate_up", "xa_gate_up")
            ledger.make(phase, "activation", act=(step.i, "i"))
            if not saved:
                ledger.free("gate")
        ledger.make(phase, "product", product=(step.i, "i"))
        if dora and not saved:
            ledger.free("act", "up")
        scratch = step.ops.forward(step.members("down"), step.m), "a slab of decoded weights"
        u = {"u_down": (step.h, "h")} if dora else {}
        ledger.make(phase, "down", scratch=scratch, mlp_y=(step.h, "h"), xa_down=(step.xa("down"), "r"), **u)
        if not dora or not saved:
            ledger.free("product")
        if not saved:
            ledger.free("gate", "up", "xa_gate_up", "xa_down", "u_down")

    def _tiled_forward(self, phase: str) -> None:
        step, ledger = self.step, self.ledger
        behind = self.branches.has("mlp") and not self.branches.outside
        # Computed again up to the MLP's input, the tiles run in its backward; an adapter behind wants them.
        if phase == "mlp_backward" and not behind:
            ledger.make(phase, "the MLP's place", mlp_y=(step.h, "h"))
            return
        tile = self.of_tile(3 * step.i + step.h + step.xa("gate_up") + step.xa("down"))
        rows = self.tile
        slab = max(
            step.ops.forward(step.members("gate_up"), rows), step.ops.forward(step.members("down"), rows)
        )
        ledger.make(
            phase, "a tile of the MLP", scratch=(tile + slab, "tile·(3i + h) and a slab"), mlp_y=(step.h, "h")
        )

    def backward(self) -> None:
        """dx, the gradient of mlp_y -> dn2, that of n2; what was saved goes."""
        if not self.branches.outside:
            self.branches.backward("mlp")
        if self.tiled:
            self._tiled_backward()
        elif self.step.options.dora:
            self._separate_backward()
        else:
            self._whole_backward()
        self.ledger.free("d_mlp")

    def _whole_backward(self) -> None:
        step, ledger, phase = self.step, self.ledger, "mlp_backward"
        if step.reads("down"):
            self.gradients("down")
            inside = step.ops.glu_backward(self.down, step.m)
        else:  # the product's gradient is an operator's result, which stays
            slab = step.ops.backward([self.down], step.m), "a slab"
            ledger.make(phase, "down", scratch=slab, d_product=(step.i, "i"))
            inside = 0
        scratch = inside, "the product, its gradient, a slab, partial sums"
        ledger.make(phase, "down and product", scratch=scratch, d_gate=(step.i, "i"), d_up=(step.i, "i"))
        if self.again():
            ledger.make(phase, "second norm again", n2=(step.h, "h"))
        scratch = step.ops.backward(step.members("gate_up"), step.m), "a slab and partial sums"
        self.gradients("gate_up")
        ledger.make(phase, "gate, up", scratch=scratch, dn2=(step.h, "h"))
        ledger.free("n2", "gate", "up", "xa_gate_up", "xa_down", "d_gate", "d_up", "d_product")

    def _separate_backward(self) -> None:
        """DoRA: torch's activation and product between the linears."""
        step, ledger, phase = self.step, self.ledger, "mlp_backward"
        scratch = step.ops.backward(step.members("down"), step.m), "a slab and partial sums"
        self.gradients("down")
        ledger.make(phase, "down", scratch=scratch, d_product=(step.i, "i"))
        ledger.free("product", "u_down", "xa_down")
        ledger.make(phase, "product", d_act=(step.i, "i"), d_up=(step.i, "i"))
        ledger.free("up", "act", "d_product")
        ledger.make(phase, "activation", d_gate=(step.i, "i"))
        ledger.free("gate", "d_act")
        scratch = step.ops.backward(step.members("gate_up"), step.m), "a slab and partial sums"
        self.gradients("gate_up")
        ledger.make(phase, "gate, up", scratch=scratch, dn2=(step.h, "h"))
        ledger.free("n2", "u_gate_up", "xa_gate_up", "d_gate", "d_up")

    def _tiled_backward(self) -> None:
        step, ledger, phase, rows = self.step, self.ledger, "mlp_backward", self.tile
        adapters = step.gradient("gate_up") + step.gradient("down")
        # Of DoRA's separate linears the fullest moment is that of the product's gradients.
        inner = self.of_tile(8 * step.i + step.h) if step.options.dora else self._inner_backward(rows)
        tile = self.of_tile(step.xa("gate_up") + step.xa("down")) + inner + 2 * adapters
        if self.again():
            ledger.make(phase, "second norm again", n2=(step.h, "h"))
        ledger.make(
            phase, "a tile of the MLP", scratch=(tile, "tile·(h + 6i), sums of dA and dB"), dn2=(step.h, "h")
        )
        self.gradients("gate_up")
        self.gradients("down")
        ledger.free("n2")

    def _inner_backward(self, rows: int) -> int:
        """A tile's gate, up and output, and the fullest of: computing them, the product's and down's
        gradients, gate's and up's.
        """
        step = self.step
        again = self.of_tile(step.i) + step.ops.forward(step.members("gate_up"), rows)
        at_down = self.of_tile(2 * step.i) + step.ops.glu_backward(self.down, rows)
        product = 0
        if not step.reads("down"):  # the product's gradient is an operator's result, which stays
            product = self.of_tile(step.i)
            at_down = product + max(self.of_tile(2 * step.i), step.ops.backward([self.down], rows))
        gates = step.ops.backward(step.members("gate_up"), rows)
        at_gates = product + self.of_tile(2 * step.i + step.h) + gates
        return self.of_tile(2 * step.i + step.h) + max(again, at_down, at_gates)
