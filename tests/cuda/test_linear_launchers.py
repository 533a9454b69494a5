"""The Python launchers of the fused linears: over the emulated module with tensors of the CPU, and on a
device with `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from peftkern.ops.linear import cuda

from ..ops.bounds import assert_as_accurate
from .linear import FLOATS, Case, exact, make_case, plain


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated":
        request.getfixturevalue("emulated_module")
        return "cpu"
    return "cuda"


def _quant(case: Case) -> tuple:
    w = case.weight
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


def _forward(launcher, case: Case) -> tuple[Tensor, Tensor]:
    """y and xa, as the op calls the launchers."""
    seed = torch.tensor([case.seed], device=case.x.device) if case.dropout_p else None
    xa = cuda.xa_forward(case.x, case.a, case.dropout_p, seed)
    y = launcher(
        case.x, case.weight.packed, _quant(case), case.weight.shape[0], case.bias, case.b, xa, case.scaling
    )
    return y, xa


KERNELS = [
    (kernel, dtype)
    for dtype in FLOATS
    for kernel in ("gemv", "mma")
    if (kernel, dtype) != ("mma", torch.float32)
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS, ids=str)
def test_against_fp64(device: str, kernel: str, dropout_p: float, dtype: torch.dtype) -> None:
    launcher = cuda.gemv_forward if kernel == "gemv" else cuda.mma_forward
    cases = [make_case(4, 40, 128, 6, dtype, lora_dtype=torch.float32, dropout_p=dropout_p) for _ in range(6)]
    runs = [(*_forward(launcher, case.to(device)), *plain(case), *exact(case)) for case in cases]
    for name, i in (("y", 0), ("xa", 1)):
        ours, by_torch, by_fp64 = (
            torch.cat([run[i + 2 * j].cpu().flatten() for run in runs]) for j in range(3)
        )
        assert_as_accurate(name, ours, by_torch, by_fp64)


def test_strided_and_unaligned_arguments_give_the_same_bits(device: str) -> None:
    case = make_case(3, 20, 64, 4, torch.bfloat16).to(device)
    y, xa = _forward(cuda.mma_forward, case)
    views = replace(
        case, x=case.x.t().contiguous().t(), a=case.a.t().contiguous().t(), b=case.b.t().contiguous().t()
    )
    assert not views.x.is_contiguous()
    assert all(
        torch.equal(got, expected)
        for got, expected in zip(_forward(cuda.mma_forward, views), (y, xa), strict=True)
    )
    shifted = (
        torch.empty(case.x.numel() + 1, dtype=case.x.dtype, device=device)[1:].view_as(case.x).copy_(case.x)
    )
    assert shifted.data_ptr() % 16 and torch.equal(_forward(cuda.mma_forward, replace(case, x=shifted))[0], y)


def test_no_adapter_and_no_bias(device: str) -> None:
    case = make_case(2, 20, 64, 4, torch.float32, bias=False).to(device)
    packed, quant = case.weight.packed, _quant(case)
    bare = cuda.gemv_forward(case.x, packed, quant, 20, None, None, None, 1.0)
    no_effect = cuda.gemv_forward(
        case.x, packed, quant, 20, None, case.b, cuda.xa_forward(case.x, case.a, 0.0, None), 0.0
    )
    assert torch.equal(bare, no_effect)
    assert cuda.gemv_forward(case.x[:0], packed, quant, 20, None, None, None, 1.0).shape == (0, 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 24}, "weight: got shape"),
        ({"xa": torch.zeros(2, 3)}, "lora_b, xa"),
        ({"xa": None}, "lora_b, xa"),
        ({"bias": torch.zeros(19)}, "bias: got shape"),
        ({"x": torch.zeros(2, 64, device="meta")}, "weight: got device"),
    ],
    ids=["n", "xa", "no xa", "bias", "device"],
)
def test_what_does_not_fit_is_named(emulated_module, change: dict, words: str) -> None:
    case = make_case(2, 20, 64, 4, torch.float32)
    arguments = {
        "x": case.x,
        "weight": case.weight.packed,
        "quant": _quant(case),
        "n": 20,
        "bias": case.bias,
        "lora_b": case.b,
    }
    arguments |= {"xa": torch.zeros(2, 4), "scaling": 1.0} | change
    with pytest.raises(ValueError, match=words):
        cuda.gemv_forward(**arguments)


def test_xa_checks_its_arguments(emulated_module) -> None:
    case = make_case(2, 20, 64, 4, torch.float32)
    with pytest.raises(ValueError, match="lora_a: got shape"):
        cuda.xa_forward(case.x[:, :32], case.a, 0.0, None)
    with pytest.raises(TypeError, match="seed: got torch.int32"):
        cuda.xa_forward(case.x, case.a, 0.1, torch.tensor([1], dtype=torch.int32))


def test_the_tensor_core_kernel_is_not_offered_where_it_does_not_fit(emulated_module) -> None:
    case = make_case(2, 20, 64, 4, torch.bfloat16)
    assert not cuda.mma_supported(case.x, _quant(case), 20, 64)  # not on a GPU
    with pytest.raises(ValueError, match="architecture"):
        cuda.mma_forward(case.x.float(), case.weight.packed, _quant(case), 20, None, None, None, 1.0)


@pytest.mark.gpu
def test_launches_can_be_captured_into_a_graph() -> None:
    """Nothing synchronizes or allocates beside the outputs; a replay sees new inputs, and another seed."""
    case = make_case(4, 40, 128, 6, torch.bfloat16, dropout_p=0.3).to("cuda")
    seed = torch.tensor([case.seed], device="cuda")

    def step() -> Tensor:
        xa = cuda.xa_forward(case.x, case.a, case.dropout_p, seed)
        y = cuda.gemv_forward(
            case.x, case.weight.packed, _quant(case), 40, case.bias, case.b, xa, case.scaling
        )
        return y + cuda.mma_forward(
            case.x, case.weight.packed, _quant(case), 40, case.bias, case.b, xa, case.scaling
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    case.x.normal_()
    seed.fill_(99)
    graph.replay()
    assert torch.equal(out, step())
