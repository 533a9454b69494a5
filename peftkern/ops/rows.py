"""A tensor [..., n] as rows that lie a stride apart: what kernels over the last dimension take, without a
copy where that can be."""

from __future__ import annotations

from torch import Tensor

__all__ = ["out_rows", "rows_of"]


def rows_of(x: Tensor) -> Tensor:
    """[..., n] -> [M, n] whose rows are contiguous and do not overlap; a copy only where no single stride
    describes them."""
    if x.dim() == 2 and x.is_contiguous():
        return x
    n = x.shape[-1]
    flat = x.reshape(x.numel() // n if n else 0, n)
    apart = flat.shape[0] < 2 or flat.stride(0) >= n
    return flat if apart and (n < 2 or flat.stride(1) == 1) else flat.contiguous()


def out_rows(out: Tensor) -> Tensor:
    """The same of a tensor to be written, which cannot be copied."""
    flat = out.view(-1, out.shape[-1]) if out.numel() else out.reshape(0, out.shape[-1])
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        raise ValueError(f"output: got strides {out.stride()}, expected a contiguous last dimension")
    return flat
