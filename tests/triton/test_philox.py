"""The mask's tiles, bit for bit the reference's, wherever they start and whatever the seed."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops.philox import dropout_scale

triton = pytest.importorskip("triton")
tl = triton.language

from peftkern.ops.triton_philox import dropout_scale_tile  # noqa: E402


@triton.jit
def _scale_kernel(
    out, seed_ptr, threshold, row0, col0, stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    tile = dropout_scale_tile(seed_ptr, threshold, row0, col0, BLOCK_ROWS, BLOCK_COLS)
    rows, cols = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLS)[None, :]
    tl.store(out + rows * stride + cols, tile)


def _tile(device: str, seed: int, p: float, row0: int, col0: int, rows: int, cols: int) -> torch.Tensor:
    out = torch.full((rows, cols), torch.nan, device=device)
    seed = torch.tensor([seed], device=device)
    _scale_kernel[(1,)](out, seed, round(p * 65536), row0, col0, cols, BLOCK_ROWS=rows, BLOCK_COLS=cols)
    return out.cpu()


@pytest.mark.parametrize("seed", [0, 7, 1234567890123, -1, -(2**63), 2**63 - 1, 1 << 31, 1 << 32])
@pytest.mark.parametrize(
    "rows, cols, row0, col0", [(16, 64, 0, 0), (64, 32, 37, 8), (1, 128, 1000, 64), (32, 8, 5, 248)]
)
def test_tiles_equal_the_reference(
    device: str, seed: int, rows: int, cols: int, row0: int, col0: int
) -> None:
    exact = dropout_scale(row0 + rows, col0 + cols, 0.1, torch.tensor([seed]))[row0:, col0:]
    assert torch.equal(_tile(device, seed, 0.1, row0, col0, rows, cols), exact)


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.1, 0.3, 0.5, 0.9, 65535 / 65536, 1.0])
def test_every_probability(device: str, p: float) -> None:
    """The factor is the correctly rounded quotient; p = 0 keeps all, p = 1 nothing."""
    exact = dropout_scale(64, 128, p, torch.tensor([42]))
    assert torch.equal(_tile(device, 42, p, 0, 0, 64, 128), exact)
    assert bool(exact.all()) == (p == 0) or p == 1 / 65536


def test_rows_beyond_31_bits(device: str) -> None:
    """A counter word is the row's low 32 bits; nothing overflows on the way."""
    from peftkern.ops.philox import philox_4x32

    row0, seed = 2**31 - 8, torch.tensor([99])
    row, column = torch.arange(row0, row0 + 16)[:, None].expand(-1, 2), torch.arange(2).expand(16, -1)
    words = torch.stack(
        philox_4x32([column, row, torch.zeros_like(row), torch.zeros_like(row)], seed), dim=-1
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(16, 16)
    exact = (halves >= 32768).float() * 2
    assert torch.equal(_tile(device, 99, 0.5, row0, 0, 16, 16), exact)
