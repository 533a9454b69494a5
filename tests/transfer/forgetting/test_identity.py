"""What tells one base from another, of 4-bit weights too."""

from __future__ import annotations

import pytest
import torch

from peftkern.formats.nf4 import NF4Weight
from peftkern.transfer.forgetting.identity import _absmax

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (64, 64), (320, 128)])
def test_the_blocks_maxima_are_those_of_the_decoded_weight(shape: tuple[int, int], nested: bool) -> None:
    torch.manual_seed(0)
    weight = bnb.nn.Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=nested).to("cpu")
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compress_statistics=nested)
    layer.weight = weight
    layer.to("cpu")
    # Every block holds a weight at its maximum: NF4 has the codes -1 and 1.
    blocks = NF4Weight.from_bnb(layer.weight).dequantize(torch.float32).reshape(-1, 64)
    assert torch.equal(_absmax(layer.weight.quant_state), blocks.abs().amax(1))
