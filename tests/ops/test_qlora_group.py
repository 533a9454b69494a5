"""Groups of QLoRA linears on one input against fp64, bounded by plain PyTorch's own error, on every ISA
level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peftkern import NF4Weight, use_backend
from peftkern.functional import Adapter, Member, qlora_group, qlora_linear
from peftkern.ops.linear import config, cpu_rows
from peftkern.ops.philox import dropout_scale

from ..cases import each_choice
from .bounds import assert_as_accurate, products_of_many_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Members as (N, [(R, rows, dropout_p)]): query, key and value; one linear with several adapters; a batch of
# mixed adapters whose borders
# lie inside a panel of rows, one of them empty, one with dropout; members without an adapter; all of it at
# once.
QKV = [(96, [(8, None, 0.0)]), (33, [(4, None, 0.0)]), (32, [(1, None, 0.0)])]
SEVERAL = [(70, [(8, None, 0.0), (3, None, 0.0), (16, None, 0.25)])]
MIXED = [(70, [(8, (0, 13), 0.0), (8, (13, 13), 0.0), (4, (13, 30), 0.5), (16, (30, 37), 0.0)])]
PLAIN = [(64, []), (200, [(4, None, 0.1)]), (16, [])]
ALL = [
    (70, [(8, (0, 13), 0.0), (4, (13, 37), 0.5), (2, None, 0.0)]),
    (48, [(4, (5, 20), 0.1), (4, (20, 37), 0.1)]),
]
LAYOUTS = {"qkv": QKV, "several": SEVERAL, "mixed": MIXED, "plain": PLAIN, "all": ALL}


def _case(
    layout, m: int, k: int, dtype: torch.dtype, *, lora_dtype=None, bias: bool = True, dense=()
) -> tuple[Tensor, list[Member]]:
    """x [m, k] and the members of a layout; those numbered in `dense` are not quantized."""
    low = lora_dtype or dtype
    members = []
    for i, (n, adapters) in enumerate(layout):
        weight = torch.randn(n, k) * 0.05
        weight = weight.to(dtype) if i in dense else NF4Weight.from_dense(weight, nested=i % 2 == 0)
        found = [
            Adapter(
                (torch.randn(r, k) / k**0.5).to(low),
                (torch.randn(n, r) * 0.1).to(low),
                0.5 + j,
                p,
                torch.tensor([77 + j + 10 * i]) if p else None,
                rows,
            )
            for j, (r, rows, p) in enumerate(adapters)
        ]
        members.append(Member(weight, torch.randn(n).to(dtype) if bias else None, found))
    return torch.randn(m, k).to(dtype), members


def _leaves(x: Tensor, members: list[Member], dtype=None, low=None) -> tuple[Tensor, list[Member]]:
    """Copies that want gradients, in other dtypes where given."""
    leaf = lambda t, to: None if t is None else t.detach().to(to or t.dtype, copy=True).requires_grad_()  # noqa: E731
    copies = [
        replace(
            m,
            bias=leaf(m.bias, dtype),
            adapters=[replace(a, lora_a=leaf(a.lora_a, low), lora_b=leaf(a.lora_b, low)) for a in m.adapters],
        )
        for m in members
    ]
    return leaf(x, dtype), copies


def to(
    x: Tensor, members: list[Member], dys: list[Tensor], device: str
) -> tuple[Tensor, list[Member], list[Tensor]]:
    """All of it on a device."""
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    moved = [
        replace(
            m,
            weight=move(m.weight),
            bias=move(m.bias),
            adapters=[
                replace(a, lora_a=move(a.lora_a), lora_b=move(a.lora_b), seed=move(a.seed))
                for a in m.adapters
            ],
        )
        for m in members
    ]
    return move(x), moved, [move(dy) for dy in dys]


def _named(x: Tensor, members: list[Member], outputs) -> dict[str, Tensor]:
    found = {"dx": x.grad} | {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    for i, member in enumerate(members):
        found |= {} if member.bias is None else {f"d_bias{i}": member.bias.grad}
        for j, adapter in enumerate(member.adapters):
            found |= {f"d_lora_a{i}.{j}": adapter.lora_a.grad, f"d_lora_b{i}.{j}": adapter.lora_b.grad}
    return found


def _ours(x: Tensor, members: list[Member], dys: list[Tensor]) -> dict[str, Tensor]:
    x, members = _leaves(x, members)
    outputs = qlora_group(x, members)
    torch.autograd.backward(outputs, dys)
    return _named(x, members, outputs)


@products_of_many_rows
def _plain(
    x: Tensor, members: list[Member], dys: list[Tensor], dtype: torch.dtype, low: torch.dtype
) -> dict[str, Tensor]:
    """Plain PyTorch, member by member and adapter by adapter."""
    x, members = _leaves(x, members, dtype, low)
    outputs = []
    for member in members:
        dense = (
            member.weight if isinstance(member.weight, Tensor) else member.weight.dequantize(torch.float32)
        )
        y = linear(x, dense.to(dtype), member.bias)
        for a in member.adapters:
            begin, end = a.rows or (0, len(x))
            part = x[begin:end].to(low)
            part = part * dropout_scale(*part.shape, a.dropout_p, a.seed).to(low) if a.dropout_p else part
            low_rank = (a.scaling * (part @ a.lora_a.t() @ a.lora_b.t())).to(dtype)
            y = y + torch.cat(
                [y.new_zeros(begin, y.shape[1]), low_rank, y.new_zeros(len(x) - end, y.shape[1])]
            )
        outputs.append(y)
    torch.autograd.backward(outputs, [dy.to(dtype) for dy in dys])
    return _named(x, members, outputs)


def _check(layout, m: int, k: int, dtype: torch.dtype, *, draws: int = 4, **options) -> None:
    runs = []
    for _ in range(draws):
        x, members = _case(layout, m, k, dtype, **options)
        dys = [torch.randn(m, n).to(dtype) for n, _ in layout]
        low = options.get("lora_dtype") or dtype
        exact = _plain(x, members, dys, torch.float64, torch.float64)
        runs.append((_ours(x, members, dys), _plain(x, members, dys, dtype, low), exact))
    for name in runs[0][2]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


@pytest.mark.parametrize("layout, dtype", each_choice(LAYOUTS, DTYPES))
def test_every_output_and_gradient(isa: str, layout: str, dtype: torch.dtype) -> None:
    _check(LAYOUTS[layout], 37, 100, dtype)


@pytest.mark.parametrize("m", [1, 5, 600])
def test_every_number_of_rows(isa: str, m: int) -> None:
    """Of the GEMV, of one panel, of several blocks of rows."""
    half = m // 2
    layout = [(96, [(8, None, 0.1)]), (32, [(4, (0, half), 0.0), (4, (half, m), 0.3)])]
    _check(layout, m, 192, torch.float32, draws=2 if m > 64 else 8)


@pytest.mark.parametrize("regime", ["gemv", "gemm", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_regime_serves_the_same_call(
    isa: str, regime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_rows, "choose", lambda **_: config.Choice(regime, "forced by the test"))
    _check(ALL, 37, 192, dtype)
    _check([(600, [(4, None, 0.0)]), (64, [])], 37, 192, dtype, dense=(1,))
    _check([(64, [(4, None, 0.0)]), (32, [])], 37, 192, dtype, dense=(0, 1))


def test_adapters_in_fp32_beside_bf16_activations(isa: str) -> None:
    _check(ALL, 37, 128, torch.bfloat16, lora_dtype=torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_agrees(layout: str) -> None:
    x, members = _case(LAYOUTS[layout], 37, 100, torch.float32)
    dys = [torch.randn(37, n) for n, _ in LAYOUTS[layout]]
    with use_backend("reference"):
        ours = _ours(x, members, dys)
    exact = _plain(x, members, dys, torch.float64, torch.float64)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), exact[name].double(), rtol=2e-5, atol=2e-5, msg=name)


def test_a_group_of_one_is_the_linear(isa: str) -> None:
    """Bit for bit: it is the same engine."""
    x, (member,) = _case([(96, [(8, None, 0.25)])], 40, 192, torch.bfloat16)
    adapter = member.adapters[0]
    single = qlora_linear(
        x,
        member.weight,
        member.bias,
        adapter.lora_a,
        adapter.lora_b,
        scaling=adapter.scaling,
        dropout_p=0.25,
        seed=adapter.seed,
    )
    assert torch.equal(single, qlora_group(x, [member])[0])


def test_two_runs_give_the_same_bits(isa: str) -> None:
    x, members = _case(ALL, 37, 320, torch.bfloat16)
    dys = [torch.randn(37, n).bfloat16() for n, _ in ALL]
    first, second = _ours(x, members, dys), _ours(x, members, dys)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_member_nobody_uses_gets_no_gradient_and_costs_nothing(isa: str) -> None:
    x, members = _case(QKV, 20, 64, torch.float32)
    x, members = _leaves(x, members)
    q, _, v = qlora_group(x, members)
    (q.sum() + 2 * v.sum()).backward()
    assert members[1].adapters[0].lora_a.grad is None and members[1].bias.grad is None
    expected, _ = _leaves(x, members)
    alone = qlora_group(expected, [replace(members[0], adapters=members[0].adapters), members[2]])
    (alone[0].sum() + 2 * alone[1].sum()).backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, members = _case(ALL, 37, 64, torch.float32)
    members[0].adapters[1].lora_b.requires_grad_()
    torch.autograd.backward(outputs := qlora_group(x, members), [torch.ones_like(y) for y in outputs])
    assert (
        members[0].adapters[1].lora_b.grad is not None
        and x.grad is None
        and members[0].adapters[0].lora_b.grad is None
    )


def test_no_rows() -> None:
    x, members = _case(QKV, 3, 64, torch.float32)
    x, members = _leaves(x[:0], members)
    outputs = qlora_group(x, members)
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert [tuple(y.shape) for y in outputs] == [(0, 96), (0, 33), (0, 32)] and x.grad.shape == (0, 64)
    assert not members[0].adapters[0].lora_a.grad.any() and not members[0].bias.grad.any()


def test_missing_seeds_are_drawn_from_torchs_generator() -> None:
    x, members = _case([(32, [(4, None, 0.0), (4, None, 0.0)])], 8, 64, torch.float32)
    dropped = [replace(members[0], adapters=[replace(a, dropout_p=0.5) for a in members[0].adapters])]
    torch.manual_seed(3)
    first = qlora_group(x, dropped)[0]
    torch.manual_seed(3)
    assert torch.equal(first, qlora_group(x, dropped)[0]) and not torch.equal(
        first, qlora_group(x, dropped)[0]
    )


def test_compiles_into_one_graph() -> None:
    x, members = _case(ALL, 37, 64, torch.float32)
    dys = [torch.randn(37, n) for n, _ in ALL]
    eager = _ours(x, members, dys)
    x, members = _leaves(x, members)
    outputs = torch.compile(qlora_group, fullgraph=True, backend="aot_eager")(x, members)
    torch.autograd.backward(outputs, dys)
    for name, value in _named(x, members, outputs).items():
        assert torch.equal(value, eager[name]), name


class _Record(TorchDispatchMode):
    """The calls of our ops, with detached arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "qlora_group" in str(func):
            self.calls.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_ops_pass_opcheck(backend: str) -> None:
    x, members = _leaves(*_case([*QKV, *ALL], 37, 64, torch.float32))
    with use_backend(backend), _Record() as record:
        outputs = qlora_group(x, members)
        torch.autograd.backward(
            (outputs[0], outputs[4]), [torch.ones_like(outputs[0]), torch.ones_like(outputs[4])]
        )
    assert [str(func) for func, _ in record.calls] == [
        "peftkern.qlora_group_fwd.default",
        "peftkern.qlora_group_bwd.default",
    ]
    with use_backend(backend):
        for func, args in record.calls:
            library.opcheck(func, args)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (
            dict(lora_b=torch.zeros(3, 3)),
            ValueError,
            r"members\[0\]\.adapters\[0\]\.lora_b: got shape \(3, 3\)",
        ),
        (
            dict(rows=(5, 99)),
            ValueError,
            r"adapters\[0\]\.rows: got \(5, 99\), expected 0 <= begin <= end <= 37",
        ),
        (dict(dropout_p=1.5), ValueError, r"adapters\[0\]\.dropout_p: got 1.5"),
        (dict(seed=torch.zeros(1), dropout_p=0.5), ValueError, r"adapters\[0\]\.seed"),
    ],
)
def test_errors_name_the_member_and_the_argument(change: dict, error: type, words: str) -> None:
    x, members = _case([(70, [(8, None, 0.0)])], 37, 64, torch.float32)
    with pytest.raises(error, match=words):
        qlora_group(x, [replace(members[0], adapters=[replace(members[0].adapters[0], **change)])])


def test_members_must_share_k() -> None:
    x, members = _case(QKV, 9, 64, torch.float32)
    other = Member(torch.randn(8, 32))
    with pytest.raises(ValueError, match=r"members\[3\]\.x: got shape \(9, 64\), expected \[\.\.\., 32\]"):
        qlora_group(x, [*members, other])
    with pytest.raises(ValueError, match="members: is empty"):
        qlora_group(x, [])
