"""Which GPU kernels a call takes, and what `peftkern tune` keeps: pure functions, no GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from peftkern import tuning
from peftkern.ops.qlora_linear import config, tuned
from peftkern.ops.qlora_linear.config import GPU_TABLE, choose_gpu, nearest_arch, slices


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    tuned.load.cache_clear()
    yield
    tuned.load.cache_clear()


def _choose(m: int, **options) -> str:
    settings = dict(arch=89, dtype="bfloat16", forward=True, cuda=True, mma=True) | options
    return choose_gpu(m=m, **settings).regime


def test_regimes_of_a_4090() -> None:
    assert [_choose(m) for m in (1, 2, 3, 256, 257, 8192)] == ["gemv", "gemv", "mma", "mma", "slab", "slab"]
    assert [_choose(m, cuda=False, mma=False) for m in (1, 16, 256, 257)] == [
        "fused",
        "fused",
        "fused",
        "slab",
    ]
    assert [_choose(m, mma=False) for m in (16, 17)] == ["gemv", "fused"]
    assert [_choose(m, forward=False) for m in (1, 16, 256, 257)] == ["fused", "fused", "fused", "slab"], (
        "backward has no GEMV"
    )
    assert _choose(4, dense=True) == "slab"


def test_every_row_is_a_complete_choice() -> None:
    for arch, row in GPU_TABLE.items():
        assert (
            row.gemm in ("cublas", "triton")
            and row.slab_bytes >= 4096 * 4096 * 2
            and row.gemv_max_m >= row.mma_min_m - 1 > 0
        )
        assert f"sm_{arch}" in choose_gpu(arch=arch, dtype="bfloat16", m=8192, forward=True, cuda=True).why


def test_fp32_slabs_stay_with_cublas_and_its_tf32_switch() -> None:
    assert choose_gpu(arch=89, dtype="float32", m=8192, forward=True, cuda=False).gemm == "cublas"
    assert choose_gpu(arch=89, dtype="bfloat16", m=8192, forward=True, cuda=False).gemm == "triton"


@pytest.mark.parametrize(
    ("arch", "row"), [(60, 75), (75, 75), (87, 86), (89, 89), (103, 100), (121, 120), (999, 120)]
)
def test_unknown_devices_take_the_nearest_row(arch: int, row: int) -> None:
    assert nearest_arch(arch) == row
    assert (
        choose_gpu(arch=arch, dtype="bfloat16", m=8192, forward=True, cuda=False).slab_bytes
        == GPU_TABLE[row].slab_bytes
    )


@pytest.mark.parametrize("total", [1, 100, 128, 4096, 14336, 14336 + 37, 151936])
@pytest.mark.parametrize("limit", [1 << 20, 36 << 20, 1 << 40])
def test_slices_cover_once_within_the_limit(total: int, limit: int) -> None:
    parts = slices(total, 4096, 2, limit)
    assert parts[0].start == 0 and parts[-1].stop == total
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert all((s.stop - s.start) % 128 == 0 for s in parts[:-1])
    assert all(s.stop - s.start <= max(limit // (4096 * 2), 128) for s in parts)
    widest, narrowest = (f(s.stop - s.start for s in parts) for f in (max, min))
    assert len(parts) == 1 or narrowest > 0 and widest - narrowest <= 128 * len(parts)


def test_one_slab_for_every_layer_of_an_8b_model() -> None:
    for row in GPU_TABLE.values():
        assert len(slices(4096, 4096, 2, row.slab_bytes)) == len(slices(14336, 4096, 2, row.slab_bytes)) == 1


def test_a_tuned_row_stands_before_the_table() -> None:
    row = replace(GPU_TABLE[89], fused_max_m=64, gemm="cublas", measured="measured on this card")
    tuned.save("NVIDIA GeForce RTX 4090", row, {"medium/16/fused": 0.1}, {"torch": "2.11"})
    assert tuned.path("NVIDIA GeForce RTX 4090").name == "nvidia-geforce-rtx-4090.json"
    assert tuned.load("NVIDIA GeForce RTX 4090") == row and tuned.load("NVIDIA L4") is None
    assert (
        choose_gpu(arch=89, dtype="bfloat16", m=65, forward=True, cuda=True, mma=True, row=row).regime
        == "slab"
    )
    tuned.forget("NVIDIA GeForce RTX 4090")
    assert tuned.load("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"config": 3}',
        "[]",
        json.dumps({"config": asdict(GPU_TABLE[89]) | {"gemm": "other"}}),
        '{"config": {"fused_max_m": 3}}',
    ],
    ids=range(6),
)
def test_a_broken_tuning_file_is_named_and_left_out(text: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tuned.path("card")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert tuned.load("card") is None
    assert "peftkern tune" in caplog.text and str(file) in caplog.text


def test_crossover() -> None:
    assert tuned.crossover([1, 2, 4, 8], [1, 1, 1, 3], [2, 2, 2, 2]) == 4
    assert tuned.crossover([1, 2, 4], [3, 1, 1], [2, 2, 2]) == 0
    assert tuned.crossover([1, 2, 4], [1, 2.01, 1], [2, 2, 2]) == 4, "a loss below 2 % between wins is noise"
    assert tuned.crossover([1, 2, 4], [1, 2.1, 1], [2, 2, 2]) == 1


def test_derive_takes_the_measured_limits_and_keeps_the_rest() -> None:
    row = GPU_TABLE[90]
    timings = {f"medium/{m}/fused": m / 64 for m in (16, 64, 128)} | {
        f"medium/{m}/slab": 1.0 for m in (16, 64, 128)
    }
    timings |= {"gemm/2048/cublas": 2.0, "gemm/2048/triton": 1.0, "slab/2048/36": 3.0, "slab/2048/128": 2.0}
    got = tuning.derive(timings, row)
    assert got == config.GPUConfig(
        row.gemv_max_m, row.mma_min_m, 64, "triton", 128 << 20, "measured on this card: medium, gemm, slab"
    )
    decode = {
        f"decode/{m}/{name}": ms
        for m, *row_ in ((1, 1, 3, 2), (2, 1, 2, 2), (4, 3, 1, 2))
        for name, ms in zip(("gemv", "mma", "fused"), row_, strict=True)
    }
    assert (tuning.derive(decode, row).gemv_max_m, tuning.derive(decode, row).mma_min_m) == (2, 3)
    assert tuning.derive({}, row) == row


def test_tune_without_a_gpu_says_what_it_needs(capsys: pytest.CaptureFixture) -> None:
    import torch

    from peftkern.__main__ import main

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    assert main(["tune"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
