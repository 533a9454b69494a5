"""Norm outputs of decoder layers, computed again in backward in place of being saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..patching.forwards import find
from ..patching.layers import LayerForward, layer_mode
from ..patching.rebuilt import REBUILT

__all__ = ["NormReport", "keep_norms", "rebuild_norms"]


@dataclass(frozen=True)
class NormReport:
    """What `rebuild_norms` did: names of the layers that do it, and of those that cannot, each with the
    reason."""

    layers: tuple[str, ...]
    refused: dict[str, str]

    def __str__(self) -> str:
        count = len(self.layers) + len(self.refused)
        text = (
            f"peftkern: {len(self.layers)} of {count} layers compute their norms' outputs again in backward"
        )
        reasons = Counter(self.refused.values())
        return text + "".join(f"; {n} keep them: {reason}" for reason, n in reasons.items())


def rebuild_norms(model: nn.Module) -> NormReport:
    """Let decoder layers save no norm's output: backward computes it again from the residual stream, bit for
    bit.

    Attention's and the MLP's linears keep their input for the gradients of their adapters. That input is a
    norm's output, and what is normalized, the residual stream, is kept by the norm: 2 of the 14 parts of the
    hidden states' size that a layer of Llama-3.1-8B's shape saves, 16 KB a token. A norm's forward more is
    computed in backward for each. Gradient checkpointing, which saves none of this, has the same less at its
    peak.

    Args:
        model: one that `patch` has served, with layers h + attention(norm(h)), then h + mlp(norm(h)), whose
            residual additions run inside the norms. The choice stays on the layers through `patch` and
            `unpatch`, and acts while they are patched.
    Returns: NormReport.
    Raises: ValueError where no layer can do it.
    """
    layers, refused = [], {}
    for name, module in model.named_modules():
        held = find(module)
        if held is not None and isinstance(held[1], LayerForward):
            module.__dict__[REBUILT] = True
            layers.append(name)
        elif _listed(module) and isinstance(reason := layer_mode(module), str):
            refused[name] = reason
    if not layers:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(refused.values()).items())
        raise ValueError(
            f"model: no layer of {type(model).__name__} has its additions inside the norms"
            f"{': ' if reasons else '; call peftkern.patch first'}{reasons}"
        )
    return NormReport(tuple(layers), refused)


def keep_norms(model: nn.Module) -> int:
    """Undo `rebuild_norms`; returns how many layers did it."""
    return sum(module.__dict__.pop(REBUILT, False) for module in model.modules())


def _listed(module: nn.Module) -> bool:
    """Whether it looks like a decoder layer: blocks of modules, and a norm."""
    children = list(module.children())
    norms = [child for child in children if type(child).__name__.lower().endswith("norm")]
    return bool(norms) and sum(bool(child._modules) for child in children) == 2
