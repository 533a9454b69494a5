"""Adapters folded into a weight, dense or 4-bit, slab by slab of rows: `adapters.merge` does it to models."""

from .branches import Branch, fold, folded_bias
from .dense import merge_dense
from .feedback import feedback_4bit
from .measures import Measures, measure
from .quantize import requantize_4bit, stochastic_4bit
from .residual import rounding_residual
from .slabs import row_slabs

__all__ = [
    "Branch",
    "Measures",
    "feedback_4bit",
    "fold",
    "folded_bias",
    "measure",
    "merge_dense",
    "requantize_4bit",
    "rounding_residual",
    "row_slabs",
    "stochastic_4bit",
]
