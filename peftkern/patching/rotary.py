"""Rotary embeddings: the function that an attention module's class looks up under a global name, where it is
of the rotate_half convention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import served
from ..ops.rope import reference as rope_reference
from .attention import AttentionForward, against_other_globals, uses, with_around
from .blocks import ON_CPU
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .weights import FLOATS
from .wrappers import innermost

__all__ = ["RopeMode", "Rotary"]

_ROTARY = "apply_rotary_pos_emb"


class RopeMode(NamedTuple):
    """Whether the module's own rotary function also turns a part of each head and copies the rest."""

    partial: bool

    name = _ROTARY

    def replace(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """What the module's forward finds under `name`."""
        return _rotary(stock, self.partial)


class Rotary(Rewrite):
    """Modules whose class's forward calls the global function `apply_rotary_pos_emb`."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's."""
        if not uses(module, _ROTARY) or context.excluded(name):
            return None
        mode = _rope_mode(module)
        if isinstance(mode, str):
            return Finding(module, block_row(name, "attention", "rope", mode))
        row = block_row(name, "attention", "rope")
        return Finding(module, row, AttentionForward, with_around(module, [mode]))


def _rope_mode(module: nn.Module) -> RopeMode | str:
    reason = against_other_globals(module)
    if reason:
        return reason
    forward = innermost(type(module).forward)
    function = forward.__globals__.get(_ROTARY)
    if not callable(function):
        return f"{_ROTARY} is no function of the module that defines {type(module).__name__}"
    try:
        if not _rotates_halves(function, 16):
            return (
                f"{_ROTARY} of {forward.__module__} is not the rotate_half convention: it differs on a probe"
            )
    except Exception as error:  # any signature is possible
        return f"{_ROTARY} of {forward.__module__} failed on a probe: {type(error).__name__}: {error}"
    try:
        return RopeMode(_rotates_halves(function, 8))
    except RuntimeError:  # the usual function takes whole heads only
        return RopeMode(False)


def _rotates_halves(function: Callable[..., Any], rotary: int) -> bool:
    """Whether it gives, in fp32 and bf16, what ours is defined as, for angles whose halves differ."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        options = dict(generator=torch.Generator().manual_seed(0), **ON_CPU)
        q, k = (torch.randn(2, heads, 5, 16, **options).to(dtype) for heads in (3, 1))
        cos, sin = (torch.randn(2, 5, rotary, **options).to(dtype) for _ in range(2))
        with torch.no_grad():
            theirs, ours = function(q, k, cos, sin), (torch.empty_like(q), torch.empty_like(k))
            rope_reference.rope(q, k, cos, sin, False, *ours)
        if not isinstance(theirs, tuple) or len(theirs) != 2:
            return False
        for their, our in zip(theirs, ours, strict=True):
            if (their.shape, their.dtype) != (our.shape, our.dtype) or not torch.allclose(
                their, our, rtol=tolerance, atol=tolerance
            ):
                return False
    return True


def _rotary(
    stock: Callable[..., tuple[Tensor, Tensor]], partial: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Ours in `stock`'s place; calls that it does not serve go to `stock`."""

    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain = len(args) == 4 and (
            not kwargs or (kwargs.keys() == {"unsqueeze_dim"} and kwargs["unsqueeze_dim"] == 1)
        )
        if not plain or not all(isinstance(value, Tensor) for value in args) or not _turns(*args, partial):
            return stock(*args, **kwargs)  # whatever its parameters are called
        return functional.rope(*args)

    return apply_rotary_pos_emb


def _turns(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, partial: bool) -> bool:
    if (
        not served(q)
        or q.dtype not in FLOATS
        or not q.dtype == k.dtype == cos.dtype == sin.dtype
        or not q.device == k.device == cos.device == sin.device
    ):
        return False
    if (
        q.dim() != 4
        or k.dim() != 4
        or cos.dim() != 3
        or cos.shape != sin.shape
        or cos.requires_grad
        or sin.requires_grad
    ):
        return False
    (b, _, s, d), rotary = q.shape, cos.shape[2]
    if (k.shape[0], k.shape[2], k.shape[3]) != (b, s, d) or cos.shape[0] not in (1, b) or cos.shape[1] != s:
        return False
    return rotary % 2 == 0 and (rotary == d or (partial and rotary < d))
