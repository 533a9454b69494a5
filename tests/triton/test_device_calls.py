"""Whole calls on a GPU: in CUDA graphs, under autocast, on a second device, and past 2^31 elements."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight, use_backend
from peftkern.functional import (
    Adapter,
    Member,
    dequantize_4bit,
    gated_mlp,
    glu,
    linear_cross_entropy,
    qlora_group,
    qlora_linear,
    quantize_4bit,
)
from peftkern.runtime import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PAST_INT32 = 2**31 + 4096  # elements


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    usable, reason = backends.available(request.param)
    if not usable:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def _draw(*shape: int, device: str = "cuda", scale: float = 0.1) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def _member(n: int, k: int, device: str) -> Member:
    a, b = (_draw(*shape, device=device).requires_grad_() for shape in ((8, k), (n, 8)))
    seed = torch.tensor([7], device=device)
    return Member(NF4Weight.from_dense(_draw(n, k, device=device)), adapters=[Adapter(a, b, 0.5, 0.1, seed)])


def _adapters(*members: Member) -> list[Tensor]:
    return [t for m in members for adapter in m.adapters for t in (adapter.lora_a, adapter.lora_b)]


Call = tuple[Callable[[], Sequence[Tensor]], list[Tensor]]


def _group(m: int, device: str) -> Call:
    x, members = (
        _draw(m, 256, device=device).requires_grad_(),
        [_member(n, 256, device) for n in (256, 64, 64)],
    )
    return lambda: qlora_group(x, members), [x, *_adapters(*members)]


def _mlp(m: int, device: str) -> Call:
    x = _draw(m, 256, device=device).requires_grad_()
    members = [_member(384, 256, device), _member(384, 256, device), _member(256, 384, device)]
    return lambda: [gated_mlp(x, *members)], [x, *_adapters(*members)]


def _loss(m: int, device: str) -> Call:
    x, head = _draw(m, 256, device=device).requires_grad_(), _draw(1000, 256, device=device)
    labels = torch.randint(0, 1000, (m,), device=device)
    return lambda: [linear_cross_entropy(x, head, labels)], [x]


CALLS = {"group": _group, "mlp": _mlp, "loss": _loss}


def _step(call: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The results and the gradients of their sum."""
    results = list(call())
    grads = torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results])
    return [*(y.detach() for y in results), *grads]


def _equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("m", [4, 300])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_in_a_cuda_graph(backend: str, name: str, m: int) -> None:
    call, leaves = CALLS[name](m, "cuda")
    expected = [t.clone() for t in _step(call, leaves)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(call, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _step(call, leaves)
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert _equal(got, expected)


def test_quantizing_in_a_cuda_graph(backend: str) -> None:
    """Its code values and its map were copied to the device by the first call."""
    dense = _draw(256, 384)
    expected = quantize_4bit(dense)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize_4bit(dense)
    got.packed.zero_(), got.absmax_8bit.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name in ("packed", "code", "absmax_8bit", "absmax_code", "nested_absmax", "absmax_offset"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("m", [4, 300])
@pytest.mark.parametrize("name", ["group", "mlp"])
def test_autocast_changes_nothing_of_16_bit_operands(backend: str, name: str, m: int) -> None:
    call, leaves = CALLS[name](m, "cuda")
    expected = _step(call, leaves)
    with torch.autocast("cuda", torch.bfloat16):
        got = _step(call, leaves)
    assert _equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("m", [4, 300])
@pytest.mark.parametrize("name", CALLS)
def test_another_device_than_the_current_one(backend: str, name: str, m: int) -> None:
    call, leaves = CALLS[name](m, "cuda:1")
    if not backends.available(backend, 1)[0]:
        pytest.skip(backends.available(backend, 1)[1])
    with torch.cuda.device(1):
        expected = _step(call, leaves)
    with torch.cuda.device(0):
        got = _step(call, leaves)
    assert all(t.device.index == 1 for t in got) and _equal(got, expected)


@pytest.fixture
def large() -> Iterator[None]:
    """Room for three tensors of more than 2^31 16-bit elements."""
    free = torch.cuda.mem_get_info()[0]
    if free < 16 << 30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free, 16 are needed")
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.slow
def test_dequantize_past_int32(backend: str, large: None) -> None:
    """The last rows of the whole are those of the rows alone: an index that wrapped would read others."""
    k = 4096
    n = PAST_INT32 // k
    dense = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_()
    weight = quantize_4bit(dense, nested=False)
    whole = dequantize_4bit(weight, out=dense)
    last = quantize_4bit(whole[-8:].contiguous(), nested=False)
    assert torch.equal(dequantize_4bit(last), whole[-8:])
    assert torch.equal(weight.packed.view(n, -1)[-8:], last.packed.view(8, -1))


@pytest.mark.slow
def test_activations_past_int32(backend: str, large: None) -> None:
    m, width = PAST_INT32 // 4096, 4096
    gate = torch.empty(m, width, dtype=torch.bfloat16, device="cuda").normal_()
    with torch.no_grad():
        y = glu(gate, gate)
    assert torch.equal(y[-8:], glu(gate[-8:].contiguous(), gate[-8:].contiguous()))


@pytest.mark.slow
def test_a_linear_of_more_outputs_than_int32_counts(backend: str, large: None) -> None:
    n, k = 4096, 64
    m = PAST_INT32 // n
    weight, x = NF4Weight.from_dense(_draw(n, k)), _draw(m, k, scale=1.0)
    a, b = _draw(8, k), _draw(n, 8)
    with torch.no_grad():
        y = qlora_linear(x, weight, lora_a=a, lora_b=b)
        last = qlora_linear(x[-1024:].contiguous(), weight, lora_a=a, lora_b=b)
    error = (y[-1024:].double() - last.double()).norm() / last.double().norm()
    assert error < 0.01, "two orders of the same sums differ by less than a rounding"
