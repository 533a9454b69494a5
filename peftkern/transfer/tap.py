"""Hooks that pool the hidden states of a stack of layers as they pass."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .pooling import pool_last, pool_mean

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Tap", "count_calls"]

_PROBE_TOKENS = 8  # of the first text, to count how often the layers are called


class _Stop(Exception):
    """Ends a forward pass whose rest nobody reads."""


def count_calls(model: nn.Module, tap: Tap, batch: Mapping[str, Tensor]) -> int:
    """How many times a forward pass calls the layers (more than there are where a model shares them), from a
    few tokens of one row.
    """
    few = {
        name: (
            value[:1, :_PROBE_TOKENS]
            if name
            in (
                "input_ids",
                "attention_mask",
            )
            else value[:1]
        )
        for name, value in batch.items()
    }
    tap.run(model, few)
    if not tap.calls:
        raise ValueError(
            "layers: none of them was called in a forward pass; name the ones that are, layers=[...]"
        )
    return tap.calls


class Tap:
    """Hooks on the layers that pool what passes; a context manager which removes them at its end."""

    def __init__(
        self,
        layers: list[nn.Module],
        pools: tuple[str, ...],
        skip_first: bool,
        project: int | None,
    ) -> None:
        self.layers, self.pools, self.skip_first, self.project = layers, pools, skip_first, project
        self.kept: tuple[int, ...] = ()
        self.calls = 0  # of layers in the current forward pass
        self._last: int | None = None  # the call after which nothing is read
        self._mask: Tensor | None = None
        self._rows: list[Tensor] = []
        self._projection: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Tap:
        distinct = list(dict.fromkeys(self.layers))
        self._handles = [layer.register_forward_hook(self._after) for layer in distinct]
        self._handles.append(distinct[0].register_forward_pre_hook(self._before, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def choose(self, depths: Sequence[int] | None, count: int) -> None:
        """Keep these depths of 0 ... count."""
        kept = (
            tuple(range(count + 1))
            if depths is None
            else tuple(
                sorted({d + count + 1 if d < 0 else d for d in depths}),
            )
        )
        if not kept or not 0 <= kept[0] <= kept[-1] <= count:
            raise ValueError(f"depths: got {depths}, expected some of 0 ... {count}")
        self.kept, self._last = kept, kept[-1]

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> np.ndarray:
        """[pools, depths, B, D] in fp32 of one batch."""
        device = next(model.parameters()).device
        placed = {
            name: (
                value.to(device)
                if isinstance(
                    value,
                    Tensor,
                )
                else value
            )
            for name, value in batch.items()
        }
        self.calls, self._rows, self._mask = 0, [], placed.get("attention_mask")
        options = {"use_cache": False} if _takes_use_cache(model) else {}
        with contextlib.suppress(_Stop):
            model(**placed, **options)
        rows, self._rows = self._rows, []
        widths = sorted({row.shape[-1] for row in rows})
        if len(widths) > 1:
            raise ValueError(
                f"layers: they give features of {widths} dimensions, expected one; choose depths or layers of"
                " one width"
            )
        return torch.stack(rows, dim=1).float().cpu().numpy() if rows else None

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls == 0:
            self._record(
                0,
                (
                    args[0]
                    if args
                    else next(
                        v
                        for v in kwargs.values()
                        if isinstance(
                            v,
                            Tensor,
                        )
                        and v.is_floating_point()
                    )
                ),
            )

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.calls += 1
        self._record(self.calls, output if isinstance(output, Tensor) else output[0])

    def _record(self, depth: int, hidden: Tensor) -> None:
        if depth in self.kept:
            self._rows.append(
                self._projected(torch.stack([self._pooled(hidden, pool) for pool in self.pools])),
            )
        if depth == self._last:
            raise _Stop

    def _pooled(self, hidden: Tensor, pool: str) -> Tensor:
        if hidden.dim() == 2:
            return hidden.float()
        if hidden.dim() != 3:
            raise ValueError(
                f"layers: one gives a tensor of shape {tuple(hidden.shape)}, expected [B, S, D] or [B, D]"
            )
        mask = None if self._mask is None else self._mask.to(hidden.device)
        return (
            pool_mean(
                hidden,
                mask,
                skip_first=self.skip_first,
            )
            if pool == "mean"
            else pool_last(hidden, mask)
        )

    def _projected(self, rows: Tensor) -> Tensor:
        if self.project is None or self.project >= rows.shape[-1]:
            return rows.to(next(iter(self._rows)).device) if self._rows else rows
        if self._projection is None:
            draw = torch.randn(rows.shape[-1], self.project, generator=torch.Generator().manual_seed(0))
            self._projection = draw / self.project**0.5
        self._projection = self._projection.to(rows.device)
        return rows.to(self._projection.device).float() @ self._projection


def _takes_use_cache(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "use_cache", None) is None:
        return False
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
