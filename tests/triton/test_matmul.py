"""The base product with its low-rank part, bias and mask: against fp64, bounded by plain PyTorch's own error;
decoding bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.ops.philox import dropout_scale
from tests.cases import each_choice, nightly
from tests.ops.bounds import assert_as_accurate, products_of_many_rows, relative_norm

pytest.importorskip("triton")

from peftkern.ops.linear.matmul_calls import matmul_dx, matmul_forward  # noqa: E402
from peftkern.ops.linear.matmul_config import MatmulConfig, default_config  # noqa: E402

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SMALL = MatmulConfig(16, 64, 32, num_stages=2)
SPLIT = MatmulConfig(32, 64, 64, split_k=3, group_m=2)
DENSE = (None,) * 6 + (64, 256)
# (M, N, K, R): one row; ragged everything; K of whole groups of four words, of one word, and odd; every class
# of ranks.
SHAPES = [
    (1, 64, 128, 1),
    (5, 33, 64, 3),
    (17, 70, 96, 16),
    (33, 50, 72, 64),
    (20, 45, 97, 5),
    (3, 20, 160, 256),
]


def _quant(w: NF4Weight) -> tuple:
    return (
        w.code,
        w.absmax,
        w.absmax_8bit,
        w.absmax_code,
        w.nested_absmax,
        w.absmax_offset,
        w.blocksize,
        w.nested_blocksize,
    )


def _weight(n: int, k: int, **options) -> tuple[NF4Weight, torch.Tensor]:
    with use_backend("reference"):
        w = NF4Weight.from_dense(torch.randn(n, k) * 0.05, **options)
        return w, w.dequantize(torch.float32)


@products_of_many_rows
def _product(
    t: torch.Tensor,
    w: torch.Tensor,
    low: torch.Tensor | None,
    adapter: torch.Tensor | None,
    bias,
    keep,
    dtype: torch.dtype,
):
    """t @ w + keep * (low @ adapter) + bias in plain PyTorch; the low-rank part in the adapter's dtype, or in
    fp64 where `dtype` is."""
    y = t.to(dtype) @ w.to(dtype)
    if low is not None:
        low_dtype = torch.float64 if dtype == torch.float64 else adapter.dtype
        part = low.to(low_dtype) @ adapter.to(low_dtype)
        y = y + (part if keep is None else part * keep.to(low_dtype)).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def _on(device: str, *args) -> torch.Tensor:
    """Plain PyTorch on the device is the yardstick of a kernel on it."""
    return _product(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in args)).cpu()


def _check_forward(
    device,
    m,
    n,
    k,
    r,
    dtype,
    config,
    *,
    lora_dtype=None,
    bias_dtype=None,
    dense=False,
    scaling=0.7,
    **options,
) -> None:
    w, exact_w = _weight(n, k, **options)
    lora_dtype = lora_dtype or dtype
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(bias_dtype or dtype)
    xa, b = (torch.randn(m, r), (torch.randn(n, r) * 0.1).to(lora_dtype)) if r else (None, None)
    exact_w = exact_w.to(dtype) if dense else exact_w
    data, quant = (exact_w.to(device), DENSE) if dense else (w.to(device).packed, _quant(w.to(device)))
    on = [None if t is None else t.to(device) for t in (x, bias, b, xa)]
    out = torch.full((m, n + 5), torch.nan, dtype=dtype, device=device)
    y = matmul_forward(on[0], data, quant, n, on[1], on[2], on[3], scaling, out[:, :n], config)
    assert y.data_ptr() == out.data_ptr() and out[:, n:].isnan().all()
    adapter = None if b is None else b.t()
    low = None if xa is None else xa * scaling
    plain = _on(device, x, exact_w.t(), low, adapter, bias, None, dtype)
    exact = _product(
        x, exact_w.t(), None if xa is None else xa.double() * scaling, adapter, bias, None, torch.float64
    )
    assert_as_accurate("y", y.cpu(), plain, exact)


def _check_dx(
    device, m, n, k, r, dtype, config, *, lora_dtype=None, dropout_p=0.0, dense=False, **options
) -> None:
    w, exact_w = _weight(n, k, **options)
    lora_dtype = lora_dtype or dtype
    dy = torch.randn(m, n).to(dtype)
    dyb, a = (torch.randn(m, r), (torch.randn(r, k) / k**0.5).to(lora_dtype)) if r else (None, None)
    seed = torch.tensor([1234567890123]) if dropout_p else None
    keep = dropout_scale(m, k, dropout_p, seed) if dropout_p else None
    exact_w = exact_w.to(dtype) if dense else exact_w
    data, quant = (exact_w.to(device), DENSE) if dense else (w.to(device).packed, _quant(w.to(device)))
    on = [None if t is None else t.to(device) for t in (dy, a, dyb, seed)]
    out = torch.full((m, k + 8), torch.nan, dtype=dtype, device=device)
    dx = matmul_dx(on[0], data, quant, k, on[1], on[2], dropout_p, on[3], out[:, :k], config)
    assert out[:, k:].isnan().all()
    exact = _product(dy, exact_w, dyb, a, None, keep, torch.float64)
    assert_as_accurate("dx", dx.cpu(), _on(device, dy, exact_w, dyb, a, None, keep, dtype), exact)


@pytest.mark.parametrize(("shape", "dtype"), each_choice(SHAPES, FLOATS))
def test_both_directions(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for config in (SMALL, SPLIT):
        _check_forward(device, *shape, dtype, config)
        _check_dx(device, *shape, dtype, config)


@pytest.mark.parametrize(
    ("shape", "dtype"), each_choice([(17, 70, 96, 16), (20, 45, 97, 5), (70, 64, 64, 0)], FLOATS)
)
def test_dense_slabs(device: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for config in (SMALL, SPLIT):
        _check_forward(device, *shape, dtype, config, dense=True)
        _check_dx(device, *shape, dtype, config, dense=True)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout(device: str, dropout_p: float, config: MatmulConfig) -> None:
    _check_dx(device, 37, 64, 72, 8, torch.float32, config, dropout_p=dropout_p)
    _check_dx(device, 20, 40, 64, 8, torch.bfloat16, config, dropout_p=dropout_p)


FORMATS = [
    {"nested": False},
    {"quant_type": "fp4"},
    {"blocksize": 32},
    {"blocksize": 4096},
    {"blocksize": 128, "nested": False},
]


@pytest.mark.parametrize(("k", "options"), each_choice([192, 200], FORMATS))
def test_formats(device: str, k: int, options: dict) -> None:
    _check_forward(device, 9, 50, k, 4, torch.bfloat16, SMALL, **options)
    _check_dx(device, 9, 50, k, 4, torch.bfloat16, SMALL, **options)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_adapters_and_bias_of_another_dtype(
    device: str, dtypes: tuple[torch.dtype, torch.dtype], config: MatmulConfig
) -> None:
    _check_forward(device, 20, 70, 128, 8, dtypes[0], config, lora_dtype=dtypes[1], bias_dtype=dtypes[1])
    _check_dx(device, 20, 70, 128, 8, dtypes[0], config, lora_dtype=dtypes[1])


def test_no_adapter_and_no_bias(device: str) -> None:
    w, exact_w = _weight(70, 128)
    x = torch.randn(9, 128)
    y = matmul_forward(
        x.to(device), w.to(device).packed, _quant(w.to(device)), 70, None, None, None, 1.0, config=SMALL
    )
    assert_as_accurate("y", y.cpu(), x @ exact_w.t(), x.double() @ exact_w.double().t())


WEIGHTS = [
    ("nf4", True, torch.float32),
    ("nf4", False, torch.bfloat16),
    ("nf4", True, torch.bfloat16),
    ("nf4", True, torch.float16),
    ("fp4", True, torch.bfloat16),
]
LENGTHS = {"four words": 160, "one word": 136, "ragged": 35}
QUICK = [(WEIGHTS[0], "four words"), (WEIGHTS[1], "one word"), (WEIGHTS[0], "ragged")]


@pytest.mark.parametrize("case", nightly(itertools.product(WEIGHTS, LENGTHS), quick=QUICK), ids=str)
def test_one_hot_rows_read_the_decoded_weight(
    device: str, case: tuple[tuple[str, bool, torch.dtype], str]
) -> None:
    """x = I gives W^T, dy = I gives W: every weight through the product, bit for bit (but for the sign of
    zeros, which sums lose).

    Blocks of 32 and several steps a program: each step has other absmax values.
    """
    (quant_type, nested, dtype), k = case[0], LENGTHS[case[1]]
    w, _ = _weight(100, k, quant_type=quant_type, nested=nested, blocksize=32)
    with use_backend("reference"):
        exact = w.dequantize(dtype)
    on = w.to(device)
    for config in (MatmulConfig(64, 64, 32), MatmulConfig(64, 64, 32, split_k=2)):
        y = matmul_forward(
            torch.eye(k, dtype=dtype, device=device),
            on.packed,
            _quant(on),
            100,
            None,
            None,
            None,
            1.0,
            config=config,
        )
        dx = matmul_dx(
            torch.eye(100, dtype=dtype, device=device), on.packed, _quant(on), k, None, None, config=config
        )
        assert torch.equal(y.cpu().t(), exact) and torch.equal(dx.cpu(), exact)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_rank_rows_are_not_rounded(device: str, dtype: torch.dtype, config: MatmulConfig) -> None:
    """xa and dyb are fp32 in the product: beside a zero base product only the result's own rounding is
    left."""
    w, _ = _weight(64, 64)
    on, zero, low = w.to(device), torch.zeros(16, 64, dtype=dtype, device=device), torch.randn(16, 16)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype)
    y = matmul_forward(
        zero, on.packed, _quant(on), 64, None, b.to(device), low.to(device), 1.0, config=config
    )
    dx = matmul_dx(zero, on.packed, _quant(on), 64, a.to(device), low.to(device), config=config)
    for got, exact in ((y, low.double() @ b.double().t()), (dx, low.double() @ a.double())):
        assert relative_norm(got.cpu(), exact) <= 1.02 * relative_norm(exact.to(dtype), exact)


def test_slabs_of_columns_make_the_whole_dx(device: str) -> None:
    """Columns of W, of lora_a, of dx and of the mask: two calls write what one writes."""
    m, n, k, r = 20, 32, 192, 4
    _, w = _weight(n, k)
    dy, dyb, a, seed = torch.randn(m, n), torch.randn(m, r), torch.randn(r, k), torch.tensor([99])
    w, dy, dyb, a, seed = (t.to(device) for t in (w, dy, dyb, a, seed))
    whole = matmul_dx(dy, w, DENSE, k, a, dyb, 0.25, seed, config=SMALL)
    out = torch.full((m, k), torch.nan, device=device)
    for cols in (slice(0, 128), slice(128, k)):
        slab = w[:, cols].contiguous()
        part = out[:, cols]
        matmul_dx(
            dy, slab, DENSE, slab.shape[1], a[:, cols], dyb, 0.25, seed, part, SMALL, first_col=cols.start
        )
    assert torch.equal(out, whole)


def test_partial_low_rank_rows_are_summed(device: str) -> None:
    """dyb as it comes from column chunks, not yet added up."""
    w, _ = _weight(32, 96)
    on, dy, parts, a = (
        w.to(device),
        torch.randn(9, 32).to(device),
        torch.randn(3, 9, 4).to(device),
        torch.randn(4, 96).to(device),
    )
    summed = (parts[0] + parts[1]) + parts[2]
    for config in (SMALL, SPLIT):
        first, second = (
            matmul_dx(dy, on.packed, _quant(on), 96, a, dyb, config=config) for dyb in (parts, summed)
        )
        assert torch.equal(first, second)


def test_every_block_of_a_grouped_order_is_written_once(device: str) -> None:
    """Five blocks of rows in groups of two, two blocks of columns; the same bits twice."""
    w, _ = _weight(50, 32)
    on, x = w.to(device), torch.randn(75, 32).to(device)
    config = MatmulConfig(16, 32, 32, group_m=2)
    y = [matmul_forward(x, on.packed, _quant(on), 50, None, None, None, 1.0, config=config) for _ in range(2)]
    one_by_one = torch.cat(
        [
            matmul_forward(r, on.packed, _quant(on), 50, None, None, None, 1.0, config=config)
            for r in x.split(16)
        ]
    )
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], one_by_one)


def test_default_configs_fit_their_shapes() -> None:
    """Powers of two, whole groups of codes, and a split only where each part keeps 16 steps."""
    for arch in (75, 80, 86, 89, 90, 100, 120):
        for m in (1, 16, 17, 64, 65, 4096):
            for dtype in FLOATS:
                for dense in (False, True):
                    c = default_config(m, 4096, 1024, arch=arch, dtype=dtype, dense=dense, programs=128)
                    assert c.block_m >= 16 and c.block_k % 32 == 0 and c.block_n % 32 == 0
                    assert c.split_k == 1 or 1024 // c.split_k >= 16 * c.block_k
