"""The QLoRA linear, a frozen linear alone, and LoRA on top of any base layer's output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..formats.nf4 import NF4Weight, operands
from ..ops import linear as _qlora_linear
from ..ops.linear import lora_add as _lora_add
from . import checks

__all__ = ["linear_4bit", "lora_add", "prepared", "qlora_linear"]


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
    n, k = _check(x, weight, bias, lora_a, lora_b, dropout_p, seed)
    seed = checks.seed(x, 0.0 if lora_a is None else dropout_p, seed)
    flat = x.reshape(-1, k) if k else checks.flat(x)
    held = (*operands(weight), n, bias, lora_a, lora_b, float(scaling), float(dropout_p))
    return _qlora_linear.apply(flat, *held, seed).reshape(*x.shape[:-1], n)


def prepared(
    x: Tensor,
    weight: NF4Weight | Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """`qlora_linear` for repeated calls with tensors of x's dtype, device and last size: all else is checked
    and described now. The tensors are held; their shapes, dtypes and devices must stay. Arguments and errors
    as in `qlora_linear`."""
    n, k = _check(x, weight, bias, lora_a, lora_b, dropout_p, None)
    low = lora_a, lora_b, float(scaling), float(dropout_p)
    run = _qlora_linear.prepared(*operands(weight), n, k, bias, *low)
    if not dropout_p:
        return run
    return lambda x: run(x, checks.seed(x, dropout_p, None))


def _check(
    x: Tensor,
    weight: NF4Weight | Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[int, int]:
    """[N, K] of a linear whose arguments fit each other."""
    shape, device = checks.weight_shape(weight)
    checks.activation(x, shape, device)
    n, k = shape
    checks.vector("bias", bias, n, device)
    checks.adapter(lora_a, lora_b, n, k, device)
    checks.dropout(dropout_p, seed, x.device)
    return n, k


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
