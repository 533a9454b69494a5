"""Integer arithmetic of launches. Triton's own functions are wrapped for use inside kernels, which costs
microseconds a call."""

from __future__ import annotations

__all__ = ["ceil_div", "next_power_of_2", "weight_bytes"]


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up; b is positive."""
    return -(-a // b)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, which is positive."""
    return 1 << (value - 1).bit_length()


def weight_bytes(count: int, absmax: object, blocksize: int, nested_blocksize: int) -> int:
    """What `count` weights are decoded from: their codes, and the absmax of their blocks, nested where None
    is given."""
    blocks = -(-count // blocksize)
    return count // 2 + (4 * blocks if absmax is not None else blocks + 4 * -(-blocks // nested_blocksize))
