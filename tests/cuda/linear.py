"""One QLoRA linear as the fused CUDA kernels see it: random cases, the C calls, and what plain PyTorch and
fp64 give."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.formats.nf4 import code_tensor
from peftkern.ops.dequantize import reference as dequantize
from peftkern.ops.philox import dropout_scale

from ..native.compiled import CSRC, DTYPES, c_lora, c_weight, i64, once, pointer
from ..ops.bounds import assert_as_accurate
from .device_library import CudaLibrary
from .emulated import compile_emulated, load_emulated

__all__ = [
    "FLOATS",
    "Case",
    "assert_accurate",
    "exact",
    "linear",
    "load_probes",
    "make_case",
    "plain",
    "random_weight",
    "run_xa",
]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 3  # poisoned rows behind y and xa, which must stay so


@dataclass(frozen=True)
class Case:
    """The arguments of one call, on the CPU."""

    weight: NF4Weight
    x: Tensor  # [M, K]
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    bias: Tensor | None  # [N]
    scaling: float = 0.7
    dropout_p: float = 0.0
    seed: int = 1234567890123

    def to(self, device: str) -> Case:
        if device == "cpu":
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return replace(
            self,
            weight=self.weight.to(device),
            x=self.x.to(device),
            a=self.a.to(device),
            b=self.b.to(device),
            bias=bias,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, N, K, R."""
        return self.x.shape[0], self.b.shape[0], self.x.shape[1], self.a.shape[0]

    @property
    def threshold(self) -> int:
        return round(self.dropout_p * 65536)


def load_probes(factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/cuda/probes/*.cu, emulated; compiled once a session."""
    sources = [*sorted((Path(__file__).parent / "probes").glob("*.cu")), CSRC / "cuda" / "status.cu"]
    return load_emulated(once(factory, "cuda_probes", lambda folder: compile_emulated(folder, sources)))


def make_case(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    *,
    lora_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
    **quant: object,
) -> Case:
    low = lora_dtype or dtype
    weight = NF4Weight.from_dense(torch.randn(n, k) * 0.05, **quant)
    a, b = (torch.randn(r, k) / k**0.5).to(low), (torch.randn(n, r) * 0.1).to(low)
    return Case(
        weight,
        torch.randn(m, k).to(dtype),
        a,
        b,
        torch.randn(n).to(dtype) if bias else None,
        dropout_p=dropout_p,
    )


def random_weight(n: int, k: int, quant_type: str, blocksize: int) -> NF4Weight:
    """Random codes under random plain scales of either sign, some of them zero."""
    absmax = torch.randn(-(-n * k // blocksize))
    absmax[::7] = 0
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8)
    return NF4Weight(
        packed, code_tensor(quant_type), (n, k), torch.bfloat16, blocksize, quant_type, absmax=absmax
    )


def _dense(case: Case) -> Tensor:
    """The decoded weight by the definition, fp32."""
    w = case.weight
    absmax = (w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    return dequantize.dequantize_4bit(
        w.packed, w.code, *absmax, w.shape, w.blocksize, w.nested_blocksize, torch.float32
    )


def _keep(case: Case) -> Tensor:
    m, _, k, _ = case.sizes
    return (
        dropout_scale(m, k, case.dropout_p, torch.tensor([case.seed])) if case.dropout_p else torch.ones(m, k)
    )


def _linear(case: Case, w: Tensor, dtype: torch.dtype, low: torch.dtype) -> tuple[Tensor, Tensor]:
    x, a, b = case.x.to(dtype), case.a.to(low), case.b.to(low)
    xa = (x.to(low) * _keep(case).to(low)) @ a.t()
    bias = None if case.bias is None else case.bias.to(dtype)
    return torch.nn.functional.linear(x, w.to(dtype), bias) + (case.scaling * (xa @ b.t())).to(dtype), xa


def plain(case: Case) -> tuple[Tensor, Tensor]:
    """y, xa by plain PyTorch: y in x's dtype as PEFT computes it; xa in fp32 from the same numbers."""
    y, _ = _linear(case, _dense(case), case.x.dtype, case.a.dtype)
    return y, (case.x.float() * _keep(case)) @ case.a.float().t()


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """y, xa in fp64."""
    return _linear(case, _dense(case).double(), torch.float64, torch.float64)


def _checked(out: Tensor, rows: int) -> Tensor:
    assert out[rows:].isnan().all(), "written beyond the end"
    return out[:rows]


def run_xa(library: CudaLibrary, case: Case) -> Tensor:
    """drop(x) A^T on the library's device, fp32 [M, R]."""
    (m, _, k, r), c = case.sizes, case.to(library.device)
    seed = torch.tensor([case.seed], device=library.device) if case.threshold else None
    out = library.poisoned(m + GUARD, r, dtype=torch.float32)
    low = c_lora(c.a, c.b, case.scaling, case.threshold)
    library.check(
        library.lib.pk_xa_cuda(
            ctypes.byref(low),
            pointer(seed),
            pointer(c.x),
            DTYPES[c.x.dtype],
            i64(m),
            i64(k),
            pointer(out),
            *library.where(),
        )
    )
    return _checked(out, m)


def linear(
    library: CudaLibrary, function: str, case: Case, xa: Tensor | None, extra: Sequence[int] | None = None
) -> Tensor:
    """y of `function` on the library's device; xa None: no low-rank part. A probe takes `extra` for stream
    and device."""
    (m, n, _, _), c = case.sizes, case.to(library.device)
    out = library.poisoned(m + GUARD, n, dtype=c.x.dtype)
    weight, low = c_weight(c.weight), c_lora(c.a, c.b, case.scaling) if xa is not None else None
    bias = (pointer(c.bias), 0 if c.bias is None else DTYPES[c.bias.dtype])
    arguments = (
        ctypes.byref(weight),
        None if low is None else ctypes.byref(low),
        pointer(c.x),
        DTYPES[c.x.dtype],
        i64(m),
        *bias,
        pointer(xa),
        pointer(out),
    )
    library.check(getattr(library.lib, function)(*arguments, *(library.where() if extra is None else extra)))
    return _checked(out, m)


def assert_accurate(
    library: CudaLibrary, function: str, cases: Sequence[Case], extra: Sequence[int] | None = None
) -> None:
    """xa and y of several draws together against fp64, bounded by plain PyTorch's error."""
    runs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"xa": [], "y": []}
    for case in cases:
        xa = run_xa(library, case) if hasattr(library.lib, "pk_xa_cuda") else exact(case)[1].float()
        y = linear(library, function, case, xa, extra)
        for name, ours, index in (("y", y, 0), ("xa", xa, 1)):
            runs[name].append((ours.cpu(), plain(case)[index], exact(case)[index]))
    for name, triples in runs.items():
        ours, by_torch, by_fp64 = (torch.cat([t[i].flatten() for t in triples]) for i in range(3))
        assert_as_accurate(name, ours, by_torch, by_fp64)
