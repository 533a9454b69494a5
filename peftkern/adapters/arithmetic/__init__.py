"""Task arithmetic: adapters and full checkpoints added, scaled, negated, interpolated and merged; which
lambda, by a sweep."""

from .checkpoints import combine_checkpoints
from .combine import Combined, combine, interpolate, negate, scale
from .expression import ExpressionError, parse
from .lora import LoraModule, LoraWeights
from .lora_files import read_adapter, write_adapter
from .low_rank import Recompressed, core_space, recompress
from .models import add_to_model, of_model
from .rules import METHODS, Method

__all__ = [
    "METHODS",
    "Combined",
    "ExpressionError",
    "LoraModule",
    "LoraWeights",
    "Method",
    "Recompressed",
    "add_to_model",
    "combine",
    "combine_checkpoints",
    "core_space",
    "interpolate",
    "negate",
    "of_model",
    "parse",
    "read_adapter",
    "recompress",
    "scale",
    "write_adapter",
]
