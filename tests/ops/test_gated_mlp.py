"""Gated MLPs, gate and up apart or as the halves of one linear, against fp64, bounded by plain PyTorch's own
error, on every ISA level."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, library
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from peftkern import NF4Weight, use_backend
from peftkern.functional import Adapter, Member, gated_mlp, gated_mlp_packed
from peftkern.ops.glu import ACTIVATIONS
from peftkern.ops.philox import dropout_scale

from .bounds import FACTOR, assert_as_accurate, relative_norm
from .test_glu import ACTS, DTYPES

K, WIDTH, N = 48, 70, 33  # ragged: no whole block of 64, no whole vector
LAYOUTS = {"apart": ("gate", "up", "down"), "packed": ("gate_up", "down")}
EITHER = pytest.mark.parametrize("layout", LAYOUTS)
# from here on sums over rows are near Gaussian, and the worst of their errors a figure to compare (`check`)
ROWS = 131
Members = dict[str, Member]


def case(
    layout: str,
    m: int,
    dtype: torch.dtype,
    *,
    adapters: Iterable[str] | None = None,
    dropout: float = 0.0,
    bias: bool = False,
    dense: bool = False,
    low: torch.dtype | None = None,
) -> tuple[Tensor, Members]:
    """x [m, K] and the members; `adapters`: which have one, by default all.

    A common direction of x and the weights keeps gate and up near +-1, and adapters of 16 and more ranks
    across it keep their rows alike.
    Of freely drawn ones the errors are products of four Gaussians: their worst of 10^5 is 10 to 40 times
    their root mean square (measured), which varies too much between samples to be compared with another's.
    """
    shapes = {"gate": (WIDTH, K), "up": (WIDTH, K), "gate_up": (2 * WIDTH, K), "down": (N, WIDTH)}
    names, members = LAYOUTS[layout], {}
    common = torch.randint(0, 2, (1, K)) * 2.0 - 1
    for i, name in enumerate(names):
        n, k = shapes[name]
        sign = torch.randint(0, 2, (n, 1)) * 2 - 1
        weight = sign * (common if k == K else 0) / k + torch.randn(n, k) * 0.4 / k**0.5
        found = []
        if adapters is None or name in adapters:
            a, b = torch.randn(16 + i, k) / k**0.5, torch.randn(n, 16 + i) * 0.1
            a -= (a @ common.t() @ common if k == K else 0) / K
            a, b = a.to(low or dtype), b.to(low or dtype)
            found = [Adapter(a, b, 0.5 + i, dropout, torch.tensor([77 + i]) if dropout else None)]
        packed = weight.to(dtype) if dense else NF4Weight.from_dense(weight, nested=i % 2 == 0)
        members[name] = Member(packed, torch.randn(n).to(dtype) if bias else None, found)
    return (common + 0.5 * torch.randn(m, K)).to(dtype), members


def leaves(
    x: Tensor, members: Members, dtype: torch.dtype | None = None, low: torch.dtype | None = None
) -> tuple[Tensor, Members]:
    """Copies that want gradients, in other dtypes where given."""
    leaf = lambda t, to: None if t is None else t.detach().to(to or t.dtype, copy=True).requires_grad_()  # noqa: E731
    copies = {
        name: replace(
            member,
            bias=leaf(member.bias, dtype),
            adapters=[
                replace(a, lora_a=leaf(a.lora_a, low), lora_b=leaf(a.lora_b, low)) for a in member.adapters
            ],
        )
        for name, member in members.items()
    }
    return leaf(x, dtype), copies


def named(x: Tensor, members: Members, y: Tensor) -> dict[str, Tensor]:
    found = {"y": y.detach(), "dx": x.grad}
    for name, member in members.items():
        found |= {} if member.bias is None else {f"d_bias {name}": member.bias.grad}
        for a in member.adapters:
            found |= {f"d_lora_a {name}": a.lora_a.grad, f"d_lora_b {name}": a.lora_b.grad}
    return found


def call(x: Tensor, members: Members, activation: str = "silu", **options) -> Tensor:
    function = gated_mlp_packed if "gate_up" in members else gated_mlp
    return function(x, *members.values(), activation=activation, **options)


def ours(x: Tensor, members: Members, dy: Tensor, activation: str = "silu", **options) -> dict[str, Tensor]:
    x, members = leaves(x, members)
    y = call(x, members, activation, **options)
    y.backward(dy)
    return named(x, members, y)


def _plain_linear(x: Tensor, member: Member, dtype: torch.dtype, low: torch.dtype) -> Tensor:
    dense = member.weight if isinstance(member.weight, Tensor) else member.weight.dequantize(torch.float32)
    y = linear(x, dense.to(dtype), member.bias)
    for a in member.adapters:
        part = x.to(low)
        part = part * dropout_scale(*part.shape, a.dropout_p, a.seed).to(low) if a.dropout_p else part
        y = y + (a.scaling * (part @ a.lora_a.t() @ a.lora_b.t())).to(dtype)
    return y


def plain(
    x: Tensor,
    members: Members,
    dy: Tensor,
    activation: str,
    dtype: torch.dtype,
    low: torch.dtype,
    gate_first: bool = True,
) -> dict:
    """Plain PyTorch, linear by linear."""
    x, members = leaves(x, members, dtype, low)
    inner = [_plain_linear(x, member, dtype, low) for name, member in members.items() if name != "down"]
    gate, up = (
        inner if len(inner) == 2 else inner[0].chunk(2, -1) if gate_first else inner[0].chunk(2, -1)[::-1]
    )
    y = _plain_linear(ACTS[activation](gate) * up, members["down"], dtype, low)
    y.backward(dy.to(dtype))
    return named(x, members, y)


def check(
    layout: str,
    m: int,
    dtype: torch.dtype,
    activation: str = "silu",
    *,
    draws: int = 0,
    gate_first: bool = True,
    **options,
) -> None:
    """Of fewer than ROWS rows the norm of the error alone is compared: the worst of products of three and
    four Gaussians varies too much from sample to sample (kurtosis 15 to 30, measured)."""
    runs, low = [], options.get("low") or dtype
    order = {"gate_first": gate_first} if layout == "packed" else {}
    for _ in range(draws or 6):
        x, members = case(layout, m, dtype, **options)
        dy = torch.randn(m, N).to(dtype)
        exact = plain(x, members, dy, activation, torch.float64, torch.float64, gate_first)
        runs.append(
            (
                ours(x, members, dy, activation, **order),
                plain(x, members, dy, activation, dtype, low, gate_first),
                exact,
            )
        )
    for name in runs[0][2]:
        got, plainly, exactly = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        assert got.dtype == plainly.dtype, name
        if m >= ROWS:
            assert_as_accurate(name, got, plainly, exactly)
        else:
            assert (
                relative_norm(got, exactly)
                <= FACTOR * relative_norm(plainly, exactly) + torch.finfo(dtype).eps / 8
            ), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dense", [False, True], ids=["nf4", "dense"])
@EITHER
def test_every_output_and_gradient(
    isa: str, layout: str, dense: bool, activation: str, dtype: torch.dtype
) -> None:
    check(layout, ROWS, dtype, activation, dense=dense)


@pytest.mark.parametrize("m", [1, 5, 300])
@EITHER
def test_every_number_of_rows(isa: str, layout: str, m: int) -> None:
    check(layout, m, torch.float32, draws={1: 24, 5: 12, 300: 4}[m])


SUBSETS = [(), ("gate",), ("up",), ("down",), ("gate", "up"), ("gate", "down"), ("gate_up",)]


@pytest.mark.parametrize("adapters", SUBSETS, ids="+".join)
@EITHER
def test_adapters_on_any_of_its_linears(layout: str, adapters: tuple[str, ...]) -> None:
    """Many draws: of the 33 numbers of a bias' gradient the worst error of six is noise (0.8 to 2.2 times
    PyTorch's, of 24 up to 1.1)."""
    check(layout, ROWS, torch.float32, "gelu", draws=24, adapters=adapters, bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EITHER
def test_dropout_and_bias(isa: str, layout: str, dtype: torch.dtype) -> None:
    check(layout, ROWS, dtype, dropout=0.3, bias=True)


@EITHER
def test_adapters_in_fp32_beside_bf16_activations(isa: str, layout: str) -> None:
    check(layout, ROWS, torch.bfloat16, low=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_may_be_the_second_half(isa: str, dtype: torch.dtype) -> None:
    check("packed", ROWS, dtype, "gelu_tanh", gate_first=False, dropout=0.2)


@EITHER
def test_the_reference_agrees(layout: str) -> None:
    x, members = case(layout, 37, torch.float32, dropout=0.2, bias=True)
    dy = torch.randn(37, N)
    with use_backend("reference"):
        got = ours(x, members, dy, "gelu")
    exact = plain(x, members, dy, "gelu", torch.float64, torch.float64)
    for name, value in got.items():
        torch.testing.assert_close(
            value.double(), exact[name], rtol=2e-5, atol=2e-5 * exact[name].abs().max().item(), msg=name
        )


def test_packed_is_apart_bit_for_bit(isa: str) -> None:
    """The halves are read and written where they lie; one product of 2I columns has the sums of two of I."""
    x, members = case("packed", 37, torch.bfloat16, dense=True, adapters=())
    gate, up = (Member(half.contiguous()) for half in members["gate_up"].weight.chunk(2))
    dy = torch.randn(37, N).bfloat16()
    assert torch.equal(
        ours(x, members, dy)["y"], ours(x, {"gate": gate, "up": up, "down": members["down"]}, dy)["y"]
    )


@EITHER
def test_no_rows(isa: str, layout: str) -> None:
    x, members = leaves(*case(layout, 0, torch.float32, bias=True, dropout=0.1))
    y = call(x.reshape(2, 0, K), members)
    y.sum().backward()
    assert y.shape == (2, 0, N) and x.grad.shape == (0, K)
    assert all(not grad.any() for name, grad in named(x, members, y).items() if name.startswith("d_"))


@EITHER
def test_leading_dimensions_and_strides_of_x(layout: str) -> None:
    x, members = case(layout, 30, torch.float32)
    wide = torch.cat([x, x], 1).reshape(2, 15, 2 * K)[..., :K]
    assert not wide.is_contiguous()
    assert torch.equal(call(wide, members), call(x, members).reshape(2, 15, N))


@EITHER
def test_only_what_needs_a_gradient_gets_one(layout: str) -> None:
    for wanted in LAYOUTS[layout]:
        for which in ("lora_a", "lora_b"):
            x, members = case(layout, 9, torch.float32)
            dy = torch.ones(9, N)
            expected = ours(x, members, dy)
            getattr(members[wanted].adapters[0], which).requires_grad_()
            call(x, members).backward(dy)
            got = {
                name: grad
                for name, grad in named(x, members, torch.empty(0)).items()
                if name != "y" and grad is not None
            }
            assert list(got) == [f"d_{which} {wanted}"]
            assert torch.equal(got[f"d_{which} {wanted}"], expected[f"d_{which} {wanted}"])


@EITHER
def test_a_gradient_of_x_alone(layout: str) -> None:
    x, members = case(layout, 9, torch.float32)
    expected = ours(x, members, torch.ones(9, N))["dx"]
    x.requires_grad_()
    call(x, members).backward(torch.ones(9, N))
    assert torch.equal(x.grad, expected)


@EITHER
def test_neither_the_activation_nor_the_product_is_kept(layout: str) -> None:
    """Kept are x, gate and up once each, xa of the adapters, and what the caller holds anyway."""
    m = 40
    x, members = leaves(*case(layout, m, torch.float32, dense=True))
    held = {x.data_ptr()} | {
        t.data_ptr() for member in members.values() for t in (member.weight, *_low(member))
    }
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.numel() and t.data_ptr() not in held:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = call(x, members)
    ranks = sum(a.lora_a.shape[0] for member in members.values() for a in member.adapters)
    assert y.requires_grad and sum(saved.values()) == 4 * m * (2 * WIDTH + ranks)


def _low(member: Member) -> list[Tensor]:
    return [t for a in member.adapters for t in (a.lora_a, a.lora_b)]


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    x, members = case("packed", 8, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        assert not call(x, members).requires_grad
    assert not saved


@EITHER
def test_inputs_and_the_incoming_gradient_are_not_written(layout: str) -> None:
    x, members = case(layout, 21, torch.float32)
    dy = torch.randn(21, N)
    before = x.clone(), dy.clone()
    ours(x, members, dy)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@EITHER
def test_two_backward_passes_give_the_same_bits(isa: str, layout: str) -> None:
    x, members = case(layout, 37, torch.bfloat16, dropout=0.2, bias=True)
    dy = torch.randn(37, N).bfloat16()
    first, second = ours(x, members, dy), ours(x, members, dy)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    leaf, copies = leaves(x, members)
    y = call(leaf, copies)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    assert torch.equal(leaf.grad, 2 * first["dx"]), "the second pass must not find what the first one left"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@EITHER
def test_compiles_into_one_graph(layout: str, backend: str) -> None:
    x, members = case(layout, 37, torch.float32, bias=True)
    dy = torch.randn(37, N)
    eager = ours(x, members, dy, "gelu")
    x, members = leaves(x, members)
    y = torch.compile(call, fullgraph=True, backend=backend)(x, members, "gelu")
    y.backward(dy)
    for name, value in named(x, members, y).items():
        assert torch.equal(value, eager[name]), name


class _Recorded(TorchDispatchMode):
    """The arguments of one op's call."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.peftkern.qlora_glu_bwd.default:
            self.args = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args)
        return func(*args, **(kwargs or {}))


@EITHER
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck_of_the_second_half(layout: str, backend: str) -> None:
    x, members = case(layout, 5, torch.float32, dropout=0.1, bias=True)
    with use_backend(backend), _Recorded() as recorded:
        ours(x, members, torch.randn(5, N))
        library.opcheck(torch.ops.peftkern.qlora_glu_bwd.default, recorded.args)


def test_errors_name_the_member_and_the_argument() -> None:
    x, members = case("apart", 9, torch.float32)
    gate, up, down = members.values()
    _, packed = case("packed", 9, torch.float32)
    with pytest.raises(ValueError, match="activation: got 'relu', expected one of"):
        gated_mlp(x, gate, up, down, activation="relu")
    with pytest.raises(ValueError, match=r"up: got a weight \(33, 70\), gate's is \(70, 48\)"):
        gated_mlp(x, gate, down, down)
    with pytest.raises(ValueError, match=r"down\.x: got shape \(9, 70\), expected \[\.\.\., 48\]"):
        gated_mlp(x, gate, up, gate)
    with pytest.raises(
        ValueError, match=r"gate_up: got a weight \(33, 70\), expected \[2I, K\], an even number of rows"
    ):
        gated_mlp_packed(x, down, down)
    with pytest.raises(ValueError, match=r"down\.x: got shape \(9, 70\), expected"):
        gated_mlp_packed(x, packed["gate_up"], gate)
    with pytest.raises(ValueError, match=r"gate_up\.x: got shape \(9, 3\), expected \[\.\.\., 48\]"):
        gated_mlp_packed(x[:, :3], packed["gate_up"], packed["down"])
