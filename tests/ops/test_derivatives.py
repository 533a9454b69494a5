"""Second derivatives, torch.func's transforms, forward-mode AD and tracing of every public function, against
plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.nn import functional as F

from peftkern import NF4Weight, functional
from peftkern.functional import Adapter, Member
from peftkern.ops.philox import dropout_scale

K, N = 64, 24


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


WEIGHT = NF4Weight.from_dense(_randn(N, K))
OTHER = _randn(N, K, seed=1)
DOWN = _randn(K, N)
DENSE = WEIGHT.dequantize(torch.float32)
LABELS = torch.tensor([3, -100, 7, 0, 23])


class Case(NamedTuple):
    """ours and the same in plain PyTorch, of the tensors `inputs`, each to be differentiated; by_row: vmap
    runs over the first."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    by_row: bool = True


def _branch(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x @ a.t() @ b.t())


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def _group(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    members = [Member(WEIGHT, adapters=[Adapter(a, b, 0.5), Adapter(a, b, 1.0, rows=(1, 3))]), Member(OTHER)]
    return sum(functional.qlora_group(x, members))


def _plain_group(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows = torch.zeros(5, 1)
    rows[1:3] = 2.0
    return x @ (DENSE + OTHER).t() + _branch(x, a, b) * (1 + rows)


def _mlp(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate, up = Member(WEIGHT, adapters=[Adapter(a, b, 0.5)]), Member(OTHER)
    return functional.gated_mlp(x, gate, up, Member(DOWN))


def _plain_mlp(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(x @ DENSE.t() + _branch(x, a, b)) * (x @ OTHER.t())) @ DOWN.t()


def _dora(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    return functional.dora_linear(x, Member(WEIGHT, adapters=[Adapter(a, b, 0.5)]), magnitude)


def _plain_dora(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    norm = (DENSE + 0.5 * b @ a).norm(dim=1).detach()
    return (x @ DENSE.t() + _branch(x, a, b)) * (magnitude / norm)


ANGLES = _randn(1, 5, 8)
ROPE = (_randn(1, 2, 5, 8), _randn(1, 1, 5, 8))


def _rope(q: Tensor, k: Tensor) -> Tensor:
    q, k = functional.rope(q, k, ANGLES.cos(), ANGLES.sin())
    return (q * k).sum(-1)


def _plain_rope(q: Tensor, k: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * ANGLES.cos()[:, None] + torch.cat([-second, first], -1) * ANGLES.sin()[:, None]

    return (turn(q) * turn(k)).sum(-1)


def _packed(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


PACKED, SEED = _randn(N, K, seed=4), torch.tensor([5])
X, A, B = _randn(5, K), _randn(3, K) * 0.2, _randn(N, 3) * 0.2
CASES = {
    "qlora_linear": Case(
        lambda x, a, b, bias: functional.qlora_linear(x, WEIGHT, bias, a, b, scaling=0.5),
        lambda x, a, b, bias: x @ DENSE.t() + _branch(x, a, b) + bias,
        (X, A, B, _randn(N)),
    ),
    "linear_4bit": Case(
        lambda x: functional.linear_4bit(x, WEIGHT).square(), lambda x: (x @ DENSE.t()).square(), (X,)
    ),
    "lora_add": Case(
        lambda y, x, a, b: functional.lora_add(y, x, a, b, scaling=0.5),
        lambda y, x, a, b: y + _branch(x, a, b),
        (_randn(5, N), X, A, B),
        False,
    ),
    "qlora_group": Case(_group, _plain_group, (X, A, B), False),
    "gated_mlp": Case(_mlp, _plain_mlp, (X, A, B)),
    "gated_mlp_packed": Case(
        lambda x, a, b: functional.gated_mlp_packed(
            x, Member(PACKED, adapters=[Adapter(a, b, 0.5)]), Member(DOWN[:, : N // 2])
        ),
        lambda x, a, b: _packed(x @ PACKED.t() + _branch(x, a, b)) @ DOWN[:, : N // 2].t(),
        (X, A, B),
    ),
    "dropout": Case(
        lambda x, a, b: functional.qlora_linear(x, WEIGHT, None, a, b, scaling=0.5, dropout_p=0.3, seed=SEED),
        lambda x, a, b: x @ DENSE.t() + _branch(x * dropout_scale(*x.shape, 0.3, SEED), a, b),
        (X, A, B),
        False,
    ),
    "dora_linear": Case(_dora, _plain_dora, (X, A, B, _randn(N).abs() + 1)),
    "rms_norm": Case(functional.rms_norm, _norm, (X, _randn(K))),
    "add_rms_norm": Case(
        lambda x, r, w: (lambda y, s: y * s)(*functional.add_rms_norm(x, r, w)),
        lambda x, r, w: _norm(x + r, w) * (x + r),
        (X, _randn(5, K, seed=2), _randn(K)),
        False,
    ),
    "glu": Case(functional.glu, lambda gate, up: F.silu(gate) * up, (X, _randn(5, K, seed=3)), False),
    "rope": Case(_rope, _plain_rope, ROPE, False),
    "linear_cross_entropy": Case(
        lambda x, a, b: functional.linear_cross_entropy(x, WEIGHT, LABELS, lora_a=a, lora_b=b, scaling=0.5),
        lambda x, a, b: F.cross_entropy(x @ DENSE.t() + _branch(x, a, b), LABELS),
        (X, A, B),
        False,
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


def _close(got: Tensor | tuple, expected: Tensor | tuple) -> None:
    """Each tensor's error by its norm."""
    got, expected = ((t,) if isinstance(t, Tensor) else t for t in (got, expected))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def _leaves(case: Case) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in case.inputs)


def _second(function: Callable[..., Tensor], case: Case) -> tuple[Tensor, ...]:
    """The derivatives of a number made of all first derivatives, and those first."""
    leaves = _leaves(case)
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    return (
        *(t.detach() for t in first),
        *torch.autograd.grad(sum((g * _randn(*g.shape, seed=9)).sum() for g in first), leaves),
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear_cross_entropy"])
def test_second_derivatives(name: str) -> None:
    case = CASES[name]
    _close(_second(case.ours, case), _second(case.plain, case))


def test_hooks_on_inputs_fire_once_where_a_graph_is_made() -> None:
    x, seen = _leaves(CASES["qlora_linear"])[0], []
    doubled = x * 2
    doubled.register_hook(seen.append)
    (grad,) = torch.autograd.grad(functional.linear_4bit(doubled, WEIGHT).sum(), x, create_graph=True)
    assert len(seen) == 1
    _close(grad.detach(), 2 * DENSE.sum(0).expand_as(x))


def test_what_cannot_be_differentiated_again_says_so_at_once() -> None:
    case = CASES["linear_cross_entropy"]
    leaves = _leaves(case)
    with pytest.raises(
        RuntimeError, match="linear_cross_entropy: its gradients cannot be differentiated again"
    ):
        torch.autograd.grad(case.ours(*leaves), leaves, create_graph=True)
    x, a, b = X.clone().requires_grad_(), A, B.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="qlora_linear: .* x was not kept"):
        torch.autograd.grad(functional.qlora_linear(x, WEIGHT, None, a, b).sum(), (x, b), create_graph=True)


@EVERY
def test_gradients_by_torch_func(name: str) -> None:
    case = CASES[name]
    every = tuple(range(len(case.inputs)))
    got, expected = (
        torch.func.grad(lambda *t, f=f: f(*t).square().sum(), argnums=every)(*case.inputs)
        for f in (case.ours, case.plain)
    )
    _close(got, expected)


@EVERY
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(name: str, grad: bool) -> None:
    """By torch.func.jvp and by dual numbers; neither loses a tangent where gradients are off."""
    case = CASES[name]
    tangents = tuple(torch.ones_like(t) * 0.1 for t in case.inputs)
    with torch.set_grad_enabled(grad):
        expected = torch.func.jvp(case.plain, case.inputs, tangents)
        _close(torch.func.jvp(case.ours, case.inputs, tangents), expected)
        with fwad.dual_level():
            out = case.ours(
                *(fwad.make_dual(t, tangent) for t, tangent in zip(case.inputs, tangents, strict=True))
            )
            _close(tuple(fwad.unpack_dual(out)), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_row])
def test_vmap_over_rows_and_over_what_is_trained(name: str) -> None:
    case = CASES[name]
    (x, *rest), none = case.inputs, (None,) * (len(case.inputs) - 1)
    _close(
        torch.vmap(case.ours, in_dims=(0, *none))(x, *rest),
        torch.vmap(case.plain, in_dims=(0, *none))(x, *rest),
    )
    if rest:
        stacked = [torch.stack([t, 2 * t]) for t in rest]
        dims = (None, *(0 for _ in rest))
        _close(
            torch.vmap(case.ours, in_dims=dims)(x, *stacked),
            torch.vmap(case.plain, in_dims=dims)(x, *stacked),
        )


@EVERY
def test_traced_programs_hold_torchs_operators_alone(name: str) -> None:
    case = CASES[name]
    with torch.no_grad():
        traced = torch.jit.trace(lambda *t: case.ours(*t), case.inputs, check_trace=False)
        _close(traced(*case.inputs), case.ours(*case.inputs))
    assert "peftkern::" not in str(traced.inlined_graph)
