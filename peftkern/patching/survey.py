"""One look at a model before anything is put on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .rewrite import Context, Finding, Rewrite

__all__ = ["survey"]


def survey(model: nn.Module, rewrites: Sequence[Rewrite], **options: Any) -> list[tuple[Rewrite, Finding]]:
    """Ask each rewrite, in this order, about every module of the model; options as of `Context`.

    A later rewrite sees what earlier ones have found: an MLP whether its linears will be ours, a decoder
    layer whether its norms will.
    """
    context, modules = Context(model, **options), list(model.named_modules())
    for rewrite in rewrites:
        for name, module in modules:
            finding = rewrite.survey(name, module, context)
            if finding is not None:
                context.add(rewrite, finding)
    return context.findings
