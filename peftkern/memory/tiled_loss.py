"""How many logits a patched model's fused loss has at a time."""

from __future__ import annotations

from torch import nn

from ..patching.forwards import find
from ..patching.loss import LOGITS_BYTES, LossForward
from .tiles import loss_tile, loss_tile_bytes

__all__ = ["tile_loss"]


def tile_loss(model: nn.Module, *, budget: int | None) -> int | None:
    """Let the loss of a model patched with `fused_loss=True` have at most so many bytes of logits at a time.

    They are computed for a tile of tokens, become their own gradient in place and are overwritten by the next
    tile's. The choice stays on the model through `patch` and `unpatch`.

    Args:
        budget: bytes, e.g. those of `tile_mlps`; None: the op's own choice (128 MiB on a GPU, 48 MiB on a
        CPU).
    Returns: the tokens of a tile, None without a budget.
    Raises: ValueError where the model holds no fused loss, or the budget does not hold 64 tokens' logits.
    """
    found = [module for module in model.modules() if _fused(module)]
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} holds no fused loss; call peftkern.patch(model, "
            "fused_loss=True) first"
        )
    if budget is None:
        for module in found:
            module.__dict__.pop(LOGITS_BYTES, None)
        return None
    tiles = []
    for module in found:
        head = module.get_output_embeddings()
        words, weight = head.out_features, next(head.parameters())
        itemsize = 4 if weight.is_cpu or not weight.is_floating_point() else weight.itemsize
        tiles.append(loss_tile(budget, words, itemsize=itemsize))
        module.__dict__[LOGITS_BYTES] = loss_tile_bytes(tiles[-1], words, itemsize=itemsize)
    return min(tiles)


def _fused(module: nn.Module) -> bool:
    held = find(module)
    return held is not None and isinstance(held[1], LossForward)
