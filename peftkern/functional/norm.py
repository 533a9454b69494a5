"""RMSNorm, alone and behind a residual addition."""

from __future__ import annotations

from torch import Tensor

from ..ops import rms_norm as _rms_norm
from . import checks

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, offset: float = 0.0, cast: str = "llama"
) -> Tensor:
    """RMSNorm over the last dimension: x^ = x / sqrt(mean(x^2) + eps) in fp32, then the weight.

    cast="llama": weight * T(x^), x^ rounded to x's dtype T before it meets the weight, as transformers'
    LlamaRMSNorm has it; y is of the promoted dtype. cast="gemma": T(x^ * (offset + weight)), all of it in
    fp32.

    Args:
        x: [..., N], fp32, bf16 or fp16. Rows are read where they lie if the last dimension is contiguous.
        weight: [N], fp32, bf16 or fp16; may require grad, which comes in its dtype, summed in a fixed order.
        eps: added to the mean of squares.
        offset: added to the weight; 1.0 in Gemma. Only with cast="gemma".
        cast: "llama" or "gemma".
    Returns: [..., N], contiguous. Saved for backward: x, the weight, and 1 / sqrt(...) in fp32 [M].
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019), section 4.

    >>> rms_norm(torch.randn(2, 5, 64), torch.zeros(64), offset=1.0, cast="gemma").shape
    torch.Size([2, 5, 64])
    """
    _check_norm(x, weight, offset, cast)
    return _rms_norm.rms_norm(x, weight, float(eps), float(offset), cast)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
) -> tuple[Tensor, Tensor]:
    """A residual stream's addition and the RMSNorm behind it: s = residual + x, rounded to the dtype as torch
    does; y = rms_norm(s).

    In backward the gradient that the stream brings for s is added where the norm's is still in fp32, and
    rounded once: what autograd does with two roundings and a pass more. It is the gradient of x and of
    residual both.

    Args:
        x: [..., N], fp32, bf16 or fp16: what a block adds to the stream.
        residual: of x's shape, dtype and device: the stream. None: x is the stream itself (a layer's first
            norm), and s is x; what is gained is the backward pass.
        weight, eps, offset, cast: as in `rms_norm`.
    Returns: y [..., N], contiguous, of `rms_norm`'s dtype, and s [..., N] of x's. Either may be left unused.
    Saved for backward: s, the
        weight, and 1 / sqrt(...) in fp32 [M].
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019), section 4; pre-norm residuals,
    Xiong et al., 2020, section 3.

    >>> y, s = add_rms_norm(torch.ones(2, 5, 64), torch.ones(2, 5, 64), torch.ones(64))
    >>> s.unique().tolist(), y.shape
    ([2.0], torch.Size([2, 5, 64]))
    """
    _check_norm(x, weight, offset, cast)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (
        x.shape,
        x.dtype,
        x.device,
    ):
        got = f"{residual.dtype} {tuple(residual.shape)} on {residual.device}"
        raise ValueError(f"residual: got {got}, expected x's {x.dtype} {tuple(x.shape)} on {x.device}")
    return _rms_norm.add_rms_norm(x, residual, weight, float(eps), float(offset), cast)


def _check_norm(x: Tensor, weight: Tensor, offset: float, cast: str) -> None:
    checks.floating("x", x)
    checks.floating("weight", weight)
    if cast not in _rms_norm.CASTS:
        raise ValueError(f"cast: got {cast!r}, expected one of {_rms_norm.CASTS}")
    if offset != 0.0 and cast != "gemma":
        raise ValueError(f'offset: got {offset} with cast={cast!r}, expected 0.0; only cast="gemma" has one')
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., N] with N of at least 1")
    if tuple(weight.shape) != (x.shape[-1],) or weight.device != x.device:
        got = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight: got {got}, expected [{x.shape[-1]}] on {x.device}")
