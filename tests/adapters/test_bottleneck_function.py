"""The bottleneck adapter as one step of autograd, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.adapters.bottleneck import bottleneck
from peftkern.adapters.bottleneck import reference as definition

from ..ops.bounds import assert_as_accurate

NAMES = ("y", "x", "down", "up", "down_bias", "up_bias", "scaling")


def operands(
    m: int = 7,
    n: int = 12,
    k: int = 10,
    r: int = 3,
    *,
    same: bool = False,
    bias: bool = True,
    scaling: Any = 0.7,
    **options,
):
    """Random arguments of `bottleneck`, leaves that require grad."""
    options = {"dtype": torch.float64} | options
    y = torch.randn(m, n, **options)
    x = y if same else torch.randn(m, k, **options)
    found = {
        "y": y,
        "x": x,
        "down": torch.randn(r, x.shape[-1], **options),
        "up": torch.randn(n, r, **options),
    }
    found["down_bias"] = torch.randn(r, **options) if bias else None
    found["up_bias"] = torch.randn(n, **options) if bias else None
    sizes = {"learned": 1, "channel": n}
    found["scaling"] = torch.randn(sizes[scaling], **options) if isinstance(scaling, str) else scaling
    for value in found.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    return found


def leaves(found: dict[str, Any]) -> list[Tensor]:
    return list({id(value): value for value in found.values() if isinstance(value, Tensor)}.values())


@pytest.mark.parametrize("scaling", [0.7, "learned", "channel"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("activation", definition.ACTIVATIONS)
def test_output_and_every_gradient_are_those_of_the_definition(
    activation: str, same: bool, bias: bool, scaling: Any
) -> None:
    found = operands(same=same, bias=bias, scaling=scaling)
    got = bottleneck(*found.values(), activation=activation)
    exact = definition.bottleneck(*found.values(), activation=activation)
    torch.testing.assert_close(got, exact, rtol=2e-14, atol=2e-14)  # 6 % of that on a Zen 5
    dy = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves(found), dy),
        torch.autograd.grad(exact, leaves(found), dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=5e-14, atol=5e-14)  # 11 % of that on a Zen 5


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_can_be_differentiated_again(same: bool, bias: bool) -> None:
    found = operands(3, 4, 5, 2, same=same, bias=bias, scaling="learned")
    given = leaves(found)
    places = [
        [one is value for one in given].index(True) if isinstance(value, Tensor) else None
        for value in found.values()
    ]
    assert torch.autograd.gradgradcheck(
        lambda *t: bottleneck(*(None if i is None else t[i] for i in places)), given
    )


@pytest.mark.parametrize(("m", "r"), [(0, 3), (1, 1), (5, 1), (3, 64), (2, 256)])
def test_edges(m: int, r: int) -> None:
    found = operands(m, 6, 5, r)
    got = bottleneck(*found.values())
    torch.testing.assert_close(got, definition.bottleneck(*found.values()))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(got.sum(), leaves(found)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same", [True, False])
def test_the_base_is_left_as_it_is_where_up_is_zero_bit_for_bit(dtype: torch.dtype, same: bool) -> None:
    found = operands(65, 48, 40, 8, same=same, dtype=torch.float32)
    found = {
        key: value.detach().to(dtype) if key in "yx" else value
        for key, value in found.items()
        if value is not None
    }
    found["x"] = found["y"] if same else found["x"]
    with torch.no_grad():
        found["up"].zero_(), found["up_bias"].zero_()
    assert torch.equal(bottleneck(**found), found["y"])


def saved(function: Any) -> tuple[Any, list[Tensor]]:
    """What the function gives, and the tensors that are saved for backward meanwhile."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return result, kept


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_of_the_activations_only_x_and_z_are_saved(same: bool, autocast: bool, dropout_p: float) -> None:
    m, r = 33, 4
    found = operands(m, 24, 20, r, same=same, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, kept = saved(lambda: bottleneck(**found, dropout_p=dropout_p))
    parameters = {
        value.data_ptr()
        for key, value in found.items()
        if isinstance(value, Tensor) and key not in ("x", "y")
    }
    rows = [t for t in kept if t.data_ptr() not in parameters]
    of_x = [t for t in rows if t.data_ptr() == found["x"].data_ptr()]
    others = [tuple(t.shape) for t in rows if t.data_ptr() != found["x"].data_ptr()]
    assert len(of_x) == 1
    assert others == [(m, r)] * (2 if dropout_p else 1)  # z, and what dropout leaves


def test_nothing_is_saved_for_gradients_that_are_not_wanted() -> None:
    found = operands(9, 8, 8, 2, same=True, dtype=torch.float32)
    found["down"].requires_grad_(False)
    _, kept = saved(lambda: bottleneck(**found))
    assert found["y"].data_ptr() not in {t.data_ptr() for t in kept}


def rounded(dtype: torch.dtype, weights: torch.dtype, *, same: bool) -> tuple[dict[str, Tensor], Tensor]:
    """fp64 arguments and a gradient of the result that are numbers of these dtypes, at the size of a
    trained adapter's."""
    found = operands(64, 96, 80, 16, same=same, scaling="learned")
    with torch.no_grad():
        for name, value in found.items():
            scale = 1.0 if name in ("x", "y", "scaling") else value.shape[-1] ** -0.5
            value.copy_((value * scale).to(dtype if name in ("x", "y") else weights))
    return found, torch.randn(64, 96, dtype=torch.float64).to(dtype)


def results(
    function: Any, found: dict[str, Tensor], dy: Tensor, dtype: torch.dtype, weights: torch.dtype
) -> list[Tensor]:
    given = {
        key: value.detach().to(dtype if key in ("x", "y") else weights).requires_grad_()
        for key, value in found.items()
    }
    given["x"] = given["y"] if found["x"] is found["y"] else given["x"]
    out = function(*given.values())
    return [out.detach(), *torch.autograd.grad(out, leaves(given), dy.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_weights", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_errors_are_no_larger_than_those_of_plain_pytorch(
    dtype: torch.dtype, fp32_weights: bool, same: bool
) -> None:
    weights = torch.float32 if fp32_weights else dtype
    runs = []
    for _ in range(8):
        found, dy = rounded(dtype, weights, same=same)
        plain = [definition.bottleneck, found, dy, dtype, dtype]  # as autocast rounds the weights
        runs.append(
            (
                results(bottleneck, found, dy, dtype, weights),
                results(*plain),
                results(*plain[:3], torch.float64, torch.float64),
            )
        )
    for i, name in enumerate(["out", *(name for name in NAMES if name != "x" or not same)]):
        ours, theirs, exact = (torch.cat([run[which][i].flatten() for run in runs]) for which in range(3))
        assert_as_accurate(name, ours, theirs, exact)


def test_autocast_gives_the_dtype_of_y_and_finite_gradients() -> None:
    found = operands(16, 24, 20, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = bottleneck(**found)
    assert out.dtype == torch.float32
    exact = definition.bottleneck(**found)
    assert (out - exact).norm() <= 2**-6 * (exact - found["y"]).norm()
    grads = torch.autograd.grad(out.sum(), leaves(found))
    assert [g.dtype for g in grads] == [torch.float32] * 6 and all(torch.isfinite(g).all() for g in grads)


def test_dropout_keeps_the_expected_value_and_follows_torchs_seed() -> None:
    found = operands(4000, 2, 3, 8, dtype=torch.float32)
    torch.manual_seed(3)
    first = bottleneck(**found, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(first, bottleneck(**found, dropout_p=0.25))
    exact = bottleneck(**found)
    spread = (first - exact).std(0) / len(exact) ** 0.5
    assert ((first - exact).mean(0).abs() < 5 * spread).all() and (spread > 0).all()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("scaling", [0.5, "learned"])
def test_compiles_to_one_graph(same: bool, scaling: Any) -> None:
    found = operands(6, 8, 5, 2, same=same, scaling=scaling, dtype=torch.float32)
    compiled = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")
    out, expected = compiled(**found), bottleneck(**found)
    torch.testing.assert_close(out, expected)
    for got, exact in zip(
        torch.autograd.grad(out.sum(), leaves(found)),
        torch.autograd.grad(expected.sum(), leaves(found)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


def test_torch_func_sees_the_definition() -> None:
    found = operands(3, 4, 5, 2)
    constants = [value.detach() if isinstance(value, Tensor) else value for value in list(found.values())[2:]]
    y, x = found["y"].detach(), found["x"].detach()
    rows = torch.func.vmap(lambda a, b: bottleneck(a[None], b[None], *constants)[0])(y, x)
    torch.testing.assert_close(rows, definition.bottleneck(y, x, *constants))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": torch.ones(3, 9)}, r"down: got shape \(3, 9\), expected \[3, 10\]"),
        ({"up": torch.ones(3, 12)}, r"up: got shape \(3, 12\), expected \[12, 3\]"),
        ({"x": torch.ones(6, 10)}, r"x: got \(6, 10\), expected \(7, 'K'\)"),
        ({"up_bias": torch.ones(3)}, r"up_bias: got shape \(3,\), expected \[12\]"),
        ({"scaling": torch.ones(3)}, r"scaling: got shape \(3,\), expected a number, \[1\] or \[12\]"),
        ({"scaling": float("nan")}, "scaling: got nan, expected a finite number"),
        ({"activation": "selu"}, "activation: got 'selu', expected one of relu, silu"),
        ({"up": torch.ones(12, 3, device="meta")}, "up: is on meta, y is on cpu"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bottleneck(**operands(dtype=torch.float32) | changes)
