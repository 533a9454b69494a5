"""The Triton kernels that scale columns, against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern.ops.scale_columns import reference  # noqa: E402
from peftkern.ops.scale_columns import triton as kernels  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (70, 130), (9, 64), (0, 5)], ids=str)
def test_against_the_reference(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Elementwise results to the bit, sums but for their order."""
    u, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    scale, bias = torch.randn(shape[1], device=device), torch.randn(shape[1], device=device).to(dtype)
    one_rounding = {
        "rtol": torch.finfo(dtype).eps,
        "atol": 1e-6,
    }  # a fused multiply and add may round another way
    torch.testing.assert_close(
        kernels.forward(u, scale, bias), reference.forward(u, scale, bias), **one_rounding
    )
    assert torch.equal(kernels.forward(u, scale, None), reference.forward(u, scale, None))
    ours, expected = (module.backward(dy, u, scale, [True, True, True]) for module in (kernels, reference))
    assert torch.equal(ours[0], expected[0])
    for got, want in zip(ours[1:], expected[1:], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    only = kernels.backward(dy, u, scale, [False, True, False])
    assert only[0] is None and only[2] is None and torch.equal(only[1], ours[1])
