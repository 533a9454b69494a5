"""A FLOP counter over the public functions counts what the same computation counts in plain PyTorch, forward
and backward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import flop_counter

from peftkern import NF4Weight, functional, use_backend
from peftkern.functional import Adapter, Member
from peftkern.ops.flops import FORMULAS

M, N, K, R = 6, 48, 32, 4


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _member(n: int, k: int, adapters: int = 1, rows: tuple[int, int] | None = None) -> Member:
    found = [Adapter(_leaf(R + i, k), _leaf(n, R + i), 0.5, rows=rows) for i in range(adapters)]
    return Member(NF4Weight.from_dense(torch.randn(n, k)), _leaf(n), found)


def _plain(x: Tensor, member: Member) -> Tensor:
    y = F.linear(x, member.weight.dequantize(torch.float32), member.bias)
    for one in member.adapters:
        begin, end = one.rows or (0, len(x))
        part = one.scaling * F.linear(F.linear(x[begin:end], one.lora_a), one.lora_b)
        y = y + F.pad(part, (0, 0, begin, len(x) - end))
    return y


def _plain_dora(x: Tensor, member: Member, magnitude: Tensor) -> Tensor:
    (one,), dense = member.adapters, member.weight.dequantize(torch.float32)
    with torch.no_grad():
        norm = (dense + one.scaling * one.lora_b @ one.lora_a).norm(dim=1)
    return magnitude / norm * _plain(x, Member(member.weight, None, [one])) + member.bias


def _sum(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(y.sum() for y in outputs) if isinstance(outputs, tuple) else outputs.sum()


def _linear(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    member = _member(N, K)
    (one,) = member.adapters
    ours = lambda: functional.qlora_linear(x, member.weight, member.bias, one.lora_a, one.lora_b)  # noqa: E731
    return ours, lambda: _plain(x, member)


def _half_trained(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    member = _member(N, K)
    (one,) = member.adapters
    one.lora_a.requires_grad_(False)
    ours = lambda: functional.qlora_linear(x, member.weight, member.bias, one.lora_a, one.lora_b)  # noqa: E731
    return ours, lambda: _plain(x, member)


def _frozen(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    weight = NF4Weight.from_dense(torch.randn(N, K))
    return lambda: functional.linear_4bit(x, weight), lambda: F.linear(x, weight.dequantize(torch.float32))


def _add(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    y, a, b = _leaf(M, N), _leaf(R, K), _leaf(N, R)
    return lambda: functional.lora_add(y, x, a, b), lambda: y + F.linear(F.linear(x, a), b)


def _group(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    members = [_member(N, K, 2), _member(16, K), _member(8, K, 0), _member(N, K, rows=(1, 4))]
    return lambda: functional.qlora_group(x, members), lambda: tuple(_plain(x, one) for one in members)


def _unused_member(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    members = [_member(N, K), _member(16, K)]
    return lambda: functional.qlora_group(x, members)[0], lambda: [_plain(x, one) for one in members][0]


def _mlp(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    gate, up, down = _member(64, K), _member(64, K), _member(K, 64)
    plain = lambda: _plain(F.silu(_plain(x, gate)) * _plain(x, up), down)  # noqa: E731
    return lambda: functional.gated_mlp(x, gate, up, down), plain


def _packed_mlp(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    both, down = _member(128, K), _member(K, 64)

    def plain() -> Tensor:
        gate, up = _plain(x, both).chunk(2, dim=-1)
        return _plain(F.silu(gate) * up, down)

    return lambda: functional.gated_mlp_packed(x, both, down), plain


def _dora(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    member, magnitude = _member(N, K), _leaf(N)
    return lambda: functional.dora_linear(x, member, magnitude), lambda: _plain_dora(x, member, magnitude)


def _dora_group(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    members, magnitudes = [_member(N, K), _member(16, K)], [_leaf(N), _leaf(16)]
    plain = lambda: tuple(_plain_dora(x, *pair) for pair in zip(members, magnitudes, strict=True))  # noqa: E731
    return lambda: functional.dora_group(x, members, magnitudes), plain


def _cross_entropy(
    reduction: str, adapted: bool
) -> Callable[[Tensor], tuple[Callable[[], object], Callable[[], object]]]:
    def case(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
        weight, labels = _leaf(N, K), torch.randint(N, (M,))
        a, b = (_leaf(R, K), _leaf(N, R)) if adapted else (None, None)

        def plain() -> Tensor:
            logits = F.linear(x, weight) + (F.linear(F.linear(x, a), b) if adapted else 0)
            return F.cross_entropy(logits, labels, reduction=reduction)

        return lambda: functional.linear_cross_entropy(
            x, weight, labels, lora_a=a, lora_b=b, reduction=reduction
        ), plain

    return case


CASES = {
    "qlora_linear": _linear,
    "qlora_linear, B alone trained": _half_trained,
    "linear_4bit": _frozen,
    "lora_add": _add,
    "qlora_group": _group,
    "qlora_group, an output unused": _unused_member,
    "gated_mlp": _mlp,
    "gated_mlp_packed": _packed_mlp,
    "dora_linear": _dora,
    "dora_group": _dora_group,
    "linear_cross_entropy": _cross_entropy("mean", False),
    "linear_cross_entropy, adapted": _cross_entropy("mean", True),
    "linear_cross_entropy, by row": _cross_entropy("none", True),
}


def _count(run: Callable[[], object]) -> int:
    with flop_counter.FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_counts_of_forward_and_backward(name: str, need_x: bool, backend: str) -> None:
    x = torch.randn(M, K, requires_grad=need_x)
    if name == "linear_4bit" and not need_x:
        x = x + _leaf(1)  # there is nothing to differentiate but x
    counts = []
    for run in CASES[name](x):
        with use_backend(backend):
            counts.append(_count(lambda run=run: _sum(run()).backward()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", CASES)
def test_counts_without_gradients(name: str) -> None:
    with torch.no_grad():
        ours, plain = map(_count, CASES[name](torch.randn(M, K)))
    assert ours == plain > 0


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no formula has been registered yet."""
    ours = {getattr(torch.ops.peftkern, name) for name in FORMULAS}
    kept = {op: formula for op, formula in flop_counter.flop_registry.items() if op not in ours}
    monkeypatch.setattr(flop_counter, "flop_registry", kept)


def test_a_counter_made_before_the_first_op_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch)
    assert _count(lambda: functional.linear_4bit(torch.randn(M, K), torch.randn(N, K))) == 2 * M * N * K


def test_a_backward_pass_alone_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch)
    y = functional.linear_4bit(_leaf(M, K), torch.randn(N, K)).sum()
    assert _count(y.backward) == 2 * M * N * K


def test_a_formula_of_the_users_own_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(monkeypatch)
    op = torch.ops.peftkern.qlora_linear_fwd
    with flop_counter.FlopCounterMode(
        display=False, custom_mapping={op: lambda *args, **kwargs: 7}
    ) as counter:
        functional.linear_4bit(torch.randn(M, K), torch.randn(N, K))
    assert counter.get_total_flops() == 7


def test_importing_the_package_does_not_import_the_counter() -> None:
    code = "import sys, torch; before = set(sys.modules); import peftkern; new = set(sys.modules) - before; "
    code += "sys.exit('torch.utils.flop_counter' in new or 'triton' in new)"
    subprocess.run([sys.executable, "-c", code], check=True)
