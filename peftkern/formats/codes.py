"""The values that 4-bit codes and a nested absmax's bytes stand for, as tensors on any device."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["BLOCKSIZES", "CODES", "FLOATS", "code_tensor", "dynamic_map"]

# Source of the values: QLoRA (Dettmers et al., 2023), appendix E, as bitsandbytes stores them.
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8.0 / 12, 12.0 / 12, 4.0 / 12, 6.0 / 12, 2.0 / 12, 3.0 / 12)
FP4_CODE = _FP4_POSITIVE + tuple(-v for v in _FP4_POSITIVE)
CODES: Mapping[str, tuple[float, ...]] = {"nf4": NF4_CODE, "fp4": FP4_CODE}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what is quantized, and what comes out again
_DYNAMIC = "dynamic"


def code_tensor(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 code values of a quant type, fp32 [16]."""
    if quant_type not in CODES:
        raise ValueError(f"quant_type: got {quant_type!r}, expected one of {sorted(CODES)}")
    return _constant(quant_type, device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed dynamic 8-bit map of the nested absmax, fp32 [256], sorted (Dettmers, 8-bit optimizers,
    2021)."""
    return _constant(_DYNAMIC, device)


def _constant(name: str, device: torch.device | str) -> Tensor:
    """A copy of its own of the values `name`, made on the device: after the first call no byte comes from the
    host, so that quantizing can be captured into a CUDA graph and waits for nothing."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.tensor(_values(name), dtype=torch.float32, device=device)  # a fake one must not be kept
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return _kept(name, where).clone()


@functools.cache
def _kept(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_values(name), dtype=torch.float32, device=device)


@functools.cache
def _values(name: str) -> tuple[float, ...]:
    if name != _DYNAMIC:
        return CODES[name]
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        scaled = (10.0 ** (exponent - 6)) * means
        values += scaled.tolist() + (-scaled).tolist()
    return tuple(sorted(values))
