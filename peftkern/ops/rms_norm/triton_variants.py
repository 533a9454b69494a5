"""What RMSNorm's kernels are compiled for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...runtime.launch import specialization
from ...runtime.specialization import Specialization
from . import CASTS
from .triton import backward_call, d_weight_call, forward_call

__all__ = ["specializations"]


def specializations(arch: int) -> Iterator[Specialization]:
    """Every kernel, dtype and order of casting; heads (many rows a program), hidden sizes, and rows longer
    than a block."""
    dtypes = (
        (torch.float16, torch.bfloat16, torch.float32)
        if arch < 80
        else (torch.bfloat16, torch.float16, torch.float32)
    )
    shorts = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for dtype in dtypes:
        for n in (4096, 128, 576, 8192, 16384):
            x = torch.empty(64, n, dtype=dtype, device="meta")
            weight, rstd = (
                torch.empty(n, dtype=dtype, device="meta"),
                torch.empty(64, dtype=torch.float32, device="meta"),
            )
            name = f"rms-norm-{shorts[dtype]}-{n}"
            for cast in CASTS:
                arguments = x, weight, x, rstd, 1e-6, 1.0, cast
                yield specialization(f"{name}-fwd-{cast}", forward_call(*arguments), wide_loads=("from_ptr",))
                yield specialization(
                    f"{name}-add-fwd-{cast}",
                    forward_call(*arguments, x, x),
                    wide_loads=("from_ptr", "residual_ptr"),
                )
            yield specialization(f"{name}-bwd", backward_call(x, x, weight, rstd, x, 0.0))
            yield specialization(f"{name}-add-bwd", backward_call(x, x, weight, rstd, x, 0.0, x))
            for cast in CASTS:
                yield specialization(
                    f"{name}-d-weight-{cast}", d_weight_call(x, x, rstd, rstd.new_empty(2, n), cast)
                )
        mixed = forward_call(x, rstd.new_empty(x.shape[1]), x.float(), rstd, 1e-6, 0.0, "llama")
        yield specialization(f"rms-norm-{shorts[dtype]}-fp32-weight", mixed)
