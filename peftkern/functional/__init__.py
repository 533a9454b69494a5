"""Public functions: they validate, flatten and dispatch; the ops below them trust what they get."""

from .attention import prefix_attention, prefix_gated, scaled_dot_product_attention
from .dora import dora_group, dora_linear, dora_norm, row_squares
from .glu import glu
from .group import Adapter, Member, qlora_group
from .linear import linear_4bit, lora_add, qlora_linear
from .loss import linear_cross_entropy
from .mlp import gated_mlp, gated_mlp_packed
from .norm import add_rms_norm, rms_norm
from .quantize import dequantize_4bit, quantize_4bit
from .rope import rope

__all__ = [
    "Adapter",
    "Member",
    "add_rms_norm",
    "dequantize_4bit",
    "dora_group",
    "dora_linear",
    "dora_norm",
    "gated_mlp",
    "gated_mlp_packed",
    "glu",
    "linear_4bit",
    "linear_cross_entropy",
    "lora_add",
    "prefix_attention",
    "prefix_gated",
    "qlora_group",
    "qlora_linear",
    "quantize_4bit",
    "rms_norm",
    "row_squares",
    "rope",
    "scaled_dot_product_attention",
]
