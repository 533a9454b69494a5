"""Dequantization on a GPU: by Triton's kernel, also where the CUDA C++ one is built.

Measured on an H100 (benchmarks/results/h100-80gb-hbm3): 16-bit results of 4096 x 4096 in 17.5 us against 28.9
us of the CUDA C++ kernel, whose stores fill no more than a 32-byte sector at a time. That kernel stays for
callers of the C functions, who have no Triton.
"""

from __future__ import annotations

from .triton import dequantize_4bit, dequantize_4bit_out, dequantize_slice

__all__ = ["dequantize_4bit", "dequantize_4bit_out", "dequantize_slice"]
