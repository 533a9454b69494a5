"""Public functions: they validate, flatten and dispatch; the ops below them trust what they get."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import nf4
from ..formats.nf4 import NF4Weight
from ..ops import dequantize as _dequantize
from ..ops import lora_add as _lora_add
from ..ops import qlora_linear as _qlora_linear
from ..ops import quantize as _quantize
from . import checks
from .attention import prefix_attention, prefix_gated
from .blocks import add_rms_norm, glu, rms_norm, rope
from .dora import dora_group, dora_linear, dora_norm, row_squares
from .group import Adapter, Member, qlora_group
from .loss import linear_cross_entropy
from .mlp import gated_mlp, gated_mlp_packed

__all__ = [
    "Adapter",
    "Member",
    "add_rms_norm",
    "dequantize_4bit",
    "dora_group",
    "dora_linear",
    "dora_norm",
    "gated_mlp",
    "gated_mlp_packed",
    "glu",
    "linear_4bit",
    "linear_cross_entropy",
    "lora_add",
    "prefix_attention",
    "prefix_gated",
    "qlora_group",
    "qlora_linear",
    "quantize_4bit",
    "rms_norm",
    "row_squares",
    "rope",
]


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    check_finite: bool = False,
) -> NF4Weight:
    """Quantize a dense weight to NF4 or FP4.

    code[i] = nearest of 16 values to w[i] / absmax(block of i); with `nested`, the absmax is itself quantized
    to 8 bits in blocks of 256.

    Args:
        weight: fp32, bf16 or fp16, any shape, any layout (read in row-major order).
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, 32 ... 4096, a power of two.
        nested: "double quantization" of the absmax.
        check_finite: raise where the weight holds NaN or inf (costs one pass; the codes of such a block are
            otherwise undefined).
    Returns: NF4Weight; `packed` is uint8 [(numel+1)//2, 1].
    Raises: TypeError for another dtype, ValueError for a quant type, blocksize or value out of range.
    Source: QLoRA (Dettmers et al., 2023), sections 3 and appendix E.

    >>> w = quantize_4bit(torch.randn(128, 64))
    >>> w.dequantize().shape
    torch.Size([128, 64])
    """
    if weight.dtype not in checks.FLOATS:
        raise TypeError(f"weight: got {weight.dtype}, expected float32, bfloat16 or float16")
    if blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {nf4.BLOCKSIZES}")
    if weight.numel() == 0:
        raise ValueError(f"weight: is empty, shape {tuple(weight.shape)}")
    code = nf4.code_tensor(quant_type, weight.device)
    if check_finite and not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: holds NaN or inf; repair the checkpoint before quantizing it")
    packed, absmax = _quantize.quantize_4bit(weight.detach().contiguous(), blocksize, code)
    fields = dict(
        packed=packed,
        code=code,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        blocksize=blocksize,
        quant_type=quant_type,
    )
    if not nested:
        return NF4Weight(**fields, absmax=absmax)
    offset = absmax.mean()
    absmax_code = nf4.dynamic_map(weight.device)
    absmax_8bit, nested_absmax = _quantize.quantize_absmax(absmax - offset, absmax_code, 256)
    return NF4Weight(
        **fields,
        absmax_8bit=absmax_8bit,
        absmax_code=absmax_code,
        nested_absmax=nested_absmax,
        absmax_offset=offset,
    )


def dequantize_4bit(
    weight: NF4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense weight: T(fp32(code) * fp32(absmax)), one rounding, bit for bit.

    Args:
        weight: NF4Weight.
        dtype: fp32, bf16 or fp16; default: out's, else the dtype it was quantized from.
        out: a contiguous tensor of `weight.shape` to fill, so that a loop need not allocate.
    Returns: Tensor in `weight.shape`; `out` where it is given.
    """
    dtype = dtype or (weight.dtype if out is None else out.dtype)
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
    if out is not None:
        got = (tuple(out.shape), out.dtype, out.device)
        if got != (tuple(weight.shape), dtype, weight.device) or not out.is_contiguous():
            raise ValueError(
                f"out: got {got}, expected contiguous {(tuple(weight.shape), dtype, weight.device)}"
            )
    return _dequantize.dequantize_4bit(weight, dtype, out)


def linear_4bit(x: Tensor, weight: NF4Weight | Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W; the gradients reach x and bias, nothing is saved but the packed
    weight.

    Arguments and errors as in `qlora_linear`.
    """
    return qlora_linear(x, weight, bias)


def qlora_linear(
    x: Tensor,
    weight: NF4Weight | Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear with its trainable low-rank branch: y = x W^T + scaling * drop(x) A^T B^T + bias.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: frozen, NF4Weight of shape [N, K], or dense [N, K] (fp32, bf16, fp16).
        bias: [N] or None; may require grad.
        lora_a: [R, K]; lora_b: [N, R]; both or none; fp32, bf16 or fp16, R from 1 to 256. Gradients come in
            their dtype.
        scaling: lora_alpha / R (rsLoRA: lora_alpha / sqrt(R)).
        dropout_p: in [0, 1]; applied to the low-rank branch's input only, quantized to multiples of 2**-16.
            Pass 0.0 in evaluation.
        seed: int64 [1] on x's device; fixes the dropout mask. Default: drawn from torch's generator, so
            checkpointing and `torch.manual_seed` behave as with torch's own dropout.
    Returns: [..., N] in x's dtype. Saved for backward: x, the packed weight and its absmax, A, B, xa =
    drop(x) A^T [M, R], the seed.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: LoRA (Hu et al., 2021), section 4.1; QLoRA (Dettmers et al., 2023), section 3.

    >>> w = quantize_4bit(torch.randn(96, 64))
    >>> a, b = torch.randn(8, 64, requires_grad=True), torch.zeros(96, 8, requires_grad=True)
    >>> qlora_linear(torch.randn(2, 5, 64), w, lora_a=a, lora_b=b, scaling=2.0).shape
    torch.Size([2, 5, 96])
    """
    shape, device = checks.weight_shape(weight)
    checks.activation(x, shape, device)
    n, k = shape
    checks.vector("bias", bias, n, device)
    checks.adapter(lora_a, lora_b, n, k, device)
    checks.dropout(dropout_p, seed, x.device)
    seed = checks.seed(x, 0.0 if lora_a is None else dropout_p, seed)
    flat = x.reshape(-1, k) if k else checks.flat(x)
    y = _qlora_linear.qlora_linear(flat, weight, bias, lora_a, lora_b, float(scaling), float(dropout_p), seed)
    return y.reshape(*x.shape[:-1], n)


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The trainable low-rank branch alone, on top of any base layer's output: y + scaling * drop(x) A^T B^T +
    bias.

    Args:
        y: [..., N], what the base layer gave for x; its gradient is the result's. Not written.
        x: [..., K], of y's dtype: fp32, bf16 or fp16.
        lora_a, lora_b, scaling, dropout_p, seed: as in `qlora_linear`.
        bias: [N] or None, already scaled; may require grad.
    Returns: [..., N] in y's dtype. Saved for backward: x, A, B, xa = drop(x) A^T [M, R], the seed.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: LoRA (Hu et al., 2021), section 4.1.

    >>> base = torch.nn.Linear(64, 96)
    >>> x, a = torch.randn(2, 5, 64), torch.randn(8, 64, requires_grad=True)
    >>> b = torch.zeros(96, 8, requires_grad=True)
    >>> lora_add(base(x), x, a, b, scaling=2.0).shape
    torch.Size([2, 5, 96])
    """
    if lora_a is None or lora_b is None:
        raise ValueError(f"{'lora_a' if lora_a is None else 'lora_b'}: is missing; both are needed")
    if y.dtype != x.dtype:
        raise TypeError(f"y: got {y.dtype}, x is {x.dtype}; both must have one dtype")
    if y.dim() == 0 or y.shape[:-1] != x.shape[:-1] or y.device != x.device:
        raise ValueError(
            f"y: got {tuple(y.shape)} on {y.device}, expected {(*x.shape[:-1], 'N')} on {x.device}, as "
            "the base layer gave it"
        )
    n, k = y.shape[-1], lora_a.shape[-1]
    checks.activation(x, (n, k), lora_a.device)
    checks.vector("bias", bias, n, x.device)
    checks.adapter(lora_a, lora_b, n, k, x.device)
    seed = checks.seed(x, dropout_p, seed)
    out = _lora_add.lora_add(
        checks.flat(y), checks.flat(x), lora_a, lora_b, bias, float(scaling), float(dropout_p), seed
    )
    return out.reshape(y.shape)
