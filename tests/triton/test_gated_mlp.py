"""A gated MLP on the GPU's plans: its gradients against fp64, and when the product that was not kept is
formed again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from peftkern import use_backend  # noqa: E402
from peftkern.functional import Adapter, Member  # noqa: E402
from peftkern.ops.glu import triton as glu  # noqa: E402
from peftkern.ops.linear import tuned  # noqa: E402

from ..cases import each_choice  # noqa: E402
from ..ops import test_gated_mlp as mlp  # noqa: E402
from ..ops.bounds import FACTOR, relative_norm  # noqa: E402
from .test_gpu_linear import ROWS  # noqa: E402

PLANS = {name: ROWS[name] for name in ("fused", "cublas", "triton", "triton, slices")}


def _moved(device: str, member: Member) -> Member:
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    adapters = [
        replace(a, lora_a=to(a.lora_a), lora_b=to(a.lora_b), seed=to(a.seed)) for a in member.adapters
    ]
    return Member(to(member.weight), to(member.bias), adapters)


def _on(
    device: str, row: str, x: torch.Tensor, members: mlp.Members, dy: torch.Tensor, **options
) -> dict[str, torch.Tensor]:
    moved = {name: _moved(device, member) for name, member in members.items()}
    with use_backend("triton"), tuned.use_row(PLANS[row]):
        found = mlp.ours(x.to(device), moved, dy.to(device), **options)
    return {name: value.cpu() for name, value in found.items()}


def _check(device: str, row: str, layout: str, dtype: torch.dtype, **options) -> None:
    x, members = mlp.case(layout, 40, dtype, **options)
    dy = torch.randn(40, mlp.N).to(dtype)
    exact, plain = (mlp.plain(x, members, dy, "silu", wide, wide) for wide in (torch.float64, dtype))
    for name, got in _on(device, row, x, members, dy).items():
        assert got.dtype == plain[name].dtype
        allowed = max(FACTOR * relative_norm(plain[name], exact[name]), torch.finfo(dtype).eps)
        assert relative_norm(got, exact[name]) <= allowed, name


DTYPES = [torch.float16, torch.bfloat16]
QUICK = [  # layout and dtype by twos: all four pairs of them, one a plan
    (torch.float16, "fused", "apart"),
    (torch.bfloat16, "cublas", "apart"),
    (torch.bfloat16, "triton", "packed"),
    (torch.float16, "triton, slices", "packed"),
]


@pytest.mark.parametrize(("dtype", "row", "layout"), each_choice(DTYPES, PLANS, mlp.LAYOUTS, quick=QUICK))
def test_every_output_and_gradient(device: str, dtype: torch.dtype, row: str, layout: str) -> None:
    _check(device, row, layout, dtype)


OPTIONS = [{"dropout": 0.25, "bias": True}, {"adapters": ("down",)}, {"adapters": ("gate", "up")}]


@pytest.mark.parametrize(("options", "row"), each_choice(OPTIONS, ["triton", "cublas"]))
def test_options(device: str, options: dict, row: str) -> None:
    _check(device, row, "apart", torch.float16, **options)


def test_a_second_adapter_on_the_outer_linear(device: str) -> None:
    """Composed of the group's plans."""
    x, members = mlp.case("apart", 40, torch.float16)
    further = Adapter(
        torch.randn(4, mlp.WIDTH).half() / 8, torch.randn(mlp.N, 4).half() * 0.1, 1.0, 0.0, None
    )
    members["down"] = replace(members["down"], adapters=[*members["down"].adapters, further])
    dy = torch.randn(40, mlp.N).half()
    with use_backend("cpu"):
        expected = mlp.ours(x, members, dy)
    for name, got in _on(device, "triton", x, members, dy).items():
        torch.testing.assert_close(got, expected[name], rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize(
    ("row", "order"),
    [
        ("fused", ["h", "d_h, h"]),
        ("triton", ["h", "d_h, h"]),
        ("triton, slices", ["h", "d_h, h"]),
        ("cublas", ["h", "h", "d_h"]),
    ],
)
def test_the_product_is_formed_with_its_gradient_where_dx_comes_first(
    device: str, row: str, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward, backward = [], glu.forward, glu.backward
    monkeypatch.setattr(glu, "forward", lambda *args: seen.append("h") or forward(*args))
    monkeypatch.setattr(
        glu, "backward", lambda *args: seen.append("d_h" if args[-1] is None else "d_h, h") or backward(*args)
    )
    x, members = mlp.case("apart", 40, torch.float16)
    _on(device, row, x, members, torch.randn(40, mlp.N).half())
    assert seen == order


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b", "inner"])
def test_what_needs_no_gradient_changes_no_other(device: str, frozen: str) -> None:
    x, members = mlp.case("apart", 40, torch.float16)
    dy = torch.randn(40, mlp.N).half()
    whole = _on(device, "triton", x, members, dy)
    leaf, copies = mlp.leaves(
        x.to(device), {name: _moved(device, member) for name, member in members.items()}
    )
    if frozen == "inner":
        parts = [
            leaf,
            *(t for name in ("gate", "up") for a in copies[name].adapters for t in (a.lora_a, a.lora_b)),
        ]
    else:
        parts = [getattr(copies["down"].adapters[0], frozen)]
    for part in parts:
        part.requires_grad_(False)
    with use_backend("triton"), tuned.use_row(PLANS["triton"]):
        y = mlp.call(leaf, copies)
        y.backward(dy.to(device))
    missing = (
        ("dx", "d_lora_a gate", "d_lora_b gate", "d_lora_a up", "d_lora_b up")
        if frozen == "inner"
        else (f"d_{frozen} down",)
    )
    for name, value in mlp.named(leaf, copies, y).items():
        assert value is None if name in missing else torch.equal(value.cpu(), whole[name]), name
