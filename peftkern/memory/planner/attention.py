"""What an attention kernel allocates beside its results, by backend; the dense scores of one without a fused
kernel, and what attention by tiles has in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tiles import fitted_tiling

if TYPE_CHECKING:
    from .step import Step

__all__ = [
    "attention_workspace",
    "dq_copies",
    "forward_workspace",
    "mask_bytes",
    "mask_workspace",
    "score_bytes",
]


def score_bytes(step: Step) -> int:
    """What is saved S² a head: by the math backend the softmax in fp32, by the eager function of a model with
    a soft cap tanh, softmax and weights. The latter, and SDPA under a mask, save keys and values of every
    query head with it; SDPA also the mask in the dtype of activations, which it makes of truth values."""
    options = step.options
    if step.shape.dense_attention:
        if step.by_tiles:
            return 0
        repeated = 2 * step.q if step.shape.kv_heads < step.shape.heads else 0
        return 8 * _scores(step) + repeated
    if options.prefix:  # the mask is saved as it is, keys and values are not repeated
        return 0
    repeated = _repeated(step) + _added_mask(step) if step.masked else 0
    if options.attention != "math" or not step.card.is_gpu:
        return repeated
    return 4 * _scores(step) + repeated


def _repeated(step: Step) -> int:
    """Keys and values of every query head, beside those that there are: transformers repeats them for SDPA
    with a mask."""
    return int(2 * (step.q - step.k) * _share(step))


def _added_mask(step: Step) -> int:
    """What torch's SDPA adds to the scores under a mask of truth values: [batch, 1, S, S], made by every call
    whatever the backend."""
    return 0 if step.own_attention else int(step.e * step.square * _share(step))


def _share(step: Step) -> float:
    """What has a mask of one layer, in the mean: with whole rows those with a window; of layers computed
    again one at a time, of the one that has it."""
    return 1.0 if step.options.checkpointing or step.options.rows != "whole" else step.shape.windowed


def mask_bytes(step: Step) -> int:
    """The masks that transformers builds, [batch, 1, S, S]: for eager attention one a kind of layer, in the
    dtype of activations; for SDPA, of truth values, that of a window no longer than the sequence, and with
    rows that are not whole one a kind of layer."""
    shape = step.shape
    if shape.dense_attention:
        return 0 if step.by_tiles else shape.mask_kinds * step.e * step.square
    kinds = shape.mask_kinds if step.options.rows != "whole" else 1
    return kinds * step.square if step.masked else 0


def mask_workspace(step: Step) -> int:
    """Bytes that live while a mask for SDPA is built: the two of truth values that it is the conjunction
    of."""
    return 2 * step.square if step.masked else 0


def forward_workspace(step: Step, *, saved: bool) -> int:
    """Bytes that live while attention's output is made, without it and `score_bytes`; saved: for backward."""
    if step.options.prefix:
        return step.ops.prefix_forward(step.m, *_of_prefix(step))
    if not step.shape.dense_attention:  # keys and values, while there are those of every query head too
        return 2 * step.k if step.masked and step.shape.kv_heads < step.shape.heads else 0
    if not step.by_tiles:  # the scores, these and their softmax in fp32, and tanh where it is saved
        most = (step.e + 4 + 4 if step.e < 4 else 4 + 4) + (step.e if saved else 0)
        return (most - 8) * _scores(step)
    return max(_tile_forward(step, window) for window in _windows(step))


def _of_prefix(step: Step) -> tuple[int, int, int, int]:
    """Heads, their width, tokens of the prefix, elements of the mask."""
    mask = step.square if step.masked else 0
    return step.shape.heads, step.shape.head_dim, step.options.prefix, mask


def _scores(step: Step) -> int:
    return step.shape.heads * step.square


def _windows(step: Step) -> tuple[int | None, ...]:
    """Keys that a query of each kind of layer reads at the most, None for all; of packed rows no more than a
    sequence, for a document goes not beyond."""
    whole = step.options.length if step.options.rows == "packed" else None
    return (whole,) if step.shape.window is None else (whole, min(step.shape.window, whole or 1 << 62))


def _tile(step: Step, window: int | None) -> tuple[int, int, int, int]:
    """What attention by tiles has at a time: rows of all its query heads, scores, its mask's bytes, its
    key/value heads."""
    shape, options = step.shape, step.options
    sharing, (batch, length) = shape.heads // shape.kv_heads, options.row
    keys = (lambda rows: length) if window is None else (lambda rows: min(length, rows + window - 1))
    tiling, most = fitted_tiling(keys, batch, shape.kv_heads, sharing, length)
    units = tiling.samples * tiling.heads
    rows = units * sharing * tiling.rows
    return rows, rows * most, step.e * batch * tiling.rows * most, units


def _tile_forward(step: Step, window: int | None) -> int:
    """Scores in fp32 and, narrower, for their product with v; the mask; the output and its rows' numbers."""
    rows, scores, mask, _ = _tile(step, window)
    a_score = 4 + (step.e if step.e < 4 else 0)
    return a_score * scores + mask + rows * (step.e * step.shape.head_dim + 8)


def _tile_backward(step: Step, window: int | None) -> int:
    """tanh and p in fp32, dp in the operands' dtype and in fp32; the mask; copies of the tile's q and dout,
    of its rows' numbers; its dv; and the fp32 sums of dk and dv of the heads at work."""
    rows, scores, mask, units = _tile(step, window)
    a_score, width, length = 12 + (step.e if step.e < 4 else 0), step.shape.head_dim, step.options.row[1]
    part = scores // rows * units * width * step.e
    return a_score * scores + mask + rows * (2 * step.e * width + 8) + part + 2 * 4 * units * length * width


def _dense_workspace(step: Step) -> int:
    """The gradients of the weights and of the softmax, in fp32, when the weights and the repeated values are
    gone, and before dq, dk and dv are there."""
    later = step.q + 2 * step.k + (step.q if step.shape.kv_heads < step.shape.heads else 0)
    return max((8 - (step.e if step.e < 4 else 0)) * _scores(step) - later, 0)


def dq_copies(step: Step) -> int:
    """How often FlashAttention's backward keeps dq in fp32 where it is to be deterministic: as many times as
    there are multiprocessors for each batch and head.
    """
    return max(-(-(step.card.sms or 128) // (step.options.row[0] * step.shape.heads)), 1)


def attention_workspace(step: Step) -> int:
    """Bytes that live while dq, dk and dv are made, without these; those of a prefix around the kernel
    too."""
    if not step.options.prefix:
        return _kernel_workspace(step)
    return step.ops.prefix_backward(step.m, *_of_prefix(step), _kernel_workspace(step))


def _kernel_workspace(step: Step) -> int:
    """Of the attention kernel itself.

    FlashAttention-2 (flash_api.cpp, mha_bwd, which PyTorch's SDPA has a copy of): dq in fp32, softmax's row
    sums, and with fewer key/value heads dk and dv of every query head. The memory-efficient kernel has fp32
    sums of dq, dk and dv. cuDNN's is opaque: FlashAttention's is taken. Rows are rounded up to 128. On a CPU:
    none.
    """
    shape, options = step.shape, step.options
    if shape.dense_attention:
        if not step.by_tiles:
            return _dense_workspace(step)
        return max(_tile_backward(step, window) for window in _windows(step))
    groups = shape.kv_heads if options.kv_groups else 1
    # A group's gradients, and those of the group before it until they are replaced.
    apart = 2 * (step.q + 2 * step.k) // groups if groups > 1 else 0
    if options.prefix:  # which takes the kernel whole, and keys as they are
        groups = 1
        apart = 0
    elif step.masked:  # such a call runs whole; the gradients of repeated keys and values
        groups, apart = 1, 2 * (step.q - step.k)
    if not step.card.is_gpu:  # our own kernel in bf16 tiles keeps nothing, and takes no groups
        return apart if step.masked or not step.own_attention else 0
    batch, length = options.row
    rows = batch * (-(-length // 128) * 128)
    width = -(-shape.head_dim // 32) * 32
    if options.attention == "math":
        return 3 * 4 * _scores(step)
    sums = 4 * rows * shape.heads // groups
    if options.attention == "efficient":
        return sums + 3 * 4 * rows * shape.heads * width
    wide = 4 * rows * shape.heads * width // groups * (dq_copies(step) if options.deterministic else 1)
    expanded = 2 * step.q // groups if shape.kv_heads < shape.heads else 0
    log_sums = step.lse // groups if groups > 1 else 0
    return sums + wide + expanded + apart + log_sums
