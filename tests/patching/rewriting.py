"""One rewrite at a time: what it finds in a model, and the model with that installed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftkern.patching.rewrite import Finding, Rewrite
from peftkern.patching.survey import survey


def surveyed(model: nn.Module, *rewrites: Rewrite, exclude: Sequence[str] = ()) -> list[Finding]:
    return [finding for _, finding in survey(model, rewrites, exclude=tuple(exclude))]


def installed(model: nn.Module, *rewrites: Rewrite, exclude: Sequence[str] = ()) -> int:
    """How many forwards were put on modules."""
    findings = survey(model, rewrites, exclude=tuple(exclude))
    return len({id(forward) for rewrite, item in findings if (forward := rewrite.install(item)) is not None})
