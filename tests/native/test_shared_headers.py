"""formats.h, philox.h and checks.h, shared by the CPU's and the GPU's kernels: what they compute on the host
is the reference's, bit for bit, and no second copy of their rules is left in csrc/."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from peftkern import NF4Weight
from peftkern.formats.nf4 import code_tensor
from peftkern.ops.philox import dropout_scale
from peftkern.ops.quantize import reference

from .compiled import CSRC, c_weight, compile_objects, i64, link_shared, pointer
from .test_form import SOURCES

PROBES = """
#include "checks.h"
#include "philox.h"
using namespace pk;
extern "C" {
float probe_absmax(const pk_weight* w, int64_t block) { return absmax_of(*w, block); }
float probe_absmax_view(const pk_weight* w, int64_t block) {
  return absmax_of(Weight{(const uint8_t*)w->data, w->code, w->absmax, w->absmax_8bit, w->absmax_code,
                          w->nested_absmax, w->absmax_offset, log2_of(w->blocksize),
                          w->absmax ? 0 : log2_of(w->nested_blocksize)}, block);
}
void probe_codes(const uint8_t* packed, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; i++) out[i] = nibble(packed, i);
}
void probe_pack(const int32_t* codes, int64_t count, uint8_t* packed) {
  for (int64_t i = 0; i < count; i += 2) packed[i / 2] = pack_codes(codes[i], codes[i + 1]);
}
void probe_word(const int32_t* codes, uint32_t* word) {
  *word = 0;
  for (int i = 0; i < 8; i++) *word |= (uint32_t)codes[i] << code_shift(i);
}
void probe_quantize(const float* w, int64_t count, float absmax, const float* code, int32_t* out) {
  int order[CODES];
  float thresholds[CODES];
  for (int i = 0; i < CODES; i++) order[sorted_place(code, i)] = i;
  for (int i = 0; i < CODES - 1; i++) thresholds[i] = threshold_between(code[order[i]], code[order[i + 1]]);
  for (int64_t i = 0; i < count; i++) out[i] = order[rank_of(thresholds, w[i] * inverse_of(absmax))];
}
void probe_mask(uint32_t threshold, uint64_t seed, int64_t m, int64_t k, float* mask) {
  for (int64_t row = 0; row < m; row++)
    for (int64_t group = 0; group < k / 8; group++) {
      float values[8] = {1, 1, 1, 1, 1, 1, 1, 1};
      apply_mask(make_dropout(threshold, seed), (uint32_t)group, (uint32_t)row, values);
      for (int i = 0; i < 8; i++) mask[row * k + 8 * group + i] = values[i];
    }
}
int probe_window(const pk_weight* w, int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t ld,
                 int dtype) {
  return check_window(w, row, rows, col, cols, w, ld, dtype);
}
}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("headers")
    source = folder / "probes.cpp"
    source.write_text(PROBES)
    flags = [f"-I{CSRC}", "-Wall", "-Wextra", "-Werror"]
    lib = ctypes.CDLL(str(link_shared(compile_objects(folder, [(source, flags)]), folder / "libprobes.so")))
    lib.probe_absmax.restype = lib.probe_absmax_view.restype = ctypes.c_float
    return lib


@pytest.mark.parametrize("nested", [False, True])
def test_absmax_of_either_descriptor(probe: ctypes.CDLL, nested: bool) -> None:
    """600 blocks: three of the nested absmax, the last one short."""
    weight = NF4Weight.from_dense(torch.randn(600, 64), nested=nested)
    w, expected = c_weight(weight), weight.absmax
    if nested:
        scales = weight.nested_absmax.repeat_interleave(256)[:600]
        product = weight.absmax_code[weight.absmax_8bit.long()] * scales
        expected = product + weight.absmax_offset
    for read in (probe.probe_absmax, probe.probe_absmax_view):
        absmax = torch.tensor([read(ctypes.byref(w), i64(block)) for block in range(600)])
        assert torch.equal(absmax, expected)


def test_codes_in_bytes_and_words(probe: ctypes.CDLL) -> None:
    """Every byte, read and written; a little-endian word of eight codes has the same bytes."""
    packed = torch.arange(256, dtype=torch.uint8)
    codes = torch.full((512,), -1, dtype=torch.int32)
    probe.probe_codes(pointer(packed), i64(512), pointer(codes))
    assert torch.equal(codes.view(-1, 2), torch.stack([packed >> 4, packed & 15], dim=1).int())
    again = torch.zeros_like(packed)
    probe.probe_pack(pointer(codes), i64(512), pointer(again))
    assert torch.equal(again, packed)
    for start in range(0, 512, 8):
        word = torch.zeros(1, dtype=torch.int32)
        probe.probe_word(pointer(codes[start : start + 8]), pointer(word))
        assert torch.equal(word.view(torch.uint8), packed[start // 2 : start // 2 + 4])


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_nearest_codes(probe: ctypes.CDLL, table: str) -> None:
    """Random elements, and every threshold with the numbers beside it: a tie takes the lower code."""
    code = code_tensor(table)
    order = torch.sort(code, stable=True).values
    ties = (order[1:] + order[:-1]) * 0.5
    beside = torch.cat([ties, *(torch.nextafter(ties, torch.full_like(ties, to)) for to in (-9.0, 9.0))])
    w = torch.cat([torch.ones(1), beside, torch.zeros(3), torch.randn(13).clamp(-1, 1)])
    packed, absmax = reference.quantize_4bit(w, 64, code)
    assert len(w) <= 64 and absmax.item() == 1
    out = torch.full((len(w),), -1, dtype=torch.int32)
    probe.probe_quantize(pointer(w), i64(len(w)), ctypes.c_float(1.0), pointer(code), pointer(out))
    octets = packed.view(-1)
    expected = torch.stack([octets >> 4, octets & 15], dim=1).view(-1)[: len(w)]
    assert torch.equal(out, expected.int())
    probe.probe_quantize(pointer(w), i64(len(w)), ctypes.c_float(0.0), pointer(code), pointer(out))
    assert torch.equal(code[out.long()], torch.zeros(len(w)))


@pytest.mark.parametrize("dropout_p", [0.0001, 0.3, 1.0])
def test_mask(probe: ctypes.CDLL, dropout_p: float) -> None:
    mask = torch.full((5, 80), float("nan"))
    threshold = ctypes.c_uint32(round(dropout_p * 65536))
    probe.probe_mask(threshold, ctypes.c_uint64(1 << 63 | 5), i64(5), i64(80), pointer(mask))
    seed = torch.tensor([(1 << 63 | 5) - (1 << 64)])
    assert torch.equal(mask, dropout_scale(5, 80, dropout_p, seed))


@pytest.mark.parametrize(
    ("window", "dtype", "status"),
    [
        ((0, 4, 0, 64, 64), 1, 0),
        ((3, 1, 63, 1, 1), 2, 0),
        ((0, 5, 0, 64, 64), 0, 2),
        ((2, 2, -1, 3, 64), 0, 2),
        ((0, 4, 1, 64, 64), 0, 2),
        ((0, 4, 0, 64, 63), 0, 2),
        ((0, 4, 0, 64, 64), 3, 3),
    ],
)
def test_windows(probe: ctypes.CDLL, window: tuple[int, ...], dtype: int, status: int) -> None:
    """Of a weight [4, 64]: row, rows, col, cols, ld_out."""
    w = c_weight(NF4Weight.from_dense(torch.randn(4, 64)))
    assert probe.probe_window(ctypes.byref(w), *map(i64, window), dtype) == status


# What says a rule, and the one file that may.
ONCE = {
    r"0xD2511F53|0xCD9E8D57|0x9E3779B9|0xBB67AE85": "philox.h",
    r"\b65536\b|\b0x10000\b": "philox.h",
    r"\bint nibble\(": "formats.h",
    r"\bfloat absmax_of\(": "formats.h",
    r"\bint rank_of\(": "formats.h",
    r"\bbool bad_dtype\(": "checks.h",
    r"\bbool matrix\(": "checks.h",
    r"\bint check_weight\(": "checks.h",
    r"\"unknown dtype\"": "checks.h",
    r"\bint64_t ceil_div\(": "host_device.h",
    r"\bstruct Weight : pk_weight\b": "bindings.h",
}


@pytest.mark.parametrize("rule", ONCE)
def test_a_rule_is_written_once(rule: str) -> None:
    said: list[Path] = []
    for path in SOURCES:
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
        if re.search(rule, code):
            said.append(path.relative_to(CSRC))
    assert said == [Path(ONCE[rule])]
