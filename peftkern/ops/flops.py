"""FLOPs of the ops, for torch.utils.flop_counter: what the same computation counts in plain PyTorch, products
alone.

That module imports Triton, a second's work, so that it is not imported here: the formulas are registered
where somebody else has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["observe", "register"]

# The formulas get the ops' arguments, tensors as their shapes.
_Shape = Sequence[int]


def _low_rank(m: int, n: int, k: int, r: int) -> int:
    return 2 * m * r * (k + n)


def _low_rank_gradients(m: int, n: int, k: int, r: int, need_x: bool, need_a: bool, need_b: bool) -> int:
    """dyb = dy B for the other two, dx = dyb A, dA = dyb^T x; dB = dy^T xa."""
    return 2 * m * r * (n * ((need_x or need_a) + need_b) + k * (need_x + need_a))


def _linear(x: _Shape, weight: _Shape, *args, **_) -> int:
    (m, k), n, lora_a = x, args[8], args[10]
    return 2 * m * n * k + (0 if lora_a is None else _low_rank(m, n, k, lora_a[0]))


def _linear_gradients(dy: _Shape, x: _Shape | None, weight: _Shape, *args, **_) -> int:
    (m, n), k, lora_a, (need_x, _, need_a, need_b) = dy, args[8], args[9], args[-1]
    return 2 * m * n * k * need_x + (
        0 if lora_a is None else _low_rank_gradients(m, n, k, lora_a[0], need_x, need_a, need_b)
    )


def _add(y: _Shape, x: _Shape, lora_a: _Shape, *args, **_) -> int:
    return _low_rank(*y, x[1], lora_a[0])


def _add_gradients(dy: _Shape, x: _Shape | None, lora_a: _Shape, *args, **_) -> int:
    need_x, _, need_a, need_b = args[-1]
    return _low_rank_gradients(*dy, lora_a[1], lora_a[0], need_x, need_a, need_b)


def _group(
    x: _Shape, weights, quants, blocksizes, n, biases, lora_a, lora_b, members, rows, *args, **_
) -> int:
    (m, k), heights = x, _heights(rows)
    adapters = (
        _low_rank(height, n[i], k, a[0]) for height, i, a in zip(heights, members, lora_a, strict=True)
    )
    return 2 * m * sum(n) * k + sum(adapters)


def _group_gradients(
    dy, x, weights, quants, blocksizes, m, k, lora_a, lora_b, members, rows, *args, **_
) -> int:
    needs, count, adapters = args[-1], len(weights), len(members)
    n = [0 if g is None else g[1] for g in dy]
    flops = 2 * m * sum(n) * k * needs[0]
    for j, (height, i) in enumerate(zip(_heights(rows), members, strict=True)):
        if dy[i] is not None:
            need_a, need_b = needs[1 + count + j], needs[1 + count + adapters + j]
            flops += _low_rank_gradients(height, n[i], k, lora_a[j][0], needs[0], need_a, need_b)
    return flops


def _heights(rows: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in zip(rows[::2], rows[1::2], strict=True)]


def _glu_gradients(dy: _Shape, hidden, gate_first, activation, *args, **_) -> int:
    return _group_gradients([dy], None, *args)


def _dora(x: _Shape, biases, weights, quants, blocksizes, lora_a, lora_b, *args, **_) -> int:
    """The norm's product is B A."""
    m, k = x
    shapes = [(b[0], b[1]) for b in lora_b]
    return sum(2 * m * n * k + _low_rank(m, n, k, r) + 2 * n * r * k for n, r in shapes)


def _dora_gradients(dy, x, weights, quants, blocksizes, lora_a, lora_b, *args, **_) -> int:
    needs, count, flops = args[-1], len(weights), 0
    for i, (g, (r, k)) in enumerate(zip(dy, lora_a, strict=True)):
        if g is not None:
            (m, n), need_a, need_b = g, needs[1 + count + i], needs[1 + 2 * count + i]
            flops += 2 * m * n * k * needs[0] + _low_rank_gradients(m, n, k, r, needs[0], need_a, need_b)
    return flops


def _cross_entropy(x: _Shape, weight: _Shape, *args, **_) -> int:
    """With a row_scale it is a backward pass, whose logits the forward pass has counted."""
    (m, k), n, lora_a, row_scale, (need_x, _, need_a, need_b, need_weight) = (
        x,
        args[8],
        args[11],
        args[-2],
        args[-1],
    )
    forward = row_scale is None
    flops = 2 * m * n * k * (forward + need_x + need_weight)
    if lora_a is not None:
        flops += _low_rank(m, n, k, lora_a[0]) * forward + _low_rank_gradients(
            m, n, k, lora_a[0], need_x, need_a, need_b
        )
    return flops


def _attention(q: _Shape, k: _Shape, *args, **_) -> int:
    """As torch counts its own: whole products, also of what a mask hides."""
    b, h, s, d = q
    return 4 * b * h * s * k[2] * d


def _attention_gradients(dy: _Shape, q: _Shape, k: _Shape, *args, **_) -> int:
    """The scores again, and two products for each of the two forward."""
    return _attention(q, k) // 2 * 5


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _attention,
    "attention_bwd": _attention_gradients,
    "qlora_linear_fwd": _linear,
    "qlora_linear_bwd": _linear_gradients,
    "lora_add_fwd": _add,
    "lora_add_bwd": _add_gradients,
    "qlora_group_fwd": _group,
    "qlora_group_bwd": _group_gradients,
    "qlora_glu_bwd": _glu_gradients,
    "dora_group_fwd": _dora,
    "dora_group_bwd": _dora_gradients,
    "linear_cross_entropy": _cross_entropy,
}


def observe() -> None:
    """An op is about to run: a mode that counts FLOPs will know it."""
    if is_in_torch_dispatch_mode():
        register()


def register() -> None:
    """With torch.utils.flop_counter, and with the counters that are active, which have copied what was
    registered when they were made."""
    counting = None if torch.compiler.is_compiling() else sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    known = {getattr(torch.ops.peftkern, name): formula for name, formula in FORMULAS.items()}
    for op, formula in known.items():
        if op not in counting.flop_registry:
            counting.register_flop_formula(op)(formula)
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        copied = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if copied is not None:
            copied.update({op: counting.flop_registry[op] for op in known if op not in copied})
