"""What an attention kernel allocates for its backward pass, by backend, and the dense scores of the one
without."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .step import Step

__all__ = ["attention_workspace", "dq_copies", "score_bytes"]


def score_bytes(step: Step) -> int:
    """What the math backend saves: the softmax of the scores in fp32, S² a head; 0 of the others."""
    options = step.options
    if options.attention != "math" or not step.card.is_gpu:
        return 0
    return 4 * options.batch * step.shape.heads * options.length**2


def dq_copies(step: Step) -> int:
    """How often FlashAttention's backward keeps dq in fp32 where it is to be deterministic: as many times as
    there are multiprocessors for each batch and head.
    """
    return max(-(-(step.card.sms or 128) // (step.options.batch * step.shape.heads)), 1)


def attention_workspace(step: Step) -> int:
    """Bytes that live while dq, dk and dv are made, without these.

    FlashAttention-2 (flash_api.cpp, mha_bwd, which PyTorch's SDPA has a copy of): dq in fp32, softmax's row
    sums, and with fewer key/value heads dk and dv of every query head. The memory-efficient kernel has fp32
    sums of dq, dk and dv. cuDNN's is opaque: FlashAttention's is taken. Rows are rounded up to 128. On a CPU:
    none.
    """
    shape, options = step.shape, step.options
    groups = shape.kv_heads if options.kv_groups else 1
    # A group's gradients, and those of the group before it until they are replaced.
    apart = 2 * (step.q + 2 * step.k) // groups if groups > 1 else 0
    if not step.card.is_gpu:
        return apart
    rows = options.batch * (-(-options.length // 128) * 128)
    width = -(-shape.head_dim // 32) * 32
    if options.attention == "math":
        return 3 * 4 * options.batch * shape.heads * options.length**2
    sums = 4 * rows * shape.heads // groups
    if options.attention == "efficient":
        return sums + 3 * 4 * rows * shape.heads * width
    wide = 4 * rows * shape.heads * width // groups * (dq_copies(step) if options.deterministic else 1)
    expanded = 2 * step.q // groups if shape.kv_heads < shape.heads else 0
    log_sums = step.lse // groups if groups > 1 else 0
    return sums + wide + expanded + apart + log_sums
