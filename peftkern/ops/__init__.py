"""The ops: one folder each, `reference.py` being the definition and the other files its backends."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

__all__ = ["LIBRARY", "backend"]

LIBRARY = torch.library.Library("peftkern", "DEF")
# On a GPU the linear is a plan over Triton, CUDA and cuBLAS launches: one file composes them.
_FILES = {("qlora_linear", "triton"): "gpu", ("qlora_linear", "cuda"): "gpu", ("lora_add", "cuda"): "triton"}


@functools.cache
def backend(op: str, name: str) -> ModuleType:
    """The module with an op's launchers for a backend; imported at its first use, as Triton is not there on every machine."""
    return importlib.import_module(f"{__name__}.{op}.{_FILES.get((op, name), name)}")
