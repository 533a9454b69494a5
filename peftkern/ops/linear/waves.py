"""Up to how many rows a product that decodes its weight pays, by the weight's shape: its waves of programs
against a decode of the whole weight and a dense product."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..sizes import ceil_div, next_power_of_2

__all__ = ["RATES", "Rates", "fused_limit", "fused_us", "slab_us"]

ROWS = (16, 32, 64, 128, 192, 256, 384, 512)  # at which the two are compared; above, a slab


@dataclass(frozen=True)
class Rates:
    """What one architecture needs, in microseconds, TB/s and TFLOP/s, kernels alone.

    fused_us, slab_us: whatever the sizes are. few_step_us, step_us: a step of 64 along the contraction, of a
    tile of at most 64 rows by 64 columns, and of one of 128 by 128. copy_tb_s: reading and writing memory.
    gemm_tflop_s: the dense 16-bit product.
    """

    sms: int
    fused_us: float
    few_step_us: float
    step_us: float
    slab_us: float
    copy_tb_s: float
    gemm_tflop_s: float


# Of an H100 (small.csv and decode.csv in benchmarks/results/h100-80gb-hbm3). They meet its times of 4096 x
# 4096 up to M = 512 and of 14336 x 4096 up to 16 within 23 %, the forward's within 16 %. Other architectures
# have not been measured; theirs is the one limit of the table.
RATES = {90: Rates(132, 9.7, 0.33, 0.91, 6.0, 3.0, 780.0)}


def fused_us(m: int, columns: int, contraction: int, rates: Rates) -> float:
    """Of out [m, columns], the weight decoded in the product: programs beyond one an SM take their turn, and
    where there are fewer they share the contraction (`matmul_config.default_config`)."""
    rows, width = (max(16, next_power_of_2(m)), 64) if m <= 64 else (128, 128)
    tiles = ceil_div(m, rows) * ceil_div(columns, width)
    splits = max(1, min(contraction // 1024, 8, rates.sms // tiles))
    steps = ceil_div(contraction, 64 * splits)
    waves = max(1.0, tiles * splits / rates.sms)
    return rates.fused_us + steps * waves * (rates.few_step_us if m <= 64 else rates.step_us)


def slab_us(m: int, columns: int, contraction: int, rates: Rates) -> float:
    """Of a decode to 16 bits, and a product that reads the slab mostly from the L2."""
    elements = columns * contraction
    decode = (0.5 + 1 / 64 + 2) * elements / rates.copy_tb_s
    product = max(elements / rates.copy_tb_s, 2 * m * elements / rates.gemm_tflop_s)
    return rates.slab_us + (decode + product) * 1e-6


@functools.lru_cache(maxsize=1024)
def fused_limit(columns: int, contraction: int, rates: Rates, square: int) -> int:
    """The most rows for which decoding in the product is the faster of the two; `square`: that limit as it
    was measured on 4096 x 4096. Half of that at least, also of weights so small that the launches decide: no
    such shape was measured."""
    limit = 0
    for m in ROWS:
        if fused_us(m, columns, contraction, rates) > slab_us(m, columns, contraction, rates):
            break
        limit = m
    return max(limit, square // 2)
