"""Why a run is not planned though its bytes may fit, and what may go otherwise than planned."""

from __future__ import annotations

from collections.abc import Iterator

from .attention import dq_copies, score_bytes
from .budgets import Limits, in_bytes
from .step import Step

__all__ = ["refusals_of", "warnings_of"]

_LONG = 8192  # tokens from which a dense mask or dense scores are refused


def refusals_of(step: Step, limits: Limits) -> Iterator[str]:
    """One sentence each."""
    options, card, shape = step.options, step.card, step.shape
    length = options.row[1]
    if shape.dense_attention and not step.by_tiles and length >= _LONG:
        yield (
            f"eager attention at {length:,} tokens (no fused kernel of PyTorch has a soft cap) keeps"
            f" {in_bytes(score_bytes(step))} of scores a layer (S² a head): take it by key/value heads and"
            " tiles of queries (--kv-groups)"
        )
    if options.cards > 1 and (options.layers_on_host or options.embedding_on_host):
        yield "layers or an embedding on the host are not served for a model in shards: drop one of them"
    if options.cards > 1 and (options.bottleneck is not None or options.prefix):
        yield "bottlenecks and prefixes are not served for a model in shards: plan with LoRA, or --replicas"
    if options.prefix and shape.dense_attention:
        yield "a prefix beside a soft cap on attention's scores is in none of the formulas: plan with LoRA"
    if not options.storable and (options.away(shape.layers) or options.layers_on_host):
        yield (
            "adapters that read the stream behind a layer stand around it, where no store takes its input and"
            " no slot its weights: keep both on the card, or read the MLP's output (seq_bn"
            "[original_ln_before=False])"
        )
    if options.cards > 1 and options.optimizer != "adamw":
        yield f"{options.optimizer} takes no parameters in shards: plan with --optimizer adamw"
    if card.is_gpu and not shape.dense_attention:
        yield from _of_kernel(step)


def _of_kernel(step: Step) -> Iterator[str]:
    """What the attention asked for does not do on this card, or for this model."""
    options, card, shape = step.options, step.card, step.shape
    if options.attention == "math" and options.row[1] >= _LONG:
        nbytes = in_bytes(score_bytes(step))
        yield (
            f"dense attention at {options.row[1]:,} tokens keeps {nbytes} of scores a layer (S² a head):"
            " use FlashAttention (sdpa without a mask: no padding, no 4-D mask)"
        )
    if options.attention == "flash" and not card.flash:
        yield (
            f"{card.name} (sm_{card.arch}) has no FlashAttention: its kernels need sm_80 or newer; plan with"
            " attention efficient (equal numbers of heads) or math"
        )
    if options.attention == "efficient" and shape.kv_heads < shape.heads:
        yield (
            "PyTorch's memory-efficient attention takes no fewer key/value heads than query heads: this model"
            " would run dense attention (S² a head)"
        )
    if options.attention == "flash" and options.dtype_bytes == 4:
        yield "FlashAttention takes 16-bit tensors alone: use bf16 or fp16, or attention efficient"
    if options.attention == "flash" and shape.head_dim > 256:
        yield f"FlashAttention takes heads of at most 256 elements, this model's have {shape.head_dim}"


def warnings_of(step: Step, limits: Limits) -> Iterator[str]:
    """One sentence each."""
    from ..host import in_wsl

    options, card = step.options, step.card
    layers = step.shape.layers
    pins = options.layers_on_host or options.away(layers) > options.on_disk(layers)
    if card.is_gpu and pins and in_wsl():
        yield "WSL pins about 1 GB in all: what should be pinned becomes pageable, and its copies wait"
    fused = card.is_gpu and not step.shape.dense_attention
    if fused and (options.deterministic or _deterministic()):
        splits = dq_copies(step)
        counted = "which is counted" if options.deterministic else "which is not counted here"
        yield f"deterministic attention keeps its fp32 sums of dq {splits} times, {counted}"
    if step.masked and options.rows != "whole":
        kind = "several documents" if options.rows == "packed" else "several lengths"
        yield (
            f"rows of {kind} are given a mask of {in_bytes(step.square)} (S² of {options.row[1]:,} tokens),"
            " with which PyTorch runs no FlashAttention: what it runs in its place is counted as that is"
        )
    elif step.masked:
        yield (
            f"layers with a window of {step.shape.window:,} tokens are given a mask of S² bytes, with which"
            " PyTorch runs no FlashAttention: what it runs in its place is counted as that is"
        )
    if options.rows == "whole" and options.length >= _LONG and card.is_gpu and not step.by_tiles:
        yield (
            "padded batches, and rows of several documents, build a dense mask of S² bytes, which is not"
            " counted here: plan with rows padded or packed (--rows), or give rows of equal length"
        )
    if options.embedding_on_host and step.shape.tied:
        yield "the embedding is the head's weight too and stays on the card: nothing is spared by a host copy"
    if step.by_tiles:
        yield (
            "no fused kernel of PyTorch has a soft cap: attention is its plain products by tiles, slower than"
            " the step time expects (not measured on a GPU)"
        )
    elif step.shape.dense_attention:
        yield "eager attention keeps its scores, S² a head, and masks: take it by tiles (--kv-groups)"
    if options.attention == "cudnn":
        yield "cuDNN does not say what it allocates: its workspace is taken to be FlashAttention's"
    yield from step.shape.notes


def _deterministic() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.are_deterministic_algorithms_enabled()
