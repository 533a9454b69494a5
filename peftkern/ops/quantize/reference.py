"""Blockwise quantization in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize_4bit", "quantize_absmax"]


def _blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Index of the nearest code of values/absmax(block), and the absmax; a tie goes to the lower code, NaN to
    index 0."""
    flat = values.reshape(-1).float()
    blocks = -(-flat.numel() // blocksize)
    padded = torch.zeros(blocks * blocksize, dtype=torch.float32, device=flat.device)
    padded[: flat.numel()] = flat
    grouped = padded.view(blocks, blocksize)
    absmax = grouped.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=1)
    inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
    index = _nearest(grouped * inverse[:, None], code)
    return index.view(-1)[: flat.numel()].to(torch.uint8), absmax


def _nearest(scaled: Tensor, code: Tensor) -> Tensor:
    ordered, order = torch.sort(code, stable=True)
    thresholds = (ordered[:-1] + ordered[1:]) / 2
    rank = torch.bucketize(scaled.nan_to_num(nan=0.0), thresholds, right=False)
    return torch.where(scaled.isnan(), torch.zeros_like(rank), order[rank])


def quantize_4bit(w: Tensor, blocksize: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """w (any shape), code fp32 [16] -> packed uint8 [(numel+1)//2, 1], first element in the high nibble;
    absmax fp32 [blocks]."""
    index, absmax = _blockwise(w, code, blocksize)
    if index.numel() % 2:
        index = torch.cat(
            [index, _nearest(torch.zeros(1, dtype=torch.float32, device=code.device), code).to(torch.uint8)]
        )
    return (index[0::2] << 4 | index[1::2]).view(-1, 1), absmax


def quantize_absmax(absmax: Tensor, absmax_code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """absmax fp32 [blocks], absmax_code fp32 [256] sorted -> uint8 [blocks], fp32
    [ceil(blocks/blocksize)]."""
    return _blockwise(absmax, absmax_code, blocksize)
