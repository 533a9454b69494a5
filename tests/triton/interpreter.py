"""Whether Triton's interpreter runs here: that of Triton 3.6 cannot count a loop with NumPy 2.4."""

from __future__ import annotations

import functools

import numpy
import torch
import triton
import triton.language as tl

__all__ = ["broken"]


@triton.jit
def _count(out_ptr, n):
    for i in range(0, n):
        tl.store(out_ptr + i, 1.0)


@functools.cache
def broken() -> str:
    """Why kernels cannot be interpreted, with what helps; empty where they can."""
    out = torch.zeros(3)
    try:
        _count[(1,)](out, 3)
    except triton.runtime.errors.InterpreterError as error:
        versions = f"Triton {triton.__version__}'s interpreter fails with NumPy {numpy.__version__}"
        return f"{versions} ({error}); run: pip install 'numpy<2.4'"
    return "" if bool(out.all()) else f"Triton {triton.__version__}'s interpreter gives {out.tolist()}"
