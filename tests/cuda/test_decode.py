"""Decoding in registers and the dropout's generator: every nibble in every place, against the definitions,
bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from peftkern.formats.nf4 import code_tensor
from peftkern.ops.philox import dropout_scale

from ..native.compiled import pointer
from .linear import load_probes


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_probes(tmp_path_factory)


def _tables() -> dict[str, Tensor]:
    """Both formats, and one that nobody uses: nothing may depend on which table it is."""
    other = torch.tensor(
        [
            3.5,
            -0.0,
            1e-3,
            -65000.0,
            7.0,
            -2.25,
            0.1,
            6e-8,
            -1e-7,
            12.0,
            -0.3,
            2.0**-14,
            511.0,
            -0.75,
            1.0,
            -9.0,
        ]
    )
    return {"nf4": code_tensor("nf4"), "fp4": code_tensor("fp4"), "other": other}


def _words() -> Tensor:
    """uint32 in int64: every 16-bit pattern in the low half, then in the high half, beside random bits."""
    every, random = torch.arange(1 << 16), torch.randint(0, 1 << 16, (1 << 16,))
    return torch.cat([every | random << 16, every << 16 | random])


def _nibbles(words: Tensor) -> Tensor:
    """[count, 8] code numbers in the packed order: byte 0 first, of a byte the high nibble first."""
    octets = torch.stack([words >> 8 * i & 255 for i in range(4)], dim=1)
    return torch.stack([octets >> 4, octets & 15], dim=2).view(-1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", ["nf4", "fp4", "other"])
def test_permutes_give_every_code_in_every_place(probe: ctypes.CDLL, table: str, dtype: torch.dtype) -> None:
    code, words = _tables()[table], _words()
    packed = (
        words.to(torch.int32)
        if words.max() < 1 << 31
        else torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    )
    out = torch.full((len(words), 4), -1, dtype=torch.int32)
    probe.probe_decode8(
        pointer(code), dtype == torch.bfloat16, pointer(packed), ctypes.c_int64(len(words)), pointer(out)
    )
    expected = code[_nibbles(words)].to(dtype)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("table", ["nf4", "fp4", "other"])
def test_pair_table_gives_fp32_codes(probe: ctypes.CDLL, table: str) -> None:
    """Every byte, in each of the four places, by every copy of the table."""
    code = _tables()[table]
    octets = torch.arange(256).repeat(16).view(-1, 4)
    words = sum(octets[:, i] << 8 * i for i in range(4))
    packed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    for turn in range(4):  # another place, read by other lanes
        rolled = packed.view(torch.uint8).roll(turn).view(torch.int32).contiguous()
        out = torch.full((len(words), 8), float("nan"))
        assert probe.probe_table(pointer(code), pointer(rolled), pointer(out), len(words)) == 0, (
            probe.pk_cuda_error_text()
        )
        expected = code[_nibbles(rolled.long() & 0xFFFFFFFF)]
        assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_pair_table_never_conflicts(probe: ctypes.CDLL) -> None:
    """An 8-byte access serves 16 lanes at once: whatever their bytes are, they must hit different banks of 4
    bytes."""
    for _ in range(200):
        octets = torch.randint(0, 256, (32,)).tolist()
        for half in (range(16), range(16, 32)):
            banks = [probe.probe_table_address(octets[lane], lane) // 4 % 32 // 2 for lane in half]
            assert len(set(banks)) == 16


@pytest.mark.parametrize("seed", [0, 7, -1, 1234567890123, -(1 << 63)])
@pytest.mark.parametrize("dropout_p", [0.0001, 0.1, 0.5, 1.0])
def test_dropout_mask_is_the_references(probe: ctypes.CDLL, dropout_p: float, seed: int) -> None:
    m, k = 5, 83
    mask = torch.full((m, k), float("nan"))
    threshold = ctypes.c_uint32(round(dropout_p * 65536))
    probe.probe_dropout(threshold, ctypes.c_int64(seed), ctypes.c_int64(m), ctypes.c_int64(k), pointer(mask))
    assert torch.equal(mask, dropout_scale(m, k, dropout_p, torch.tensor([seed])))
