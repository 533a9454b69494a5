"""Launcher of the native CPU kernel."""

from __future__ import annotations

from torch import Tensor

from ...runtime.native import address, dtype_of, native

__all__ = ["rope"]


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, rotated_q: Tensor, rotated_k: Tensor
) -> None:
    """As the reference."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    heads = [
        native().RopeHeads(address(x), address(y), x.shape[1], *x.stride()[:3], *y.stride()[:3])
        for x, y in ((q, rotated_q), (k, rotated_k))
    ]
    angle_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    sizes = (q.shape[0], q.shape[2], q.shape[3])
    native().rope(
        *heads,
        dtype_of(q),
        *sizes,
        address(cos),
        address(sin),
        dtype_of(cos),
        angle_batch,
        cos.shape[2],
        inverse,
    )
