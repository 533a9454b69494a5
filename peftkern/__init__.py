"""peftkern: fused LoRA and 4-bit (NF4) kernels for memory-efficient fine-tuning with PyTorch."""

from . import functional
from .formats.nf4 import NF4Weight
from .functional.explain import explain
from .ops import flops as _flops
from .patching import PatchReport, mixed_adapters, patch, unpatch
from .runtime import backends
from .runtime.backends import use_backend

__version__ = "0.1.0"
_flops.register()
__all__ = [
    "NF4Weight",
    "PatchReport",
    "__version__",
    "backends",
    "explain",
    "functional",
    "mixed_adapters",
    "patch",
    "unpatch",
    "use_backend",
]
