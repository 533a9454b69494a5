"""A group's merged launches on a GPU against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peftkern import use_backend
from peftkern.ops.linear import tuned
from peftkern.ops.linear.group import gpu

from ..cases import each_choice, nightly
from ..ops import test_qlora_group as group
from ..ops.bounds import assert_as_accurate
from .test_gpu_linear import SLAB

QKV = [(96, [(8, None, 0.0)]), (33, [(4, None, 0.0)]), (32, [(1, None, 0.0)])]
DROPOUT = [(96, [(8, None, 0.25)]), (40, [(8, None, 0.0)]), (32, [(4, None, 0.5)])]
PARTLY = [(64, []), (90, [(4, None, 0.1)]), (16, [])]
BARE = [(64, []), (40, [])]
LAYOUTS = {"qkv": QKV, "dropout": DROPOUT, "partly": PARTLY, "bare": BARE}
K = 192
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# The interpreter takes seconds for each: most combinations are left to the nightly run.
QUICK = [
    ("qkv", torch.bfloat16, "cublas"),
    ("dropout", torch.float16, "triton"),
    ("partly", torch.bfloat16, "triton"),
    ("bare", torch.float32, "cublas"),
]
# A buffer for the first member of 96 rows of 16 bits, and for two of the others: batches, but no member that
# would need slices.
BATCHES = 96 * K * 2
OPTIONS = [
    {"bias": False},
    {"lora_dtype": torch.float32},
    {"dense": (1,)},
    {"dense": (0, 1, 2)},
    {"slab_bytes": BATCHES},
    {"slab_bytes": BATCHES, "dense": (1,), "bias": False},
]
# One row, whose sums are of eight draws; a quarter of a minute each.
ONE_ROW = [
    pytest.param({"m": 1, "draws": 8}, gemm, marks=pytest.mark.slow, id=f"one row-{gemm}") for gemm in SLAB
]


def _check(
    device: str,
    gemm: str,
    layout,
    dtype: torch.dtype,
    *,
    m: int = 40,
    slab_bytes: int = 1 << 27,
    draws: int = 1,
    **options,
) -> None:
    low, runs = options.get("lora_dtype") or dtype, []
    for _ in range(draws):
        x, members = group._case(layout, m, K, dtype, **options)
        dys = [torch.randn(m, n).to(dtype) for n, _ in layout]
        moved = group.to(x, members, dys, device)
        exact = group._plain(x, members, dys, torch.float64, torch.float64)
        plain = group._plain(*moved, dtype, low)
        with use_backend("triton"), tuned.use_row(replace(SLAB[gemm], slab_bytes=slab_bytes)):
            runs.append((group._ours(*moved), plain, exact))
            again = group._ours(*moved)
        assert all(torch.equal(value, again[name]) for name, value in runs[-1][0].items()), (
            "two runs give the same bits"
        )
    for name in runs[0][0]:
        ours, plain, exact = (torch.cat([run[i][name].cpu().flatten() for run in runs]) for i in range(3))
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(name, ours, plain, exact)


@pytest.fixture
def merged_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The composition would hide a plan that is not taken; what a launcher allocates holds NaN."""

    def composed(*args, **kwargs):
        raise AssertionError("composed of single linears")

    monkeypatch.setattr(gpu.single, "forward", composed)
    monkeypatch.setattr(gpu.single, "backward", composed)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: _poisoned(empty(*args, **kwargs)))


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(torch.nan) if t.is_floating_point() else t


@pytest.mark.usefixtures("merged_only")
@pytest.mark.parametrize(
    ("layout", "dtype", "gemm"),
    each_choice(LAYOUTS, DTYPES, SLAB, quick=QUICK, name=lambda value: str(value).removeprefix("torch.")),
)
def test_merged_launches_are_as_accurate_as_plain_pytorch(
    device: str, layout: str, dtype: torch.dtype, gemm: str
) -> None:
    # In fp32 the 33 sums of a d_bias are all rounding: 1.4 times plain PyTorch's error over 12 draws, of one
    # draw alone it is noise.
    _check(device, gemm, LAYOUTS[layout], dtype, draws=4 if dtype is torch.float32 else 1)


@pytest.mark.usefixtures("merged_only")
@pytest.mark.parametrize(("options", "gemm"), [*each_choice(OPTIONS, SLAB), *ONE_ROW])
def test_every_option(device: str, options: dict, gemm: str) -> None:
    _check(device, gemm, DROPOUT, torch.bfloat16, **options)


@pytest.mark.parametrize("gemm", nightly(SLAB, quick=["triton"]))
def test_a_member_whose_slab_does_not_fit_is_composed(device: str, gemm: str) -> None:
    _check(
        device, gemm, [(300, [(4, None, 0.1)]), (64, [(2, None, 0.0)])], torch.bfloat16, slab_bytes=1 << 16
    )


@pytest.mark.usefixtures("merged_only")
@pytest.mark.parametrize("gemm", nightly(SLAB, quick=["triton"]))
def test_a_member_nobody_uses_gets_no_gradient(device: str, gemm: str) -> None:
    x, members = group._case(DROPOUT, 40, K, torch.float32)
    x, members, _ = group.to(x, members, [], device)
    results = []
    for chosen in (members, [members[0], members[2]]):
        leaf, copies = group._leaves(x, chosen)
        with use_backend("triton"), tuned.use_row(SLAB[gemm]):
            outputs = group.qlora_group(leaf, copies)
            (outputs[0].sum() + 2 * outputs[-1].sum()).backward()
        results.append((leaf.grad, copies))
    assert results[0][1][1].adapters[0].lora_a.grad is None and results[0][1][1].bias.grad is None
    torch.testing.assert_close(results[0][0], results[1][0])


@pytest.mark.usefixtures("merged_only")
@pytest.mark.parametrize(("frozen", "gemm"), each_choice(["x", "lora_a", "lora_b"], SLAB))
def test_what_needs_no_gradient_changes_no_other(device: str, frozen: str, gemm: str) -> None:
    x, members = group._case(DROPOUT, 40, K, torch.float32)
    dys = [torch.randn(40, n) for n, _ in DROPOUT]
    x, members, dys = group.to(x, members, dys, device)
    leaf, copies = group._leaves(x, members)
    for part in [leaf] if frozen == "x" else [getattr(member.adapters[0], frozen) for member in copies]:
        part.requires_grad_(False)
    with use_backend("triton"), tuned.use_row(SLAB[gemm]):
        whole = group._ours(x, members, dys)
        outputs = group.qlora_group(leaf, copies)
        torch.autograd.backward(outputs, dys)
    for name, value in group._named(leaf, copies, outputs).items():
        missing = {"x": "dx", "lora_a": "d_lora_a", "lora_b": "d_lora_b"}[frozen]
        assert value is None if name.startswith(missing) else torch.equal(value, whole[name]), name
