"""On a GPU the product is formed with its gradient, in one launch, where the linear's dx is there before its
x is read: with our own GEMM. cuBLAS' plan reads x in the launch that begins dx, so that the product has a
launch of its own."""

from __future__ import annotations

from torch import Tensor

from ....runtime.replay import replayed
from ...glu import triton as glu
from .. import gpu as single
from .. import tuned
from ..group import gpu as group
from ..group.spec import split_needs
from ..problem import Linear, Needs

__all__ = ["backward"]


class _Product:
    """act(gate) * up as the linear's x; a `single.LateInput`. Its gradient is taken once, by whoever comes
    first."""

    def __init__(self, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
        self.operands, self.grads, self.differentiated = (gate, up, activation), (d_gate, d_up), False

    def before(self) -> Tensor:
        return glu.forward(*self.operands)

    def after(self, dx: Tensor) -> Tensor:
        self.differentiate(dx, dx)  # element by element: the product takes the place of its gradient
        return dx

    def differentiate(self, dx: Tensor, h: Tensor | None = None) -> None:
        if not self.differentiated:
            glu.backward(dx, *self.operands, *self.grads, h)
        self.differentiated = True


@replayed(tuned.settings)
def backward(dy, gate, up, activation, d_gate, d_up, weights, quants, blocksizes, m, k, adapters, xa, needs):
    """As composed of the references; fills d_gate and d_up."""
    lora_a, lora_b, members, rows, scalings, dropout_ps, seeds = adapters
    product = _Product(gate, up, activation, d_gate, d_up)
    if len(members) == 1 and tuple(rows) == (0, m):
        _, (need_bias,), (need_a,), (need_b,) = split_needs(needs, 1, 1)
        adapter = lora_a[0], lora_b[0], scalings[0], dropout_ps[0], seeds[0]
        one = Linear(weights[0], (*quants, *blocksizes), dy.shape[1], k, None, *adapter)
        wanted = Needs(True, need_bias, need_a, need_b)
        dx, *found = single.backward(dy, product, one, xa[0], wanted)
        lists = [[gradient] for gradient in found]
    else:
        rest = weights, quants, blocksizes, m, k, adapters, xa, needs
        dx, *lists = group.backward([dy], product.before(), *rest)
    product.differentiate(dx)
    return dx, *lists
