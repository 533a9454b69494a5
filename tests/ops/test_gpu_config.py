"""Which GPU kernels a call takes, and what `peftkern tune` keeps: pure functions, no GPU."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from peftkern import tuning
from peftkern.ops.linear import tuned, waves
from peftkern.ops.linear.config import GPU_TABLE, choose_gpu, nearest_arch, slices
from peftkern.ops.linear.low_rank_config import LowRankConfig, beside_a_slab, choose_low_rank


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


H100 = Path(__file__).parents[2] / "benchmarks" / "results" / "h100-80gb-hbm3"


def _record() -> list[tuple[int, int, int, bool, str, float]]:
    """(M, columns, contraction, forward, variant, us) of an H100's record, kernels alone."""
    names = {"peftkern, fused": "fused", "peftkern, slabs": "slab", "peftkern, mma": "mma"}
    found = []
    for file in ("small.csv", "decode.csv"):
        for row in csv.DictReader((H100 / file).open(newline="")):
            if row["timed"] == "graph" and row["p50"] and row["provider"] in names:
                n, k = map(int, row["shape"].split("x"))
                forward = row["mode"] != "dx"
                columns, contraction = (n, k) if forward else (k, n)
                us = 1e3 * float(row["p50"])
                found.append((int(row["M"]), columns, contraction, forward, names[row["provider"]], us))
    return found


def test_the_waves_of_an_h100_are_those_of_its_record() -> None:
    rates, times = waves.RATES[90], {"fused": waves.fused_us, "slab": waves.slab_us}
    rows = [row for row in _record() if row[4] in times]
    assert len(rows) >= 24
    for m, columns, contraction, forward, variant, us in rows:
        got = times[variant](m, columns, contraction, rates)
        assert got == pytest.approx(us, rel=0.16 if forward else 0.23), (m, columns, contraction, variant)


def test_what_an_h100_takes_was_the_fastest_there() -> None:
    """Of few rows and 4096 x 4096, within 5 %: two of the times differ by less than they spread."""
    measured: dict[tuple[int, bool], dict[str, float]] = {}
    for m, columns, contraction, forward, variant, us in _record():
        if columns == contraction == 4096 and m >= 16 and (forward or variant != "mma"):
            measured.setdefault((m, forward), {})[variant] = us
    assert len(measured) == 12
    for (m, forward), times in measured.items():
        taken = _choose(m, arch=90, forward=forward, shape=(4096, 4096))
        assert times[taken] <= 1.05 * min(times.values()), (m, forward, taken, times)


def test_small_weights_take_a_slab_sooner_where_the_rates_are_known() -> None:
    def most(shape: tuple[int, int], arch: int, forward: bool = True) -> int:
        options = {"arch": arch, "shape": shape, "forward": forward, "cuda": False, "mma": False}
        return max((m for m in range(1, 600) if _choose(m, **options) == "fused"), default=0)

    assert most((4096, 4096), 90) == most((14336, 4096), 90) == most((14336, 4096), 90, False) == 128
    assert most((1024, 4096), 90) == 64 and most((1024, 4096), 89) == 256
    assert most((0, 4096), 90) == 128


def test_a_measured_row_is_asked_for_the_most_similar_shape() -> None:
    row = replace(GPU_TABLE[90], fused_max_m=100, fused_by_shape=((1024, 4096, 20), (14336, 4096, 200)))
    for shape, limit in (
        ((4096, 4096), 100),
        ((1024, 4096), 20),
        ((512, 4096), 20),
        ((11008, 4096), 200),
        ((4096, 14336), 100),
        (None, 100),
    ):
        options = {"row": row, "shape": shape, "cuda": False, "mma": False}
        assert (_choose(limit, **options), _choose(limit + 1, **options)) == ("fused", "slab"), shape


def test_the_tensor_core_kernel_has_a_last_row() -> None:
    assert [_choose(m, arch=90) for m in (3, 32, 33, 128, 129)] == ["mma", "mma", "fused", "fused", "slab"]


H100_L2, SMALL_L2 = 50 << 20, 6 << 20


def _passes(m: int, n: int, k: int, l2: int, sms: int = 132, arch: int = 90) -> LowRankConfig:
    found = choose_low_rank(m, n, k, 16, mode="native", sms=sms, arch=arch)
    return beside_a_slab(found, n, 2, l2)


@pytest.mark.parametrize(
    ("m", "n", "k", "one_pass"),
    [
        (8192, 4096, 4096, False),
        (8192, 4096, 14336, False),
        (2048, 14336, 4096, True),
        (8192, 14336, 4096, True),
    ],
)
def test_dy_is_read_twice_where_that_was_faster_on_an_h100(m: int, n: int, k: int, one_pass: bool) -> None:
    """Its notes: 66 us against 72, 74 against 88, 151 against 120, 251 against 236."""
    assert _passes(m, n, k, H100_L2).fused == one_pass
    assert _passes(m, n, k, SMALL_L2).fused, "a small L2 keeps no rows at all"
    assert _passes(m, n, k, H100_L2).xa_splits == 1


def test_a_card_of_132_multiprocessors_walks_as_long_as_one_of_128() -> None:
    """256 programs for 4096 columns in chunks of 512 rows are nearly two for every SM."""
    for sms, rows in ((128, 512), (132, 512), (148, 256)):
        found = choose_low_rank(8192, 4096, 4096, 16, mode="native", sms=sms, arch=90)
        assert (found.dy_rows, found.x_rows) == (rows, rows), sms


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
    row = replace(row, fused_by_shape=((1024, 4096, 32), (14336, 4096, 128)))
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
        json.dumps({"config": asdict(GPU_TABLE[89]) | {"fused_by_shape": [[0, 4096, 3]]}}),
        json.dumps({"config": asdict(GPU_TABLE[89]) | {"fused_by_shape": [[4096, 3]]}}),
    ],
    ids=range(8),
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
    words = "measured on this card: medium, gemm, slab"
    assert got == replace(row, fused_max_m=64, gemm="triton", slab_bytes=128 << 20, measured=words)
    decode = {
        f"decode/{m}/{name}": ms
        for m, *row_ in ((1, 1, 3, 2), (2, 1, 2, 2), (4, 3, 1, 2))
        for name, ms in zip(("gemv", "mma", "fused"), row_, strict=True)
    }
    assert (tuning.derive(decode, row).gemv_max_m, tuning.derive(decode, row).mma_min_m) == (2, 3)
    assert tuning.derive({}, row) == row


def test_derive_keeps_a_limit_for_each_shape_and_the_tensor_core_kernel_s_last_row() -> None:
    row, timings = GPU_TABLE[89], {}
    for kind, last in (("medium", 64), ("medium 1024x4096", 16), ("medium 14336x4096", 128)):
        for m in (16, 64, 128):
            timings |= {f"{kind}/{m}/fused": 1.0 if m <= last else 3.0, f"{kind}/{m}/slab": 2.0}
    got = tuning.derive(timings, row)
    assert got.fused_max_m == 64 and got.fused_by_shape == ((1024, 4096, 16), (14336, 4096, 128))
    assert got.mma_max_m == row.mma_max_m, "not measured"
    few = {"decode/1/mma": 9.0, "decode/1/fused": 1.0, "decode/1/gemv": 1.0}
    few |= {f"decode/16/{name}": ms for name, ms in (("gemv", 5.0), ("mma", 1.0), ("fused", 2.0))}
    few |= {"few/32/mma": 1.5, "few/32/fused": 2.0, "few/64/mma": 3.0, "few/64/fused": 2.0}
    assert tuning.derive(few, row).mma_max_m == 32


def test_tune_without_a_gpu_says_what_it_needs(capsys: pytest.CaptureFixture) -> None:
    from types import SimpleNamespace

    import torch

    from peftkern import tuning

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    assert tuning.main(SimpleNamespace(forget=False)) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
