"""Derivatives of the ops beyond the first one backwards: by their definitions in plain PyTorch, which torch
differentiates as all else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .flops import observe

__all__ = ["derived", "known_input", "stand_in", "twice_differentiable"]


def twice_differentiable(
    again: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of an autograd.Function. Where the gradients are to be differentiated in their
    turn (`create_graph=True`), `again` gives them, of the same arguments; elsewhere nothing is recorded."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.compiler.is_compiling():
                with torch.no_grad():
                    return backward(ctx, *grads)
            if torch.is_grad_enabled():
                return again(ctx, *grads)
            observe()
            return backward(ctx, *grads)

        return wrapper

    return decorate


def derived(
    plain: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the inputs that are needed, with a graph that leads to the inputs and to `grads`;
    plain(*inputs) gives an output for each of `grads`, None where an output has none."""
    with torch.enable_grad():
        # Views, so that hooks on the inputs do not fire here.
        own = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        pairs = [(y, g) for y, g in zip(plain(*own), grads, strict=True) if g is not None and y.requires_grad]
    if not pairs:
        return [None] * len(own)
    outputs, given = zip(*pairs, strict=True)
    wanted = [t for t, need in zip(own, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def stand_in(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """For an input that was not kept because no gradient depends on its values."""
    return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device, requires_grad=True)


def known_input(name: str, x: Tensor | None, like: Tensor, shape: Sequence[int], depends: bool) -> Tensor:
    """x where it was kept, else a stand-in; depends: whether a gradient that is asked for depends on its
    values."""
    if x is None and depends:
        raise RuntimeError(
            f"{name}: its gradients cannot be differentiated again (create_graph=True), as x was not "
            "kept for that; let lora_a require "
            "grad here, or call peftkern.unpatch on the module"
        )
    return stand_in(like, shape) if x is None else x
