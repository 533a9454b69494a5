"""AdamW for a model on one card or in shards: 8-bit and paged where that works, torch's own elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import nn

__all__ = ["adamw"]

_KINDS = {"paged_adamw_8bit": "PagedAdamW8bit", "adamw_8bit": "AdamW8bit"}


def adamw(
    model: nn.Module, *, lr: float, kind: str = "paged_adamw_8bit", **options: Any
) -> torch.optim.Optimizer:
    """bitsandbytes' 8-bit AdamW over what is trained, or torch's where that cannot be, with the reason
    printed.

    Its kernels take a tensor's address: of a parameter in shards (`shard`) they would see no numbers, and
    paged states are memory that only CUDA moves.

    Args:
        lr: the learning rate.
        kind: paged_adamw_8bit, adamw_8bit or adamw (torch's).
        options: of either optimizer (betas, eps, weight_decay).
    Raises: ValueError for another kind, or where nothing is trained.

    >>> layer = torch.nn.Linear(2, 2)
    >>> type(adamw(layer, lr=1e-3, kind="adamw")).__name__
    'AdamW'
    """
    if kind not in (*_KINDS, "adamw"):
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join((*_KINDS, 'adamw'))}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"model: no parameter of {type(model).__name__} requires grad; add an adapter first")
    on_gpu = all(parameter.device.type == "cuda" for parameter in trained)
    reason = _against(trained, on_gpu) if kind in _KINDS else None
    if kind in _KINDS and reason is None:
        import bitsandbytes

        return getattr(bitsandbytes.optim, _KINDS[kind])(trained, lr=lr, **options)
    form = "fused" if on_gpu else "foreach"
    if reason is not None:
        print(f"Optimizer: torch's AdamW ({form}) in place of {kind}: {reason}.", file=sys.stderr)
    return torch.optim.AdamW(trained, lr=lr, **{"weight_decay": 0.01, form: True} | options)


def _against(trained: list[nn.Parameter], on_gpu: bool) -> str | None:
    """Why bitsandbytes' optimizer cannot train these parameters; None where it can."""
    if any(hasattr(parameter, "to_local") for parameter in trained):
        return "the parameters are in shards (DTensor), which bitsandbytes' kernels do not take"
    if not on_gpu:
        return "the parameters are not on a CUDA device"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None
