"""The CUDA tensor-core kernel, emulated on the CPU and, with -m gpu, on a device: against fp64, or bit for
bit."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from ..native.compiled import DTYPES, i64
from .device_library import CudaLibrary
from .linear import Case, assert_accurate, exact, linear, load_probes, make_case, random_weight, run_xa

MMA = "pk_mma_4bit_cuda"
HALVES = [torch.bfloat16, torch.float16]
TILES = [(nt, wm) for nt in (1, 2, 4, 8) for wm in (1, 2)]
# (M, N, K, R): every tile width of x, ragged M and N, K of part of a stage and of more than are in flight,
# ranks of every class.
SHAPES = [
    (1, 33, 64, 8),
    (9, 40, 320, 3),
    (17, 40, 128, 200),
    (33, 31, 576, 1),
    (70, 65, 1216, 5),
    (130, 20, 128, 16),
]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    return CudaLibrary(load_probes(tmp_path_factory), "cpu")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(
    cuda_library: CudaLibrary, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_accurate(cuda_library, MMA, [make_case(*shape, dtype) for _ in range(8 if shape[0] < 16 else 2)])


@pytest.mark.parametrize(
    "quant",
    [
        {"nested": False},
        {"quant_type": "fp4"},
        {"blocksize": 4096},
        {"blocksize": 128, "nested": False, "quant_type": "fp4"},
    ],
    ids=str,
)
def test_formats(cuda_library: CudaLibrary, quant: dict) -> None:
    """Blocks that straddle rows, too."""
    assert_accurate(cuda_library, MMA, [make_case(20, 40, 192, 4, torch.bfloat16, **quant) for _ in range(4)])


@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_and_adapters_in_fp32(cuda_library: CudaLibrary, dropout_p: float) -> None:
    cases = [
        make_case(18, 40, 128, 8, torch.bfloat16, lora_dtype=torch.float32, dropout_p=dropout_p)
        for _ in range(4)
    ]
    assert_accurate(cuda_library, MMA, cases)


@pytest.mark.parametrize("m", [3, 12, 20, 40])
def test_a_weight_of_many_rows(cuda_library: CudaLibrary, m: int) -> None:
    """Enough of them for tiles of 64 on every multiprocessor."""
    assert_accurate(cuda_library, MMA, [make_case(m, 64 * 140, 64, 2, torch.bfloat16)])


@pytest.mark.parametrize(("nt", "wm"), TILES)
def test_every_tile(probe: CudaLibrary, nt: int, wm: int) -> None:
    """Two tiles each way, the last ones ragged; more stages than shared memory holds."""
    assert_accurate(
        probe, "probe_mma", [make_case(8 * nt + 3, 32 * wm + 5, 1344, 18, torch.bfloat16)], (nt, wm)
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("quant_type", "k", "blocksize"), [("nf4", 320, 64), ("fp4", 64, 64), ("nf4", 192, 128)]
)
def test_one_hot_rows_return_the_decoded_weight(
    cuda_library: CudaLibrary, quant_type: str, k: int, blocksize: int, dtype: torch.dtype
) -> None:
    """With the identity as x a result is T(fp32(T(code)) * fp32(absmax)) of one weight, bit for bit: every
    place of the layout is right."""
    n = 37
    weight = random_weight(n, k, quant_type, blocksize)
    expected = replace(weight, code=weight.code.to(dtype).float()).dequantize(dtype)
    case = Case(weight, torch.eye(k, dtype=dtype), torch.empty(0, k), torch.empty(n, 0), None)
    assert torch.equal(linear(cuda_library, MMA, case, None).cpu(), expected.t())


def test_a_rows_bits_depend_on_nothing_beside_it(probe: CudaLibrary) -> None:
    """Neither on the tile nor on how many rows there are: a request's logits are the same alone and in a
    batch."""
    case = make_case(40, 70, 832, 5, torch.bfloat16)
    xa = exact(case)[1].float()
    first, *others = (linear(probe, "probe_mma", case, xa, tile) for tile in TILES)
    assert all(torch.equal(first, other) for other in others)
    alone = replace(case, x=case.x[7:9].contiguous())
    assert torch.equal(linear(probe, "probe_mma", alone, xa[7:9].contiguous(), (1, 1)), first[7:9])


@pytest.mark.parametrize("shape", [(5, 40, 1344, 8), (40, 20, 320, 17)], ids=str)
def test_two_runs_and_any_order_of_threads_give_the_same_bits(
    emulated: ctypes.CDLL, shape: tuple[int, int, int, int]
) -> None:
    library = CudaLibrary(emulated, "cpu")
    case = make_case(*shape, torch.float16)
    xa, runs = run_xa(library, case), []
    for order in (0, 0, 1, 2, 3):
        emulated.pk_emulation_order(order)
        runs.append(linear(library, MMA, case, xa))
    emulated.pk_emulation_order(0)
    assert all(torch.equal(run, runs[0]) for run in runs)


def _half_warps(address) -> list[list[int]]:
    return [[address(lane) for lane in range(first, first + 16)] for first in (0, 16)]


def _quarter_warps(address) -> list[list[int]]:
    return [[address(lane) for lane in range(first, first + 8)] for first in range(0, 32, 8)]


def _banks(addresses: list[int], size: int) -> int:
    """Different banks of 4 bytes that accesses of `size` bytes at once hit; 32 is all of them."""
    return len({(a // 4 + i) % 32 for a in set(addresses) for i in range(size // 4)})


def test_every_lane_reads_its_part_of_a_stage_once_and_without_conflicts(probe: CudaLibrary) -> None:
    """8-byte reads of W serve half a warp at once, 16-byte reads of x a quarter; each must hit all 32
    banks."""
    w_chunk, x_chunk = probe.lib.probe_w_chunk, probe.lib.probe_x_chunk
    read: dict[str, list[int]] = {"w": [], "x": []}
    for quarter in range(4):
        for rows in (0, 8, 16, 24):  # the operand's two halves, of two parts

            def w(lane: int, rows: int = rows, quarter: int = quarter) -> int:
                row, t = rows + lane // 4, lane % 4
                return row * 128 + w_chunk(row, 2 * quarter + t // 2) * 16 + t % 2 * 8

            assert all(_banks(group, 8) == 32 for group in _half_warps(w))
            read["w"] += map(w, range(32))
            for j in range(2):

                def x(lane: int, rows: int = rows, quarter: int = quarter, j: int = j) -> int:
                    row = rows + lane // 4
                    return row * 512 + x_chunk(row, 8 * quarter + 2 * (lane % 4) + j) * 16

                assert all(_banks(group, 16) == 32 for group in _quarter_warps(x))
                read["x"] += map(x, range(32))
    assert sorted(read["w"]) == list(range(0, 32 * 128, 8)) and sorted(read["x"]) == list(
        range(0, 32 * 512, 16)
    )


@pytest.mark.parametrize("wm", [1, 2])
def test_copies_and_sums_pass_shared_memory_without_conflicts(probe: CudaLibrary, wm: int) -> None:
    for chunk_of, chunks in ((probe.lib.probe_w_chunk, 8), (probe.lib.probe_x_chunk, 32)):
        for row in range(8):  # a copy's 8 lanes write 8 neighbouring chunks of one row
            placed = [chunk_of(row, chunk) for chunk in range(chunks)]
            assert sorted(placed) == list(range(chunks))
            assert all(
                _banks([16 * c for c in placed[first : first + 8]], 16) == 32 for first in range(0, chunks, 8)
            )
    sum_row = probe.lib.probe_sum_row(wm)
    assert _banks([4 * (lane % 4 * 2 * sum_row + lane // 4) for lane in range(32)], 4) == 32


def test_every_tile_fits_the_smallest_shared_memory(probe: CudaLibrary) -> None:
    """99 KB on sm_86, sm_89 and sm_120, 1 KB of it static; tiles of up to 16 rows fit twice into the 100 KB
    of a processor."""
    for nt, wm in TILES:
        assert probe.lib.probe_shared_bytes(nt, wm) + 1024 <= 99 << 10
        if nt <= 2:
            assert 2 * (probe.lib.probe_shared_bytes(nt, wm) + 2048) <= 100 << 10


@pytest.mark.parametrize(
    ("dtype", "n", "k", "blocksize", "capability", "expected"),
    [
        (torch.bfloat16, 100, 128, 64, 86, True),
        (torch.float16, 1, 64, 4096, 120, True),
        (torch.bfloat16, 100, 192, 128, 80, True),
        (torch.float32, 100, 128, 64, 86, False),
        (torch.bfloat16, 100, 96, 64, 86, False),
        (torch.bfloat16, 100, 128, 32, 86, False),
        (torch.float16, 100, 128, 64, 75, False),
    ],
)
def test_what_is_supported_is_known_in_advance(
    emulated: ctypes.CDLL, dtype: torch.dtype, n: int, k: int, blocksize: int, capability: int, expected: bool
) -> None:
    """The pure function and the kernel's own answer agree."""
    assert emulated.pk_mma_4bit_supported(DTYPES[dtype], i64(n), i64(k), blocksize, capability) == expected
    library, case = CudaLibrary(emulated, "cpu"), make_case(2, n, k, 2, dtype, blocksize=blocksize)
    emulated.pk_emulation_capability(capability)
    try:
        if expected:
            linear(library, MMA, case, None)
        else:
            with pytest.raises(RuntimeError, match="architecture"):
                linear(library, MMA, case, None)
    finally:
        emulated.pk_emulation_capability(86)
