"""A decoder layer's small ops, forward and backward: SwiGLU and GEGLU, RMSNorm, the same of a residual sum,
RoPE, against PyTorch's own.

LayerNorm is left to PyTorch, whose kernel is fused: its row beside our RMSNorm of the same size says whether
there is something to gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern import functional

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, close, within_bound

__all__ = ["build", "specs"]

EPS = 1e-5


class _Op(NamedTuple):
    """inputs: those with a gradient first; every function takes all of them, and returns a tensor or a tuple
    of them.
    beside: other functions that move as many bytes, for orientation; their values are their own.
    """

    inputs: list[Tensor]
    trained: int
    ours: Callable
    stock: Callable
    others: dict[str, Callable]
    beside: dict[str, Callable] = {}


def specs(small: bool) -> list[Spec]:
    """n: the width (of a head for rope), k: 1, or the heads of q and k together; m: tokens."""
    m = 64 if small else 512
    shapes = [
        ("swiglu", 1536, 1),
        ("geglu", 1536, 1),
        ("geglu tanh", 1536, 1),
        ("rms norm", 576, 1),
        ("layer norm", 768, 1),
        ("add rms norm", 576, 1),
        ("rope", 64, 12),
    ]
    if not small:
        shapes += [
            ("swiglu", 14336, 1),
            ("rms norm", 4096, 1),
            ("layer norm", 4096, 1),
            ("add rms norm", 4096, 1),
            ("rope", 128, 40),
        ]
    return [
        Spec(name, mode, d, n, k, m)
        for name, n, k in shapes
        for d in ("bfloat16", "float32")
        for mode in ("forward", "backward")
    ]


def _glu(spec: Spec, dtype: torch.dtype) -> _Op:
    activation = {"swiglu": "silu", "geglu": "gelu", "geglu tanh": "gelu_tanh"}[spec.kernel]
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    inputs = [torch.randn(spec.m, spec.n).to(dtype) for _ in range(2)]
    return _Op(
        inputs, 2, lambda g, u: functional.glu(g, u, activation=activation), lambda g, u: act(g) * u, {}
    )


def _stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rms_norm(spec: Spec, dtype: torch.dtype) -> _Op:
    inputs = [torch.randn(spec.m, spec.n).to(dtype), (torch.rand(spec.n) + 0.5).to(dtype)]
    others = {"F.rms_norm": lambda x, w: F.rms_norm(x, (spec.n,), w, EPS)}
    return _Op(inputs, 1, lambda x, w: functional.rms_norm(x, w, eps=EPS), _stock_norm, others)


def _add_rms_norm(spec: Spec, dtype: torch.dtype) -> _Op:
    def apart(norm: Callable) -> Callable:
        def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            s = residual + x
            return norm(s, weight), s

        return both

    inputs = [*torch.randn(2, spec.m, spec.n).to(dtype), (torch.rand(spec.n) + 0.5).to(dtype)]
    others = {"addition, our rms_norm": apart(lambda s, w: functional.rms_norm(s, w, eps=EPS))}
    return _Op(
        inputs, 2, lambda x, r, w: functional.add_rms_norm(x, r, w, eps=EPS), apart(_stock_norm), others
    )


def _layer_norm(spec: Spec, dtype: torch.dtype) -> _Op:
    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight + bias).to(x.dtype)

    inputs = [
        torch.randn(spec.m, spec.n).to(dtype),
        (torch.rand(spec.n) + 0.5).to(dtype),
        torch.randn(spec.n).to(dtype),
    ]
    beside = {"our rms_norm": lambda x, w, b: functional.rms_norm(x, w, eps=EPS)}
    return _Op(inputs, 1, lambda x, w, b: F.layer_norm(x, (spec.n,), w, b, EPS), stock, {}, beside)


def _rope(spec: Spec, dtype: torch.dtype) -> _Op:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def stock(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return turn(q, cos, sin), turn(k, cos, sin)

    q_heads = spec.k * 4 // 5
    q, k = (
        torch.randn(2, spec.m // 2, heads, spec.n).to(dtype).transpose(1, 2)
        for heads in (q_heads, spec.k - q_heads)
    )
    angle = torch.rand(1, spec.m // 2, spec.n)
    return _Op([q, k, angle.cos().to(dtype), angle.sin().to(dtype)], 2, functional.rope, stock, {})


def _outputs(
    call: Callable, op: _Op, inputs: list[Tensor], backward: bool
) -> Callable[[], dict[str, Tensor]]:
    """Forward alone without a graph; or backward alone, of a graph that is kept."""

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return _named("y", call(*inputs))

    if not backward:
        return forward
    leaves = [x.detach().requires_grad_(i < op.trained) for i, x in enumerate(inputs)]
    y = call(*leaves)
    ys = y if isinstance(y, tuple) else (y,)
    dys = [torch.ones_like(each) * 0.5 for each in ys]
    return lambda: _named("d", torch.autograd.grad(ys, leaves[: op.trained], dys, retain_graph=True))


def _named(prefix: str, tensors: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{prefix}{i}": t for i, t in enumerate(tensors if isinstance(tensors, tuple) else (tensors,))}


def _moved(spec: Spec, op: _Op, dtype: torch.dtype) -> int:
    """Every operand read once, every result written once. The gradient of a rotation reads dy in place of q
    and k."""
    width = spec.m * spec.n * spec.k * dtype.itemsize
    small = sum(x.nbytes for x in op.inputs[op.trained :])
    known = {"rope": (2, 2), "rms norm": (2, 3), "layer norm": (2, 3), "add rms norm": (4, 4)}
    tensors = known.get(spec.kernel, (3, 5))[spec.mode == "backward"]
    return tensors * width + small


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype, backward = DTYPES[spec.dtype], spec.mode == "backward"
    known = {"rms norm": _rms_norm, "layer norm": _layer_norm, "add rms norm": _add_rms_norm, "rope": _rope}
    op = known.get(spec.kernel, _glu)(spec, dtype)
    exact = _outputs(op.stock, op, [x.double() for x in op.inputs], backward)()
    stock = _outputs(op.stock, op, op.inputs, backward)
    moved = _moved(spec, op, dtype)
    providers = [
        Provider(OURS, _outputs(op.ours, op, op.inputs, backward), within_bound(exact, stock()), moved)
    ]
    providers.append(Provider("PyTorch, op by op", stock, close(exact, dtype), moved))
    for name, call in op.others.items():
        providers.append(Provider(name, _outputs(call, op, op.inputs, backward), close(exact, dtype), moved))
    for name, call in op.beside.items():
        providers.append(Provider(name, _outputs(call, op, op.inputs, backward), lambda _: None, moved))
    return providers


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
