"""Public functions: they validate, flatten and dispatch; the ops below them trust what they get."""

from __future__ import annotations

import torch
from torch import Tensor

from . import nf4
from .nf4 import NF4Weight
from .ops import dequantize as _dequantize
from .ops import qlora_linear as _qlora_linear
from .ops import quantize as _quantize

__all__ = ["dequantize_4bit", "linear_4bit", "linear_cross_entropy", "qlora_linear", "quantize_4bit"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_4bit(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True, check_finite: bool = False
) -> NF4Weight:
    """Quantize a dense weight to NF4 or FP4.

    code[i] = nearest of 16 values to w[i] / absmax(block of i); with `nested`, the absmax is itself quantized to 8 bits in blocks of 256.

    Args:
        weight: fp32, bf16 or fp16, any shape, any layout (read in row-major order).
        quant_type: "nf4" or "fp4".
        blocksize: elements per absmax, 32 ... 4096, a power of two.
        nested: "double quantization" of the absmax.
        check_finite: raise where the weight holds NaN or inf (costs one pass; the codes of such a block are otherwise undefined).
    Returns: NF4Weight; `packed` is uint8 [(numel+1)//2, 1].
    Raises: TypeError for another dtype, ValueError for a quant type, blocksize or value out of range.
    Source: QLoRA (Dettmers et al., 2023), sections 3 and appendix E.

    >>> w = quantize_4bit(torch.randn(128, 64))
    >>> w.dequantize().shape
    torch.Size([128, 64])
    """
    if weight.dtype not in _FLOATS:
        raise TypeError(f"weight: got {weight.dtype}, expected float32, bfloat16 or float16")
    if blocksize not in nf4.BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {nf4.BLOCKSIZES}")
    if weight.numel() == 0:
        raise ValueError(f"weight: is empty, shape {tuple(weight.shape)}")
    code = nf4.code_tensor(quant_type, weight.device)
    if check_finite and not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: holds NaN or inf; repair the checkpoint before quantizing it")
    packed, absmax = _quantize.quantize_4bit(weight.detach().contiguous(), blocksize, code)
    fields = dict(packed=packed, code=code, shape=tuple(weight.shape), dtype=weight.dtype, blocksize=blocksize, quant_type=quant_type)
    if not nested:
        return NF4Weight(**fields, absmax=absmax)
    offset = absmax.mean()
    absmax_code = nf4.dynamic_map(weight.device)
    absmax_8bit, nested_absmax = _quantize.quantize_absmax(absmax - offset, absmax_code, 256)
    return NF4Weight(**fields, absmax_8bit=absmax_8bit, absmax_code=absmax_code, nested_absmax=nested_absmax, absmax_offset=offset)


def dequantize_4bit(weight: NF4Weight, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """The dense weight: T(fp32(code) * fp32(absmax)), one rounding, bit for bit.

    Args:
        weight: NF4Weight.
        dtype: fp32, bf16 or fp16; default: out's, else the dtype it was quantized from.
        out: a contiguous tensor of `weight.shape` to fill, so that a loop need not allocate.
    Returns: Tensor in `weight.shape`; `out` where it is given.
    """
    dtype = dtype or (weight.dtype if out is None else out.dtype)
    if dtype not in _FLOATS:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
    if out is not None:
        got = (tuple(out.shape), out.dtype, out.device)
        if got != (tuple(weight.shape), dtype, weight.device) or not out.is_contiguous():
            raise ValueError(f"out: got {got}, expected contiguous {(tuple(weight.shape), dtype, weight.device)}")
    return _dequantize.dequantize_4bit(weight, dtype, out)


def linear_4bit(x: Tensor, weight: NF4Weight | Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with a frozen W; the gradients reach x and bias, nothing is saved but the packed weight.

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
        lora_a: [R, K]; lora_b: [N, R]; both or none; fp32, bf16 or fp16, R from 1 to 256. Gradients come in their dtype.
        scaling: lora_alpha / R (rsLoRA: lora_alpha / sqrt(R)).
        dropout_p: in [0, 1]; applied to the low-rank branch's input only, quantized to multiples of 2**-16. Pass 0.0 in evaluation.
        seed: int64 [1] on x's device; fixes the dropout mask. Default: drawn from torch's generator, so checkpointing and
            `torch.manual_seed` behave as with torch's own dropout.
    Returns: [..., N] in x's dtype. Saved for backward: x, the packed weight and its absmax, A, B, xa = drop(x) A^T [M, R], the seed.
    Raises: TypeError, ValueError naming the argument, what was got and what was expected.
    Source: LoRA (Hu et al., 2021), section 4.1; QLoRA (Dettmers et al., 2023), section 3.

    >>> w = quantize_4bit(torch.randn(96, 64))
    >>> a, b = torch.randn(8, 64, requires_grad=True), torch.zeros(96, 8, requires_grad=True)
    >>> qlora_linear(torch.randn(2, 5, 64), w, lora_a=a, lora_b=b, scaling=2.0).shape
    torch.Size([2, 5, 96])
    """
    shape, device = _weight_shape(weight)
    _check_activation(x, shape, device)
    n, k = shape
    _check_vector("bias", bias, n, device)
    _check_adapter(lora_a, lora_b, n, k, device)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability from 0 to 1")
    if dropout_p == 0.0 or lora_a is None:
        seed = None
    elif seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed: got {seed.dtype} {tuple(seed.shape)} on {seed.device}, expected int64 [1] on {x.device}")
    y = _qlora_linear.qlora_linear(x.reshape(-1, k), weight, bias, lora_a, lora_b, float(scaling), float(dropout_p), seed)
    return y.reshape(*x.shape[:-1], n)


def _weight_shape(weight: NF4Weight | Tensor) -> tuple[tuple[int, int], torch.device]:
    shape = tuple(weight.shape)
    if len(shape) != 2:
        raise ValueError(f"weight: got shape {shape}, expected [out_features, in_features]")
    if isinstance(weight, Tensor):
        if weight.dtype not in _FLOATS:
            raise TypeError(
                f"weight: got a {weight.dtype} tensor, expected float32, bfloat16, float16 or an NF4Weight (NF4Weight.from_bnb)"
            )
        if weight.requires_grad:
            raise ValueError(
                "weight: requires grad, but the base weight is frozen here; call weight.requires_grad_(False) or use torch's linear"
            )
    return shape, weight.device


def _check_activation(x: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        hint = "; the weight looks transposed, quantize it as [out_features, in_features]" if x.dim() and x.shape[-1] == shape[0] else ""
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {shape[1]}] for a weight {shape}{hint}")
    if x.device != device:
        raise ValueError(f"x: is on {x.device}, the weight is on {device}; move one of them")


def _check_vector(name: str, value: Tensor | None, n: int, device: torch.device) -> None:
    if value is None:
        return
    if value.dtype not in _FLOATS or tuple(value.shape) != (n,) or value.device != device:
        raise ValueError(f"{name}: got {value.dtype} {tuple(value.shape)} on {value.device}, expected a float tensor [{n}] on {device}")


def _check_adapter(lora_a: Tensor | None, lora_b: Tensor | None, n: int, k: int, device: torch.device) -> None:
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise ValueError(f"{'lora_a' if lora_a is None else 'lora_b'}: is missing; give both or none")
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
        if value.dtype not in _FLOATS:
            raise TypeError(f"{name}: got {value.dtype}, expected float32, bfloat16 or float16")
        if value.device != device:
            raise ValueError(f"{name}: is on {value.device}, the weight is on {device}; move one of them")
    r = lora_a.shape[0] if lora_a.dim() == 2 else -1
    if tuple(lora_a.shape) != (r, k) or not 1 <= r <= 256:
        raise ValueError(f"lora_a: got shape {tuple(lora_a.shape)}, expected [r, {k}] with r from 1 to 256")
    if tuple(lora_b.shape) != (n, r):
        raise ValueError(f"lora_b: got shape {tuple(lora_b.shape)}, expected [{n}, {r}]")
    if lora_a.dtype != lora_b.dtype:
        raise ValueError(f"lora_b: got {lora_b.dtype}, lora_a is {lora_a.dtype}; both must have one dtype")


from .functional_loss import linear_cross_entropy  # noqa: E402  (it takes the checks above)
