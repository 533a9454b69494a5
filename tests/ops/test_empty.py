"""No rows, no out_features, no in_features: every public function gives what torch gives, gradients too, or
says what it expects."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkern
from peftkern import NF4Weight, functional
from peftkern.formats import nf4
from peftkern.functional import Adapter, Member
from peftkern.functional.group import few_rows

R = 2
# Every size that is empty, alone and together, with few rows (the GEMV) and many (the GEMM or the vendor's).
SIZES = [s for s in itertools.product((0, 3, 70), (0, 6), (0, 5)) if 0 in s]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _check(got: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Values and gradients, the gradients of a sum, which an empty tensor has too. A norm of nothing makes
    nan, here and there."""
    torch.testing.assert_close(got, expected, equal_nan=True)
    grads = (torch.autograd.grad(y.sum(), leaves, allow_unused=True) for y in (got, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def _low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x @ a.t() @ b.t())


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_linear(m: int, n: int, k: int, lead: tuple[int, ...]) -> None:
    x, w, bias, a, b = _leaf(m, *lead, k), torch.randn(n, k), _leaf(n), _leaf(R, k), _leaf(n, R)
    expected = F.linear(x, w, bias) + _low_rank(x, a, b)
    _check(functional.qlora_linear(x, w, bias, a, b, scaling=0.5), expected, (x, bias, a, b))
    with torch.no_grad():
        torch.testing.assert_close(functional.qlora_linear(x, w, bias, a, b, scaling=0.5), expected)
    base = _leaf(m, *lead, n)
    _check(
        functional.lora_add(base, x, a, b, bias, scaling=0.5),
        base + _low_rank(x, a, b) + bias,
        (base, x, a, b, bias),
    )
    assert functional.qlora_linear(x, w, bias, a, b, dropout_p=0.5).shape == expected.shape


@pytest.mark.parametrize("n, k", [(0, 5), (6, 0), (0, 0)])
def test_one_row_without_a_batch(n: int, k: int) -> None:
    x, w, bias = _leaf(k), torch.randn(n, k), _leaf(n)
    _check(functional.linear_4bit(x, w, bias), F.linear(x, w, bias), (x, bias))


@pytest.mark.parametrize("m, n, k", [s for s in SIZES if 0 in s[1:]])
def test_a_packed_weight_without_elements(m: int, n: int, k: int) -> None:
    bytes_, absmax = torch.empty(0, dtype=torch.uint8), torch.empty(0)
    weight = NF4Weight(bytes_, nf4.code_tensor("nf4"), (n, k), torch.float32, 64, "nf4", absmax=absmax)
    dense, x = weight.dequantize(), _leaf(m, k)
    assert dense.shape == (n, k) and functional.dequantize_4bit(weight, out=torch.empty(n, k)).shape == (n, k)
    _check(functional.linear_4bit(x, weight), F.linear(x, dense), (x,))
    with pytest.raises(ValueError, match="weight: is empty"):
        functional.quantize_4bit(dense)


def _members(n: int, k: int) -> tuple[list[Member], tuple[Tensor, ...]]:
    """One of n rows, one of seven, an adapter each; and what is trained."""
    members = [
        Member(torch.randn(rows, k), _leaf(rows), (Adapter(_leaf(R, k), _leaf(rows, R), 0.5),))
        for rows in (n, 7)
    ]
    return members, tuple(
        t for member in members for t in (member.bias, member.adapters[0].lora_a, member.adapters[0].lora_b)
    )


def _product(x: Tensor, member: Member) -> Tensor:
    low = member.adapters[0]
    return F.linear(x, member.weight) + _low_rank(x, low.lora_a, low.lora_b)


def _expected(x: Tensor, member: Member) -> Tensor:
    return _product(x, member) + member.bias


@pytest.mark.parametrize("m, n, k", SIZES)
def test_group(m: int, n: int, k: int) -> None:
    x, (members, trained) = _leaf(m, k), _members(n, k)
    got, expected = functional.qlora_group(x, members), [_expected(x, member) for member in members]
    _check(torch.cat(got, 1), torch.cat(expected, 1), (x, *trained))
    for used in range(2):  # the other has no gradient
        _check(functional.qlora_group(x, members)[used], _expected(x, members[used]), (x,))
    with torch.no_grad():
        prepared = few_rows(x.detach(), members)
        for y, theirs in zip(prepared(x.detach()) if prepared else (), expected, strict=bool(prepared)):
            torch.testing.assert_close(y, theirs)


@pytest.mark.parametrize("m, n, k", SIZES)
def test_rows_of_two_adapters(m: int, n: int, k: int) -> None:
    x, w, half = _leaf(m, k), torch.randn(n, k), m // 2
    lows = [(_leaf(R, k), _leaf(n, R)) for _ in range(2)]
    adapters = [Adapter(*low, 0.5, rows=rows) for low, rows in zip(lows, ((0, half), (half, m)), strict=True)]
    expected = F.linear(x, w) + torch.cat([_low_rank(x[:half], *lows[0]), _low_rank(x[half:], *lows[1])])
    _check(functional.qlora_group(x, [Member(w, None, adapters)])[0], expected, (x, *lows[0], *lows[1]))


@pytest.mark.parametrize("m, n, k", SIZES)
def test_dora(m: int, n: int, k: int) -> None:
    x, (members, trained), magnitudes = _leaf(m, k), _members(n, k), (_leaf(n), _leaf(7))
    expected = []
    for member, magnitude in zip(members, magnitudes, strict=True):
        low = member.adapters[0]
        norm = (member.weight + 0.5 * (low.lora_b @ low.lora_a)).norm(dim=1).detach()
        torch.testing.assert_close(functional.dora_norm(member.weight, low.lora_a, low.lora_b, 0.5), norm)
        expected.append(magnitude / norm * _product(x, member) + member.bias)
    got = functional.dora_group(x, members, magnitudes)
    _check(torch.cat(got, 1), torch.cat(expected, 1), (x, *trained, *magnitudes))
    assert [y.shape for y in functional.dora_group(x, members, magnitudes)] == [y.shape for y in expected]
    dropped = functional.dora_linear(x, members[0], magnitudes[0], dropped=torch.zeros_like(x))
    assert dropped.shape == expected[0].shape


@pytest.mark.parametrize("m, n, k", SIZES)
def test_gated_mlp(m: int, n: int, k: int) -> None:
    x, (members, _), down = _leaf(m, k), _members(n, k), torch.randn(4, n)
    gate, up, trained = (
        members[0],
        Member(torch.randn(n, k)),
        (members[0].adapters[0].lora_a, members[0].adapters[0].lora_b),
    )
    h = F.silu(_expected(x, gate)) * F.linear(x, up.weight)
    _check(functional.gated_mlp(x, gate, up, Member(down)), F.linear(h, down), (x, *trained))
    both = Member(torch.cat([gate.weight, up.weight]))
    first, second = F.linear(x, both.weight).chunk(2, dim=-1)
    _check(functional.gated_mlp_packed(x, both, Member(down)), F.linear(F.silu(first) * second, down), (x,))
    assert functional.gated_mlp(x, gate, up, Member(torch.randn(0, n))).shape == (m, 0)


@pytest.mark.parametrize("m, n, k", [s for s in SIZES if s[1]])
@pytest.mark.parametrize("reduction", ["sum", "none", "mean"])
def test_linear_cross_entropy(m: int, n: int, k: int, reduction: str) -> None:
    x, w, bias, labels = _leaf(m, k), _leaf(n, k), _leaf(n), torch.randint(n, (m,))
    expected = F.cross_entropy(F.linear(x, w, bias), labels, reduction=reduction)
    got = functional.linear_cross_entropy(x, w, labels, bias=bias, reduction=reduction)
    torch.testing.assert_close(got, expected, equal_nan=True)
    grads = (torch.autograd.grad(loss.sum(), (x, w, bias)) for loss in (got, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs.nan_to_num())  # of no label at all there is no gradient


def test_what_has_no_result_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight: got shape \(0, 5\), expected \[V, K\]"):
        functional.linear_cross_entropy(
            torch.randn(3, 5), torch.randn(0, 5), torch.zeros(3, dtype=torch.int64)
        )
    for norm in (lambda x, w: functional.rms_norm(x, w), lambda x, w: functional.add_rms_norm(x, x, w)):
        with pytest.raises(
            ValueError, match=r"x: got shape \(3, 0\), expected \[..., N\] with N of at least 1"
        ):
            norm(torch.randn(3, 0), torch.randn(0))


@pytest.mark.parametrize("m, n", [(0, 6), (3, 0), (0, 0)])
def test_elementwise(m: int, n: int) -> None:
    gate, up = _leaf(m, n), _leaf(m, n)
    _check(functional.glu(gate, up), F.silu(gate) * up, (gate, up))
    if n:
        x, weight = _leaf(m, n), _leaf(n)
        _check(functional.rms_norm(x, weight, eps=1e-6), F.rms_norm(x, (n,), weight, 1e-6), (x, weight))
        assert [t.shape for t in functional.add_rms_norm(x, x, weight)] == [x.shape] * 2


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (1, 0, 3, 8), (1, 2, 0, 8), (1, 2, 3, 0)])
def test_rope(shape: tuple[int, int, int, int]) -> None:
    batch, _, seq, dim = shape
    q, k, angles = _leaf(*shape), _leaf(batch, 1, seq, dim), torch.rand(1, seq, dim)
    rotated = functional.rope(q, k, angles.cos(), angles.sin())
    assert [t.shape for t in rotated] == [q.shape, k.shape]
    grads = torch.autograd.grad(sum(t.sum() for t in rotated), (q, k), allow_unused=True)
    assert [g is None or g.shape for g in grads] == [q.shape, k.shape]


class _Net(nn.Module):
    def __init__(self, k: int, h: int, n: int) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(k, h), nn.Linear(k, h), nn.Linear(h, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.v(x))


@pytest.mark.parametrize("m", [(0,), (3,), (2, 0), (70,)])
@pytest.mark.parametrize("k, h, n", [(8, 0, 8), (0, 8, 8), (8, 8, 0)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_patched(m: tuple[int, ...], k: int, h: int, n: int, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        _Net(k, h, n), peft.LoraConfig(r=R, target_modules=["q", "v", "o"], use_dora=dora)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x, trained = _leaf(*m, k), tuple(p for p in model.parameters() if p.requires_grad)
    expected = model(x)
    peftkern.patch(model)
    _check(model(x), expected, (x, *trained))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, equal_nan=True)
