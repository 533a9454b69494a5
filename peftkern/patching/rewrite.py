"""What `patch` asks of every module, and what it is told: a rewrite looks at a module and answers with a
finding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .forwards import Forward, install
from .report import Row

__all__ = ["Context", "Finding", "Rewrite", "excluded", "patterns_of"]


@dataclass(frozen=True)
class Finding:
    """What a rewrite would do with one module, or why not.

    row      the report's: what the module runs, or the reason why it keeps its stock forward; None where
             another row tells it
    forward  the class of the forward to put on the module; None to leave it as it is
    made_of  what that forward is made of
    reads    what a recognized forward depends on (`reads.Reads`)
    """

    module: nn.Module
    row: Row | None
    forward: type[Forward] | None = None
    made_of: Any = None
    reads: Any = field(default=None, compare=False)


class Context:
    """The model, what its owner wants left alone, and what has been found so far. shared: what a rewrite has
    learned of the whole model."""

    def __init__(self, model: nn.Module, exclude: tuple[str, ...] = (), dense: bool | None = None) -> None:
        self.model, self.exclude, self.dense = model, exclude, dense
        self.findings: list[tuple[Rewrite, Finding]] = []
        self._by_module: dict[int, list[Finding]] = {}
        self.shared: dict[type[Rewrite], Any] = {}

    def add(self, rewrite: Rewrite, finding: Finding) -> None:
        self.findings.append((rewrite, finding))
        self._by_module.setdefault(id(finding.module), []).append(finding)

    def of(self, module: nn.Module | None) -> list[Finding]:
        """What has been found of a module."""
        return self._by_module.get(id(module), [])

    def forward_of(self, module: nn.Module | None, kind: type[Forward]) -> Finding | None:
        """The finding by which a module gets a forward of this kind; None where it gets none."""
        return next((f for f in self.of(module) if f.forward and issubclass(f.forward, kind)), None)

    def excluded(self, name: str) -> str | None:
        """Which of the owner's patterns leaves a module as it is."""
        return excluded(name, self.exclude)


class Rewrite:
    """One kind of module that runs otherwise when it is patched."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """What this rewrite would run in the module's place, or why not; None: it is none of its modules.
        Nothing is installed meanwhile: of children, `context` tells what they will run."""
        raise NotImplementedError

    def install(self, finding: Finding) -> Forward | None:
        """Put the finding's forward on its module, from which `forwards.remove` takes it off again."""
        if finding.forward is None:
            return None
        forward = install(finding.module, finding.forward, finding.made_of)
        if finding.reads is not None:
            forward.reads = finding.reads
        return forward


def excluded(name: str, exclude: tuple[str, ...]) -> str | None:
    """Which of the caller's patterns leaves a module as it is."""
    return next((f"excluded by {pattern!r}" for pattern in exclude if f".{pattern}." in f".{name}."), None)


def patterns_of(model: nn.Module, exclude: Iterable[str]) -> tuple[str, ...]:
    """The caller's patterns for `excluded`; ValueError where one names nothing."""
    if isinstance(exclude, str):
        raise ValueError(
            f"exclude: got the string {exclude!r}, expected a list of names; write exclude=[{exclude!r}]"
        )
    patterns = tuple(exclude)
    names = [f".{name}." for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(f".{pattern}." in name for name in names):
            raise ValueError(
                f"exclude: {pattern!r} names no module; give a name of model.named_modules(), or whole "
                "dotted parts of one"
            )
    return patterns
