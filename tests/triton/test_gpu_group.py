"""A group of QLoRA linears as a GPU runs it, every regime and layout against fp64."""

from __future__ import annotations

import pytest
import torch

from peftkern import use_backend
from peftkern.ops.linear import tuned

from ..cases import each_choice
from ..ops import test_qlora_group as group
from ..ops.bounds import assert_as_accurate
from .test_gpu_linear import ROWS


@pytest.mark.parametrize(("layout", "regime"), each_choice(group.LAYOUTS, ["cublas", "triton", "fused"]))
def test_every_output_and_gradient(device: str, layout: str, regime: str) -> None:
    x, members = group._case(group.LAYOUTS[layout], 37, 192, torch.bfloat16)
    dys = [torch.randn(37, n).bfloat16() for n, _ in group.LAYOUTS[layout]]
    exact = group._plain(x, members, dys, torch.float64, torch.float64)
    plain = group._plain(x, members, dys, torch.bfloat16, torch.bfloat16)
    x, members, dys = group.to(x, members, dys, device)
    with use_backend("triton"), tuned.use_row(ROWS[regime]):
        ours = group._ours(x, members, dys)
        again = group._ours(x, members, dys)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype and torch.equal(value, again[name]), name
        assert_as_accurate(name, value.cpu(), plain[name], exact[name])


def test_no_rows(device: str) -> None:
    x, members = group._case(group.ALL, 37, 64, torch.float32)
    members = [
        group.replace(m, adapters=[group.replace(a, rows=(0, 0)) for a in m.adapters]) for m in members
    ]
    x, members, dys = group.to(x[:0], members, [torch.empty(0, n) for n, _ in group.ALL], device)
    with use_backend("triton"):
        ours = group._ours(x, members, dys)
    assert ours["dx"].shape == (0, 64) and not any(ours[name].any() for name in ours if name.startswith("d_"))
