"""The same providers under pytest-benchmark, small: pytest benchmarks --benchmark-only."""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")

from . import (
    bench_attention,
    bench_dequantize,
    bench_gemv,
    bench_linear_cross_entropy,
    bench_mmd,
    bench_qlora_linear,
    bench_quantize,
    bench_switching,
    peers,
)
from .harness import Spec

MODULES = (
    bench_dequantize,
    bench_quantize,
    bench_gemv,
    bench_qlora_linear,
    bench_switching,
    bench_linear_cross_entropy,
    bench_attention,
    bench_mmd,
)
CASES = [(module, spec, number) for module in MODULES for spec in module.specs(True) for number in range(5)]


@pytest.mark.parametrize(
    ("module", "spec", "number"),
    CASES,
    ids=lambda v: v.id if isinstance(v, Spec) else getattr(v, "__name__", str(v)),
)
def test_benchmark(benchmark, module, spec: Spec, number: int) -> None:
    if not peers.has("bitsandbytes") and number > 2:
        pytest.skip("bitsandbytes is not installed")
    providers = module.build(spec)
    if number >= len(providers):
        pytest.skip("this benchmark has fewer providers")
    provider = providers[number]
    provider.check(provider.call())
    benchmark.group = spec.id
    benchmark.extra_info["provider"] = provider.name
    benchmark.pedantic(provider.call, rounds=3, iterations=1, warmup_rounds=1)
