"""The CUDA GEMV and the xa kernel, emulated on the CPU and, with -m gpu, on a device: against fp64, or bit
for bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from .device_library import CudaLibrary
from .linear import (
    FLOATS,
    Case,
    assert_accurate,
    exact,
    linear,
    load_probes,
    make_case,
    random_weight,
    run_xa,
)

GEMV = "pk_gemv_4bit_cuda"
# (M, N, K, R): every number of rows that x is read by, ragged N, K in pieces of 32 and not, one step and
# several, ranks of every class.
SHAPES = [
    (1, 33, 64, 8),
    (2, 18, 1056, 1),
    (3, 40, 2048, 3),
    (4, 17, 96, 40),
    (7, 37, 160, 16),
    (16, 20, 3104, 5),
    (1, 11, 100, 3),
    (5, 9, 257, 7),
    (1, 20, 40, 256),
    (64, 5, 32, 4),
]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    return CudaLibrary(load_probes(tmp_path_factory), "cpu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(
    cuda_library: CudaLibrary, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_accurate(cuda_library, GEMV, [make_case(*shape, dtype) for _ in range(8 if shape[0] < 8 else 2)])


@pytest.mark.parametrize(
    "quant",
    [
        {"nested": False},
        {"quant_type": "fp4"},
        {"blocksize": 32},
        {"blocksize": 4096},
        {"blocksize": 128, "nested": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [96, 50])
def test_formats(cuda_library: CudaLibrary, quant: dict, k: int) -> None:
    """Blocks that straddle rows, too: K = 96 on the fast path, K = 50 on the general one."""
    assert_accurate(cuda_library, GEMV, [make_case(2, 40, k, 4, torch.float32, **quant) for _ in range(8)])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("m", [1, 6])
def test_dropout(cuda_library: CudaLibrary, m: int, dropout_p: float) -> None:
    assert_accurate(
        cuda_library, GEMV, [make_case(m, 20, 203, 9, torch.float32, dropout_p=dropout_p) for _ in range(8)]
    )


def test_adapters_in_fp32_beside_bf16_activations(cuda_library: CudaLibrary) -> None:
    """PEFT's default (autocast_adapter_dtype)."""
    assert_accurate(
        cuda_library,
        GEMV,
        [make_case(2, 40, 128, 8, torch.bfloat16, lora_dtype=torch.float32) for _ in range(8)],
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize(("quant_type", "k"), [("nf4", 96), ("fp4", 1056), ("nf4", 37)])
def test_one_hot_rows_return_the_decoded_weight(
    cuda_library: CudaLibrary, quant_type: str, k: int, blocksize: int, dtype: torch.dtype
) -> None:
    """A sum of one term is the weight itself, T(fp32(code) * fp32(absmax)), bit for bit."""
    n = 9
    weight = random_weight(n, k, quant_type, blocksize)
    columns = torch.arange(k) if k < 100 else torch.randperm(k)[:96]
    dense = weight.dequantize(dtype)
    for part in columns.split(16):
        x = torch.zeros(len(part), k, dtype=dtype)
        x[torch.arange(len(part)), part] = 1
        case = Case(weight, x, torch.empty(0, k), torch.empty(n, 0), None)
        got = linear(cuda_library, GEMV, case, None).cpu()
        # -0.0 equals 0.0: a sum with zeros has lost that sign
        assert torch.equal(got, dense[:, part].t()), part


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "processors"), [(70, 32, 1), (150, 96, 2), (40, 4128, 2), (26, 8992, 1)], ids=str
)
def test_every_number_of_tiles_steps_and_pieces(
    probe: CudaLibrary, tokens: int, n: int, k: int, processors: int
) -> None:
    """Blocks that walk over several tiles, warps of one row and of several, x in one piece and in several,
    rows shared by warps or not."""
    fixed = probe.lib.probe_fixed_shared()
    m = 2 * tokens + 1 if k < 100 else tokens
    cases = [make_case(m, n, k, 3, torch.float32) for _ in range(2)]
    for shared in (99 << 10, fixed + tokens * 4096, fixed + 2 * tokens * 4096):
        assert_accurate(probe, "probe_gemv", cases, (tokens, processors, shared))


def test_neither_processors_nor_the_order_of_threads_change_the_bits(probe: CudaLibrary) -> None:
    """With one processor a block writes the next tile's sums while others still read the last one's."""
    case = make_case(2, 150, 2080, 5, torch.float32)
    xa, runs = exact(case)[1].float(), []
    for order in (0, 1, 2):
        probe.lib.pk_emulation_order(order)
        runs += [
            linear(probe, "probe_gemv", case, xa, (2, processors, 99 << 10)) for processors in (1, 3, 200)
        ]
    probe.lib.pk_emulation_order(0)
    assert all(torch.equal(runs[0], run) for run in runs)


@pytest.mark.parametrize("shape", [(1, 40, 2080, 8), (6, 20, 96, 33), (3, 10, 50, 3)], ids=str)
def test_two_runs_and_any_order_of_threads_give_the_same_bits(
    emulated: ctypes.CDLL, shape: tuple[int, int, int, int]
) -> None:
    library = CudaLibrary(emulated, "cpu")
    case = make_case(*shape, torch.float32, dropout_p=0.2)
    runs = []
    for order in (0, 0, 1, 2, 3):
        emulated.pk_emulation_order(order)
        xa = run_xa(library, case)
        runs.append((xa, linear(library, GEMV, case, xa)))
    emulated.pk_emulation_order(0)
    for xa, y in runs[1:]:
        assert torch.equal(xa, runs[0][0]) and torch.equal(y, runs[0][1])


def test_a_lane_reads_x_without_conflicts(probe: CudaLibrary) -> None:
    """A 16-byte access serves 8 lanes at once; the 256 places of a step are each used once."""
    for j in range(8):
        for first in range(0, 32, 8):
            assert len({probe.lib.probe_swizzled(lane, j) % 8 for lane in range(first, first + 8)}) == 8
    assert {probe.lib.probe_swizzled(lane, j) for lane in range(32) for j in range(8)} == set(range(256))


def test_no_adapter_no_bias_no_rows(cuda_library: CudaLibrary) -> None:
    case = make_case(2, 12, 64, 4, torch.float32, bias=False)
    bare = replace(case, scaling=0.0)
    assert torch.equal(
        linear(cuda_library, GEMV, case, None).cpu(),
        linear(cuda_library, GEMV, bare, run_xa(cuda_library, bare)).cpu(),
    )
    assert linear(cuda_library, GEMV, replace(case, x=case.x[:0]), None).shape == (0, 12)


def test_unaligned_views(cuda_library: CudaLibrary) -> None:
    """x and the packed weight at odd addresses take the general path."""
    case = make_case(2, 12, 64, 4, torch.bfloat16)
    x, packed = (
        torch.empty(129, dtype=torch.bfloat16)[1:].view(2, 64),
        torch.empty(385, dtype=torch.uint8)[1:].view(384, 1),
    )
    views = replace(
        case, x=x.copy_(case.x), weight=replace(case.weight, packed=packed.copy_(case.weight.packed))
    )
    assert_accurate(cuda_library, GEMV, [views])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(65, 64)}, "size"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "dtype"),
        ({"blocksize": 48}, "block"),
    ],
    ids=["rows", "dtype", "blocksize"],
)
def test_what_does_not_fit_is_refused(
    emulated: ctypes.CDLL, change: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import linear as module

    monkeypatch.setitem(module.DTYPES, torch.float64, 9)
    case = make_case(2, 12, 64, 4, torch.float32)
    if "x" in change:
        case = replace(case, x=change["x"])
    else:
        object.__setattr__(case.weight, "blocksize", change["blocksize"])
    with pytest.raises(RuntimeError, match=words):
        linear(CudaLibrary(emulated, "cpu"), GEMV, case, None)
