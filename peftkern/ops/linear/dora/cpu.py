"""Launchers of the native CPU kernels: one engine call, which makes the norms, scales what it stores and what
it packs; other regimes are composed of a group and scaled columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ....runtime.native import address, dtype_of, empty, native
from ...scale_columns import cpu as columns
from .. import cpu as single
from .. import cpu_rows
from ..group import cpu as group_cpu
from .spec import split_needs

__all__ = ["backward", "forward"]


def _described(weights, quants, blocksizes, biases, lora_a, lora_b, scalings) -> group_cpu.Described:
    """One adapter a member, without dropout. biases: those that go with the products."""
    n, count = [b.shape[0] for b in lora_b], len(lora_b)
    low = biases, lora_a, lora_b, list(range(count)), scalings, [0.0] * count
    return group_cpu.Described(lora_a[0].shape[1], n, weights, quants, blocksizes, *low)


def _norm(
    group: group_cpu.Described, i: int, scaling: float, magnitude: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """norm and magnitude / norm, fp32 [N]. A W^T is the linear itself on R rows."""
    lora_b, a, n, none = group.lora_b[i], group.lora_a[i].float(), group.n[i], single.no_adapter()
    r, dense = len(a), group.quants[i][0] is None
    cross = empty((r, n))
    gemv = (
        cpu_rows.choose(dtype="float32", isa=native().isa(), m=r, n=n, k=group.k, dense=dense).regime
        == "gemv"
    )
    native().qlora_linear_fwd(group.views[i], none, address(a), 0, r, 0, 0, address(cross), 0, gemv)
    gram, norm, scale = a @ a.t(), empty(n), empty(n)
    outs = (address(squares), address(magnitude), address(norm), address(scale))
    native().dora_norm(address(cross), address(gram), address(lora_b), dtype_of(lora_b), n, r, scaling, *outs)
    return norm, scale


def forward(x, biases, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, squares, with_u):
    """As the reference."""
    x, biases = x.contiguous(), group_cpu.contiguous(biases)
    m, count = len(x), len(weights)
    # Where g is 1, as at the start, y is that of a dense base to the bit: the bias goes with its product, and
    # comes off for u.
    dense = x.dtype == torch.float32
    inside = [bias if dense and quants[6 * i] is None else None for i, bias in enumerate(biases)]
    group = _described(weights, quants, blocksizes, inside, lora_a, lora_b, scalings)
    n = group.n
    magnitudes, squares = ([t.float().contiguous() for t in tensors] for tensors in (magnitudes, squares))
    if m == 0 or group.choice(m, x.dtype, forward=True, tiles=False) != "gemm":
        made = [_norm(group, i, scalings[i], magnitudes[i], squares[i]) for i in range(len(n))]
        norms, scales = map(list, zip(*made, strict=True))
        products, xa = group.forward(x, (m,), [0, m] * count, [None] * count)
        return *_scaled(products, scales, biases, inside, with_u), xa, norms
    y = [x.new_empty((m, size)) for size in n]
    u = [x.new_empty((m, size)) if wanted else None for size, wanted in zip(n, with_u, strict=True)]
    xa, (norms, scales) = (
        [empty((m, a.shape[0])) for a in lora_a],
        ([empty(size) for size in n] for _ in range(2)),
    )
    members = []
    for i, view in enumerate(group.views):
        dora = dict(norm=address(norms[i]), squares=address(squares[i]), magnitude=address(magnitudes[i]))
        head = (view, address(biases[i]), dtype_of(biases[i]), address(y[i]), 0, 0)
        members.append(native().Member(*head, scale=address(scales[i]), u=address(u[i]), **dora))
    low = [native().Adapter(lora, i, 0, m, address(xa[i]), 0, 0, 0) for i, lora in enumerate(group.loras)]
    native().qlora_group_fwd(members, low, address(x), dtype_of(x), m)
    return y, u, xa, norms


def _scaled(
    products: list[Tensor], scales: list[Tensor], biases, inside, with_u: list[bool]
) -> tuple[list, list]:
    """y, u of the products; inside: the biases that are in them."""
    y, u = [], []
    for product, scale, bias, added in zip(products, scales, biases, inside, strict=True):
        u.append(product if added is None else product - added)
        y.append(
            columns.forward(product, scale, bias)
            if added is None
            else torch.addcmul(product, u[-1], scale - 1)
        )
    return y, [part if wanted else None for part, wanted in zip(u, with_u, strict=True)]


def backward(dy, x, weights, quants, blocksizes, lora_a, lora_b, scalings, magnitudes, norms, u, xa, needs):
    """As the reference."""
    used = [i for i, g in enumerate(dy) if g is not None]
    first, count = dy[used[0]], len(weights)
    need_x, need_bias, need_a, need_b, need_magnitude = split_needs(needs, count)
    m, (dy, u, xa) = len(first), map(group_cpu.contiguous, (dy, u, xa))
    scales = [magnitude.float() / norm for magnitude, norm in zip(magnitudes, norms, strict=True)]
    group = _described(weights, quants, blocksizes, [None] * count, lora_a, lora_b, scalings)
    d_bias, d_a, d_b, d_scale = ([None] * count for _ in range(4))
    if m == 0 or group.choice(m, first.dtype, forward=False, tiles=False) != "gemm":
        du: list[Tensor | None] = [None] * count
        for i in used:
            wanted = [True, need_magnitude[i], need_bias[i]]
            du[i], d_scale[i], d_bias[i] = columns.backward(
                dy[i], dy[i] if u[i] is None else u[i], scales[i], wanted
            )
        wanted = [need_x, *[False] * count, *need_a, *need_b]
        dx, _, d_a, d_b = group.backward(du, x, xa, wanted, [0, m] * count, [None] * count)
    else:
        dx = empty((m, group.k), dtype=first.dtype) if need_x else None
        members, low, dyb = [], [], []
        for at, i in enumerate(used):
            d_bias[i], d_scale[i] = (
                empty(group.n[i]) if need else None for need in (need_bias[i], need_magnitude[i])
            )
            d_a[i] = torch.empty_like(group.lora_a[i]) if need_a[i] else None
            d_b[i] = torch.empty_like(group.lora_b[i]) if need_b[i] else None
            dyb.append(empty((m, lora_a[i].shape[0])))
            scaled = dict(
                scale=address(scales[i]),
                u=address(u[i]) if need_magnitude[i] else 0,
                d_scale=address(d_scale[i]),
            )
            members.append(
                native().Member(group.views[i], 0, 0, 0, address(dy[i]), address(d_bias[i]), **scaled)
            )
            tail = (address(xa[i]), address(dyb[-1]), address(d_a[i]), address(d_b[i]))
            low.append(native().Adapter(group.loras[i], at, 0, m, *tail))
        x = None if x is None else x.contiguous()
        native().qlora_group_bwd(members, low, address(x), dtype_of(first), m, address(dx))
    d_magnitude = [None if g is None else g / norm for g, norm in zip(d_scale, norms, strict=True)]
    return dx, d_bias, d_a, d_b, d_magnitude
