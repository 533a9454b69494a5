"""The low-rank passes against fp64, bounded by plain PyTorch's own error; outputs poisoned with NaN, small
chunks so that sums split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peftkern.ops.linear.low_rank_config import LowRankConfig, Tile, choose_low_rank, dot_mode
from peftkern.ops.philox import dropout_scale

from ..ops.bounds import assert_as_accurate, products_of_many_rows

pytest.importorskip("triton")

from peftkern.ops.linear import low_rank  # noqa: E402

SCALING = 0.7
# The interpreter sums a tile's products one after the other: 32 of them are a chain as short as the house's
# kernels keep it.
SMALL = LowRankConfig(
    xa=Tile(32, 32, 4, 2),
    xa_splits=2,
    dy=Tile(32, 64, 4, 2),
    dy_rows=32,
    fused=True,
    sum_dyb=False,
    x=Tile(16, 64, 4, 2),
    x_rows=32,
    epilogue=Tile(32, 64, 4, 1),
    ranks=64,
)
# (M, N, K, R): one row, every rank class, nothing a multiple of a tile, several blocks of rows and columns.
SHAPES = [
    (1, 40, 72, 8),
    (40, 40, 72, 1),
    (63, 60, 100, 3),
    (50, 130, 63, 16),
    (40, 96, 137, 24),
    (33, 100, 60, 64),
    (20, 63, 100, 256),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds NaN, so that what no kernel writes is found."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def _case(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    narrow = {"a": torch.randn(r, k) / k**0.5, "b": torch.randn(n, r) * 0.1}
    wide = {
        "x": torch.randn(m, k),
        "dy": torch.randn(m, n),
        "y": torch.randn(m, n),
        "dx": torch.randn(m, k),
        "bias": torch.randn(n),
    }
    return {key: t.to(adapter_dtype) for key, t in narrow.items()} | {
        key: t.to(dtype) for key, t in wide.items()
    }


def _ours(
    case: dict[str, torch.Tensor],
    p: float,
    seed: torch.Tensor | None,
    config: LowRankConfig | None,
    device: str,
):
    case = {key: t.to(device) for key, t in case.items()}
    seed = None if seed is None else seed.to(device)
    x, dy, a, b, y, dx = (case[key].clone() for key in ("x", "dy", "a", "b", "y", "dx"))
    xa = low_rank.xa_forward(x, a, p, seed, config=config)
    low_rank.y_epilogue(y, xa, b, SCALING, case["bias"], config=config)
    partials = low_rank.dy_pass(dy, xa, b, SCALING, (True, True, True, True), config=config)
    d_lora_a = low_rank.x_pass(x, partials.dyb, a, p, seed, dx=dx, config=config)
    d_lora_a, d_lora_b, d_bias = low_rank.reduce_partials(
        d_lora_a, partials.d_lora_b, partials.d_bias, a.dtype
    )
    dyb = partials.dyb.sum(0)
    out = {
        "xa": xa,
        "dyb": dyb,
        "y": y,
        "dx": dx,
        "d_lora_a": d_lora_a,
        "d_lora_b": d_lora_b,
        "d_bias": d_bias,
    }
    assert (
        d_lora_a.dtype == d_lora_b.dtype == a.dtype and xa.dtype == dyb.dtype == d_bias.dtype == torch.float32
    )
    return {key: t.cpu() for key, t in out.items()}


@products_of_many_rows
def _plain(
    case: dict[str, torch.Tensor], keep: torch.Tensor | None, dtype: torch.dtype, low: torch.dtype
) -> dict[str, torch.Tensor]:
    """Plain PyTorch with activations in `dtype`, the low-rank branch in `low`."""
    c = {key: t.to(low if key in "ab" else dtype) for key, t in case.items()}
    dropped = c["x"].to(low) if keep is None else c["x"].to(low) * keep.to(low)
    dy = c["dy"].to(low) * SCALING
    xa, dyb = dropped @ c["a"].t(), dy @ c["b"]
    low_rank_dx = dyb @ c["a"] if keep is None else (dyb @ c["a"]) * keep.to(low)
    y = c["y"] + SCALING * (xa @ c["b"].t()).to(dtype) + c["bias"]
    out = {"xa": xa, "dyb": dyb, "y": y, "dx": c["dx"] + low_rank_dx.to(dtype)}
    return out | {"d_lora_a": dyb.t() @ dropped, "d_lora_b": dy.t() @ xa, "d_bias": c["dy"].sum(0)}


def _low_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype) -> torch.dtype:
    """What PEFT computes the branch in: the adapters' dtype; we take the wider of the two where x is fp32 and
    they are not."""
    return torch.float32 if dtype == torch.float32 else adapter_dtype


def _check(shape, dtypes, p: float, config: LowRankConfig | None, device: str, draws: int = 2) -> None:
    dtype, low = dtypes[0], _low_dtype(*dtypes)
    seed = torch.tensor([1234567890123]) if p else None
    keep = dropout_scale(shape[0], shape[2], p, seed) if p else None
    runs = []
    for _ in range(draws):
        case = _case(*shape, *dtypes)
        exact = _plain(case, keep, torch.float64, torch.float64)
        # Plain PyTorch on the device is the yardstick of a kernel on it.
        there = {key: t.to(device) for key, t in case.items()}
        plain = _plain(there, None if keep is None else keep.to(device), dtype, low)
        runs.append((_ours(case, p, seed, config, device), {key: t.cpu() for key, t in plain.items()}, exact))
    for name in runs[0][0]:
        ours, plain, exact = (torch.cat([run[i][name].flatten() for run in runs]) for i in range(3))
        if name.startswith("d_lora"):
            plain = plain.to(ours.dtype)
        assert_as_accurate(name, ours, plain, exact)


def _name(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


# Every shape and every pair of dtypes in the quick suite, all of their pairs in the nightly one: the
# interpreter takes a second for each.
PAIRS = [
    pytest.param(
        shape, dtypes, id=f"{shape}-{_name(dtypes)}", marks=() if j == i % len(DTYPES) else pytest.mark.slow
    )
    for i, shape in enumerate(SHAPES)
    for j, dtypes in enumerate(DTYPES)
]


@pytest.mark.parametrize("shape, dtypes", PAIRS)
def test_every_output(
    device: str, shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    few = shape[0] * shape[3] < 100  # the errors of a handful of numbers are noise
    # A whole row of 256 ranks in fp32 terms beside 64 columns is more than a block's shared memory.
    narrow = replace(SMALL, xa=Tile(32, 16, 8, 2), dy=Tile(16, 32, 8, 2), dy_rows=16, x_rows=16)
    config = SMALL if shape[3] <= 64 else narrow
    _check(shape, dtypes, 0.0, config, device, draws=8 if few else 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", DTYPES, ids=_name)
def test_more_chunks(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    _check((257, 200, 257, 16), dtypes, 0.1, SMALL, device, draws=1)


@pytest.mark.parametrize(
    "p, dtypes", [(0.1, DTYPES[1]), (0.5, DTYPES[3]), (1.0, DTYPES[0]), (0.3, DTYPES[2])], ids=str
)
def test_dropout(device: str, p: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    _check((50, 60, 100, 16), dtypes, p, SMALL, device, draws=1)


WAYS = {
    "beside": replace(SMALL, fused=False),
    "summed": replace(SMALL, sum_dyb=True),
    "one split": replace(SMALL, xa_splits=1),
    "chosen": None,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way(device: str, way: str) -> None:
    """dyb beside dB, dyb summed before its use, one split, and what the chooser says."""
    _check((40, 130, 72, 3), (torch.bfloat16, torch.float32), 0.25, WAYS[way], device, draws=1)


@pytest.mark.parametrize("r", [40, 256])
def test_the_chosen_tiles_of_large_ranks(device: str, r: int) -> None:
    _check((40, 100, 72, r), (torch.bfloat16, torch.bfloat16), 0.0, None, device, draws=1)


def test_two_runs_give_the_same_bits(device: str) -> None:
    case = _case(40, 70, 100, 24, torch.bfloat16, torch.float32)
    first, second = (_ours(case, 0.1, torch.tensor([7]), SMALL, device) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_masks_equal_the_reference(device: str) -> None:
    """With one-hot A and x of ones, xa is a column of the mask; with dyb of ones and A of ones, dx is the
    mask: bit for bit."""
    m, k, seed = 37, 72, torch.tensor([-5], device=device)
    keep = dropout_scale(m, k, 0.4, seed.cpu())
    for r in (1, 16):
        a = torch.zeros(r, k)
        columns = torch.arange(r) * 4
        a[torch.arange(r), columns] = 1.0
        xa = low_rank.xa_forward(torch.ones(m, k, device=device), a.to(device), 0.4, seed, config=SMALL)
        assert torch.equal(xa.cpu(), keep[:, columns])
    dx = torch.zeros(m, k, device=device)
    dyb = torch.ones(1, m, 1, device=device)
    low_rank.x_pass(None, dyb, torch.ones(1, k, device=device), 0.4, seed, dx=dx, need_a=False, config=SMALL)
    assert torch.equal(dx.cpu(), keep)
    one_hot = torch.eye(m, device=device)[None]  # R = M: every row of x has its own row in dA
    d_lora_a = low_rank.x_pass(
        torch.ones(m, k, device=device), one_hot, torch.ones(m, k, device=device), 0.4, seed, config=SMALL
    )
    assert torch.equal(low_rank.reduce_partials(d_lora_a, None, None, torch.float32)[0].cpu(), keep)


def test_sums_of_many_chunks(device: str) -> None:
    """More chunks than are loaded at a time, lengths that no block divides; one chunk alone is passed on."""
    a, b, bias = torch.randn(19, 3, 100), torch.randn(9, 300, 5), torch.randn(1, 70)
    ours = low_rank.reduce_partials(a.to(device), b.to(device), bias.to(device), torch.float32)
    for name, got, partials in zip(("d_lora_a", "d_lora_b", "d_bias"), ours, (a, b, bias), strict=True):
        assert_as_accurate(name, got.cpu(), partials.sum(0), partials.double().sum(0))


def test_what_is_not_a_number_stays_in_its_row(device: str) -> None:
    """Masked tails are not multiplied by zero, but left out."""
    case = {key: t.to(device) for key, t in _case(40, 63, 70, 5, torch.float32, torch.float32).items()}
    for key in ("x", "dy"):
        case[key][7] = torch.nan
    xa = low_rank.xa_forward(case["x"], case["a"], config=SMALL)
    dyb = low_rank.dy_pass(
        case["dy"], None, case["b"], SCALING, (True, True, False, False), config=SMALL
    ).dyb.sum(0)
    for t in (xa, dyb):
        assert torch.equal(t.isnan().any(1).cpu(), torch.arange(40) == 7)


NEEDS = [
    (True, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, False, False, True),
    (False, True, False, True),
]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_only_what_is_needed(device: str, needs: tuple[bool, bool, bool, bool], fused: bool) -> None:
    """Each alone equals what all together give, nothing else is made, and one launch is enough."""
    case = {key: t.to(device) for key, t in _case(40, 70, 63, 5, torch.float32, torch.float32).items()}
    config = replace(SMALL, fused=fused, xa_splits=1)
    xa = low_rank.xa_forward(case["x"], case["a"], config=config)
    every = low_rank.dy_pass(case["dy"], xa, case["b"], SCALING, (True,) * 4, config=config)
    some = low_rank.dy_pass(case["dy"], xa if needs[3] else None, case["b"], SCALING, needs, config=config)
    assert (some.dyb is not None, some.d_bias is not None, some.d_lora_b is not None) == (
        needs[0] or needs[2],
        needs[1],
        needs[3],
    )
    if some.dyb is not None:
        torch.testing.assert_close(some.dyb.sum(0), every.dyb.sum(0))
    for name in ("d_bias", "d_lora_b"):
        if getattr(some, name) is not None:
            assert torch.equal(getattr(some, name), getattr(every, name)), name


def test_bias_without_an_adapter(device: str) -> None:
    dy, y, bias = (
        torch.randn(50, 70, device=device),
        torch.zeros(50, 70, device=device),
        torch.randn(70, device=device),
    )
    partials = low_rank.dy_pass(dy, None, None, 1.0, (True, True, False, False), config=SMALL)
    assert partials.dyb is None and partials.d_lora_b is None
    torch.testing.assert_close(
        low_rank.reduce_partials(None, None, partials.d_bias, torch.float32)[2], dy.sum(0)
    )
    low_rank.y_epilogue(y, None, None, 1.0, bias, config=SMALL)
    assert torch.equal(y, bias.expand(50, -1))


def test_a_slice_of_columns(device: str) -> None:
    """A slab's columns of y; their neighbours keep their bits."""
    case = {key: t.to(device) for key, t in _case(40, 60, 72, 5, torch.bfloat16, torch.bfloat16).items()}
    wide = torch.randn(40, 100, device=device).bfloat16()
    before, whole = wide.clone(), wide[:, 24:84].contiguous()
    xa = low_rank.xa_forward(case["x"], case["a"], config=SMALL)
    low_rank.y_epilogue(wide[:, 24:84], xa, case["b"], SCALING, case["bias"], config=SMALL)
    low_rank.y_epilogue(whole, xa, case["b"], SCALING, case["bias"], config=SMALL)
    assert torch.equal(wide[:, 24:84], whole)
    assert torch.equal(wide[:, :24], before[:, :24]) and torch.equal(wide[:, 84:], before[:, 84:])


@pytest.mark.parametrize("arch", [75, 86, 90, 999])
@pytest.mark.parametrize("r", [1, 16, 17, 64, 256])
@pytest.mark.parametrize("m", [1, 300, 8192, 100_000])
def test_the_chooser(arch: int, r: int, m: int) -> None:
    for mode in ("native", "split", "tf32x3", "ieee"):
        config = choose_low_rank(m, 4096, 14336, r, mode=mode, arch=arch)
        assert (
            config.dy_rows % config.dy.rows == 0
            and config.x_rows % config.x.rows == 0
            and config.dy_rows % config.xa.rows == 0
        )
        assert config.xa_splits == 1 or m < 16 * 128
        assert not config.fused or r <= 32
        assert config.fused or r > 32 or arch == 75 or mode in ("tf32x3", "ieee")
    assert m < 100_000 or config.dy_rows >= 512


def test_modes() -> None:
    assert dot_mode("bfloat16", "bfloat16", 86) == "native" and dot_mode("bfloat16", "bfloat16", 75) == "ieee"
    assert dot_mode("float16", "float16", 75) == "native" and dot_mode("bfloat16", "float32", 90) == "split"
    assert dot_mode("float32", "float32", 89) == "tf32x3" and dot_mode("float32", "float32", 75) == "ieee"
