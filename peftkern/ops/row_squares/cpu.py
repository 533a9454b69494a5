"""Launcher of the native CPU kernel."""

from __future__ import annotations

from torch import Tensor

from ...runtime.native import address, empty, native, weight_view
from . import reference

__all__ = ["row_squares"]


def row_squares(weight: Tensor, *quant_and_sizes: object) -> Tensor:
    """As the reference, to which a dense weight is left: by torch's own norm an untrained adapter changes no
    bit of the base's output."""
    *quant, n, k = quant_and_sizes
    if quant[0] is None:
        return reference.row_squares(weight, *quant_and_sizes)
    weight, squares = weight.contiguous(), empty(n)
    native().row_squares(weight_view(weight, quant, n, k), address(squares))
    return squares
