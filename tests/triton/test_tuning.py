"""`peftkern tune` measures what it says: every variant it compares runs, and takes the regime it is named
after."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peftkern import tuning, use_backend
from peftkern.ops.linear import gpu
from peftkern.ops.linear.config import GPU_TABLE


def test_every_variant_runs_in_its_own_regime(device: str, monkeypatch) -> None:
    taken: list[tuple[str, str, int]] = []
    choose = gpu.choose

    def recorded(x, quant, n, k, *, forward):
        choice = choose(x, quant, n, k, forward=forward)
        taken.append((choice.regime, choice.gemm, choice.slab_bytes))
        return choice

    def timer(functions):
        """The order of the variants as their times, after one run of each."""
        for name, f in functions.items():
            taken.clear()
            f()
            torch.cuda.synchronize() if device == "cuda" else None
            regimes = {regime for regime, _, _ in taken}
            assert len(taken) == 2 and regimes == {name if name in ("fused", "slab") else "slab"}
            if name in ("cublas", "triton"):
                assert all(gemm == name for _, gemm, _ in taken)
            if name.isdigit():
                assert all(size == int(name) << 20 for _, _, size in taken)
        return {name: float(i + 1) for i, name in enumerate(functions)}

    monkeypatch.setattr(gpu, "choose", recorded)
    rows: list[str] = []
    with use_backend("triton"):
        timings = tuning.measure(
            device,
            timer,
            square=(64, 64),
            up=(96, 64),
            others=(),
            sizes=((1,), (16, 32), 40),
            print_row=rows.append,
        )
    assert sorted(timings) == sorted(
        [
            "medium/16/fused",
            "medium/16/slab",
            "medium/32/fused",
            "medium/32/slab",
            *(f"medium 96x64/{m}/{name}" for m in (16, 32) for name in ("fused", "slab")),
            "gemm/40/cublas",
            "gemm/40/triton",
        ]
        + [f"slab/40/{mib}" for mib in tuning.SLAB_MIB]
    )
    assert len(rows) == 6
    row = tuning.derive(timings, GPU_TABLE[89])
    assert (row.fused_max_m, row.gemm, row.slab_bytes) == (32, "cublas", tuning.SLAB_MIB[0] << 20)
    assert row.fused_by_shape == ((96, 64, 32),)


def test_weights_rotate_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy has bytes of its own, and a step reads every one of them once."""
    weight = tuning.NF4Weight.from_dense(torch.randn(64, 64))
    properties = SimpleNamespace(L2_cache_size=5 * weight.nbytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    copies = tuning._copies(weight, "cuda")
    assert len(copies) == 10 and len({copy.packed.data_ptr() for copy in copies} | {0}) == 11
    assert all(torch.equal(copy.dequantize(), weight.dequantize()) for copy in copies)
    monkeypatch.setattr(tuning, "_copies", lambda weight, _: copies[:3])
    read: list[int] = []
    linear = tuning.functional.qlora_linear
    told = lambda x, w, **given: (read.append(w.packed.data_ptr()), linear(x, w, **given))[1]  # noqa: E731
    monkeypatch.setattr(tuning.functional, "qlora_linear", told)
    step, count = tuning._step("cpu", (64, 64), 4, True)
    step()
    assert count == 3 and read == [copy.packed.data_ptr() for copy in copies[:3]]


def test_a_buffer_for_groups_survives_if_the_largest_measured_was_fastest() -> None:
    table = GPU_TABLE[89].slab_bytes
    falling, rising = ({f"slab/40/{mib}": sign * float(mib) for mib in tuning.SLAB_MIB} for sign in (-1, 1))
    assert tuning.derive(falling, GPU_TABLE[89]).slab_bytes == table > max(tuning.SLAB_MIB) << 20
    assert tuning.derive(rising, GPU_TABLE[89]).slab_bytes == min(tuning.SLAB_MIB) << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_timer_times_kernels_and_not_their_python() -> None:
    x = torch.randn(2048, 2048, device="cuda")
    times = tuning.cuda_timer({"product": lambda: x @ x, "slow caller": lambda: (sum(range(300_000)), x @ x)})
    assert 0 < times["slow caller"] < 1.5 * times["product"]
