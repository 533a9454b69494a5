"""The public functions of a decoder layer's small fused ops; reached as `peftkern.functional.glu` and so
on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import glu as _glu
from ..ops import rms_norm as _rms_norm
from ..ops import rope as _rope

__all__ = ["add_rms_norm", "glu", "rms_norm", "rope"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check_float(name: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: got {value.dtype}, expected float32, bfloat16 or float16")


def glu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """A gated linear unit's elementwise part: h = act(gate) * up.

    Computed in fp32 and rounded once; PyTorch's `act(gate) * up` rounds act(gate) to the dtype before it
    multiplies, so that in 16 bits the two differ by that rounding, and this one is nearer to the exact value.
    On the CPU act errs by at most 3 ulp of fp32 (silu from -87 up), 5 (gelu from -5 up; 12 at -12.9) and 6
    (gelu_tanh from -2 up; 200 at -10, where it is 1e-37), tested.

    Args:
        gate, up: [..., I], one shape, dtype (fp32, bf16, fp16) and device. Rows are read where they lie if
            the last dimension is
            contiguous: the halves of one [..., 2 I] tensor are not copied.
        activation: "silu" (SwiGLU), "gelu" (GEGLU, by the error function) or "gelu_tanh".
    Returns: [..., I] in their dtype, contiguous. Saved for backward: gate and up; the activation is computed
    again.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: GLU Variants Improve Transformer (Shazeer, 2020), section 2; GELUs (Hendrycks and Gimpel, 2016),
    section 2.

    >>> gate, up = torch.randn(2, 5, 2 * 96).chunk(2, dim=-1)
    >>> glu(gate, up, activation="gelu_tanh").shape
    torch.Size([2, 5, 96])
    """
    _check_float("gate", gate)
    if activation not in _glu.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {_glu.ACTIVATIONS}")
    if gate.dim() == 0:
        raise ValueError("gate: got a scalar, expected [..., I]")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"up: got {up.dtype} {tuple(up.shape)} on {up.device}, expected gate's {gate.dtype} "
            f"{tuple(gate.shape)} on {gate.device}"
        )
    return _glu.glu(gate, up, activation)


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
    _check_float("x", x)
    _check_float("weight", weight)
    if cast not in _rms_norm.CASTS:
        raise ValueError(f"cast: got {cast!r}, expected one of {_rms_norm.CASTS}")
    if offset != 0.0 and cast != "gemma":
        raise ValueError(f'offset: got {offset} with cast={cast!r}, expected 0.0; only cast="gemma" has one')
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., N] with N of at least 1")
    if tuple(weight.shape) != (x.shape[-1],) or weight.device != x.device:
        got = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"weight: got {got}, expected [{x.shape[-1]}] on {x.device}")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys: x cos + rotate_half(x) sin, where rotate_half([x1, x2])
    = [-x2, x1].

    Computed in fp32 and rounded once; PyTorch's own arithmetic in 16 bits rounds three times.

    Args:
        q: [B, Hq, S, D], fp32, bf16 or fp16, any strides; k: [B, Hk, S, D], q's dtype. Usually transposed
            views of [B, S, H * D].
        cos, sin: [B or 1, S, Dr], one dtype of the three; Dr is even and at most D, elements of q and k from
            Dr on are copied (partial rotation). They get no gradient.
    Returns: rotated q and k, in their shapes and dtype, lying in memory as q and k do ([B, S, H, D] or [B, H,
    S, D]), so that the reshape
        after attention needs no copy; the gradients do as well. Saved for backward: cos and sin.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: RoFormer (Su et al., 2021), section 3.2; the order of elements is GPT-NeoX's.

    >>> q, k = torch.randn(2, 7, 4, 16).transpose(1, 2), torch.randn(2, 7, 2, 16).transpose(1, 2)
    >>> angles = torch.rand(1, 7, 16)
    >>> [tuple(x.shape) for x in rope(q, k, angles.cos(), angles.sin())]
    [(2, 4, 7, 16), (2, 2, 7, 16)]
    """
    for name, value in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        _check_float(name, value)
        if value.device != q.device:
            raise ValueError(f"{name}: is on {value.device}, q is on {q.device}; move one of them")
    _check_heads(q, k)
    b, _, s, d = q.shape
    if (
        cos.dim() != 3
        or cos.shape[0] not in (1, b)
        or cos.shape[1] != s
        or cos.shape[2] > d
        or cos.shape[2] % 2
    ):
        raise ValueError(
            f"cos: got shape {tuple(cos.shape)}, expected [{b} or 1, {s}, an even number up to {d}]"
        )
    if (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
        raise ValueError(
            f"sin: got {sin.dtype} {tuple(sin.shape)}, expected cos's {cos.dtype} {tuple(cos.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos, sin: require grad, but angles get none here; detach them")
    return _rope.rope(q, k, cos, sin)


def _check_heads(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [batch, heads, seq, dim]")
    b, _, s, d = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (b, s, d):
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected [{b}, heads, {s}, {d}]")
    if k.dtype != q.dtype:
        raise ValueError(f"k: got {k.dtype}, q is {q.dtype}; both must have one dtype")
