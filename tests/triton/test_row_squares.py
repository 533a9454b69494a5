"""The Triton kernel that squares rows of a 4-bit weight, against fp64 on the exact values."""

from __future__ import annotations

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.formats.nf4 import operands

pytest.importorskip("triton")

from peftkern.ops.row_squares import triton as kernels  # noqa: E402


# Groups of four words, of one, and none at all; more than one step of each; blocks across rows; one weight.
@pytest.mark.parametrize(
    "shape", [(3, 192), (5, 4128), (4, 40), (2, 4136), (5, 333), (2, 1025), (1, 1)], ids=str
)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_against_exact_squares(device: str, shape: tuple[int, int], nested: bool, blocksize: int) -> None:
    with use_backend("reference"):
        weight = NF4Weight.from_dense(torch.randn(shape), nested=nested, blocksize=blocksize)
        exact = weight.dequantize(torch.float32).double().square().sum(1)
    packed, quant = operands(weight.to(device))
    squares = kernels.row_squares(packed, *quant, *shape)
    assert squares.dtype == torch.float32
    torch.testing.assert_close(squares.cpu().double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dense_weight(device: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 70, device=device).to(dtype)
    squares = kernels.row_squares(weight, *operands(weight)[1], 9, 70)
    torch.testing.assert_close(squares.double(), weight.double().square().sum(1), rtol=2e-6, atol=0)
