"""What only a GPU can show: streams, CUDA graphs, torch.compile, several devices, memory, and that no call
waits for the device."""

from __future__ import annotations

import pytest
import torch

from peftkern import NF4Weight, use_backend
from peftkern.functional import dequantize_4bit, qlora_linear
from peftkern.ops.linear import tuned
from peftkern.runtime import backends

from .test_gpu_linear import FUSED, NAMES, SLAB, _case, _ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ROWS = {"few rows": None, "fused": FUSED, **SLAB}
GPU_BACKENDS = ["cuda", "triton"]


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest):
    usable, reason = backends.available(request.param)
    if not usable:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def _step(row, m: int = 300, dropout_p: float = 0.1):
    """A closure over fixed tensors: forward and backward of one linear, giving y and the gradients."""
    weight, x, a, b, bias, dy = _case("cuda", m, 256, 384, 8, torch.bfloat16, torch.bfloat16, False)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    seed = torch.tensor([7], device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        y = qlora_linear(x, weight, bias, a, b, scaling=0.7, dropout_p=dropout_p, seed=seed)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def within() -> tuple[torch.Tensor, ...]:
        if row is None:
            return step()
        with tuned.use_row(row):
            return step()

    return within


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_side_stream_gives_the_same_bits(backend: str, row) -> None:
    step = _step(row, m=8 if row is None else 300)
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_forward_and_backward_in_a_cuda_graph(backend: str, row) -> None:
    step = _step(row, m=8 if row is None else 300)
    expected = [t.clone() for t in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_no_call_waits_for_the_device(backend: str, row) -> None:
    step = _step(row, m=8 if row is None else 300)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("m", [4, 300])
def test_compile_fullgraph(backend: str, m: int) -> None:
    weight, x, a, b, bias, dy = _case("cuda", m, 256, 384, 8, torch.bfloat16, torch.bfloat16, False)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]

    def f(x, a, b, bias):
        return qlora_linear(x, weight, bias, a, b, scaling=0.7)

    expected = torch.autograd.grad(f(*leaves), leaves, dy)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*leaves), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_runs_give_the_same_bits(backend: str, row, dtype: torch.dtype) -> None:
    case, seed = (
        _case("cuda", 8 if row is None else 600, 256, 384, 16, dtype, dtype, False),
        torch.tensor([7], device="cuda"),
    )
    if row is None:
        weight, x, a, b, bias, _ = case
        first, second = (qlora_linear(x, weight, bias, a, b, dropout_p=0.1, seed=seed) for _ in range(2))
        assert torch.equal(first, second)
        return
    first, second = (_ours(*case, 0.1, seed, row) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_another_device_than_the_current_one(backend: str) -> None:
    weight = NF4Weight.from_dense(torch.randn(256, 384)).to("cuda:1")
    with torch.cuda.device(0):
        got = dequantize_4bit(weight)
    assert got.device.index == 1
    with use_backend("reference"):
        assert torch.equal(got, dequantize_4bit(weight))


def test_no_dense_weight_outlives_the_call(backend: str) -> None:
    """Peak memory of forward and backward stays below activations, gradients and one slab; what is kept
    between them is far less."""
    n, k, m = 4096, 4096, 512
    weight = NF4Weight.from_dense(torch.randn(n, k, device="cuda") * 0.02)
    x = torch.randn(m, k, device="cuda").bfloat16().requires_grad_()
    a, b = (torch.randn(s, device="cuda").bfloat16().mul(0.02).requires_grad_() for s in ((16, k), (n, 16)))
    torch.autograd.grad(qlora_linear(x, weight, lora_a=a, lora_b=b).sum(), (x, a, b))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = qlora_linear(x, weight, lora_a=a, lora_b=b)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= m * 16 * 4 + 4096, "xa alone is kept beside y"
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(y, (x, a, b), torch.ones_like(y))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * n * k + 8 * max(x.nbytes, y.nbytes)
