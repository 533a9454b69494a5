"""The MLPs of a model over the sequence in tiles, per instance and reversibly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import transformed
from ..patching import mixed
from ..patching.rewrite import excluded, patterns_of
from .mlp_shapes import MLPShape, holds_experts, mlp_shape
from .row_blocks import RowBlocks
from .tiles import mlp_tile, mlp_tile_bytes

__all__ = ["TileReport", "TileRow", "TiledMLP", "tile_mlps", "untile_mlps"]


@dataclass(frozen=True)
class TileRow:
    """One MLP that was looked at.

    name          as in `model.named_modules()`
    hidden        width of its input, 0 where unknown
    intermediate  its inner width, 0 where unknown
    tile          the most rows at a time; None where it stays as it was
    bytes         what a tile takes in backward (`tiles.mlp_tile_bytes`), 0 where it stays as it was
    reason        why it stays as it was; None where it is tiled
    """

    name: str
    hidden: int
    intermediate: int
    tile: int | None
    bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class TileReport:
    """Rows in the model's order; `str(report)` is one line."""

    rows: tuple[TileRow, ...]

    @property
    def tiled(self) -> tuple[TileRow, ...]:
        """The MLPs that run in tiles."""
        return tuple(row for row in self.rows if row.reason is None)

    @property
    def refused(self) -> tuple[TileRow, ...]:
        """The MLPs that stay as they were, each with its reason."""
        return tuple(row for row in self.rows if row.reason is not None)

    def __str__(self) -> str:
        tiles = Counter((row.tile, row.bytes) for row in self.tiled)
        parts = ", ".join(
            f"{n} of {tile} rows, {size / 1e6:.1f} MB a tile" for (tile, size), n in tiles.items()
        )
        text = f"peftkern: {len(self.tiled)} of {len(self.rows)} MLPs in tiles ({parts})"
        reasons = Counter(row.reason for row in self.refused)
        return text + "".join(f"; {count} whole: {reason}" for reason, count in reasons.items())


class TiledMLP:
    """A module's forward, a tile of rows at a time. inner: what the instance had as its forward, None where
    it had its class's."""

    __slots__ = ("module", "inner", "blocks")

    def __init__(self, module: nn.Module, inner: Any, tile: int) -> None:
        self.module, self.inner = module, inner
        self.blocks = RowBlocks(module, self.whole, tile)

    def __reduce__(self) -> tuple[Any, ...]:
        return TiledMLP, (self.module, self.inner, self.blocks.tile)

    def __deepcopy__(self, memo: dict[int, Any]) -> TiledMLP:
        import copy

        return TiledMLP(copy.deepcopy(self.module, memo), copy.deepcopy(self.inner, memo), self.blocks.tile)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the instance had."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel() or not x.is_floating_point():
            return self.whole(*args, **kwargs)
        if torch.compiler.is_compiling() or transformed() or _by_sample(self.module):
            return self.whole(x)
        return self.blocks(x)


def _by_sample(module: nn.Module) -> bool:
    """Whether the samples of a batch run through adapters of their own: a tile does not know its rows'
    samples."""
    for child in module.modules():
        if mixed.current(child) is not None:
            return True
        for hook in child._forward_pre_hooks.values():
            if "adapter_names" in getattr(hook, "keywords", ()):
                return True
    return False


def tile_mlps(
    model: nn.Module, *, tile: int | None = None, budget: int | None = None, exclude: Iterable[str] = ()
) -> TileReport:
    """Let the MLPs of a model run a tile of the sequence at a time, forward and backward.

    Of an MLP autograd then keeps the input alone, and its backward pass takes the temporaries of one tile in
    place of the sequence's: rows * (h + 6i) bytes in place of tokens * 6i. It computes each tile again, as
    gradient checkpointing computes the whole MLP again; inside a layer under torch's non-reentrant
    checkpointing nothing is computed a third time, where nothing behind the MLP saves a tensor (a residual
    addition does not; a norm of the MLP's output does). The gradients of trained parameters are summed over
    the tiles in fp32 and handed to autograd once.

    Replaces `forward` on module instances, nothing else. It goes around the forward that is there: call
    `patch` before it. torch.compile, torch.func and batches whose samples have adapters of their own run the
    MLP whole. Forward hooks on modules inside an MLP fire once a tile. Dropout draws other masks than without
    tiles.

    Args:
        model: a model whose MLPs are modules with two or three linears (nn.Linear, bitsandbytes' Linear4bit,
            PEFT's layers on them) that map rows to rows, which a small probe finds out.
        tile: the most rows (tokens of all samples) at a time, 1 or more; multiples of 64 fit the kernels.
        budget: in place of `tile`: bytes that a tile may take in backward, see `tiles.mlp_tile`.
        exclude: module names, or whole dotted parts of them, to leave as they are.
    Returns: TileReport, naming every MLP looked at, its tile, and why others stay whole.
    Raises: ValueError where not exactly one of `tile` and `budget` is given, the budget does not hold the
    smallest
        tile of an MLP, or no MLP could be tiled. The model is then as it was.
    Source: Arctic Long Sequence Training (2025), section 3, for the tiles; the sums in fp32 and the output's
    place
        in the graph are this library's.

    >>> from torch import nn
    >>> class MLP(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
    ...     def forward(self, x):
    ...         return self.down(self.up(x).relu())
    >>> tile_mlps(MLP(), tile=64).rows[0].tile
    64
    """
    if (tile is None) == (budget is None):
        raise ValueError(f"tile, budget: got tile={tile} and budget={budget}, expected exactly one of them")
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile: got {tile!r}, expected a number of rows, 1 or more")
    found = _survey(model, patterns_of(model, exclude))
    shapes = [(name, module, shape) for name, module, shape in found if isinstance(shape, MLPShape)]
    if not shapes:
        raise ValueError(_nothing(model, found))
    tiles = [tile or mlp_tile(budget, s.hidden, s.intermediate, itemsize=s.itemsize) for _, _, s in shapes]
    for (_, module, _), rows in zip(shapes, tiles, strict=True):
        _install(module, rows)
    rows = {name: _row(name, shape, size) for (name, _, shape), size in zip(shapes, tiles, strict=True)}
    return TileReport(
        tuple(rows.get(name) or TileRow(name, 0, 0, None, 0, shape) for name, _, shape in found)
    )


def untile_mlps(model: nn.Module) -> int:
    """Give every MLP the forward that it had before `tile_mlps`; returns how many were tiled."""
    return sum(_remove(module) for module in model.modules())


def _row(name: str, shape: MLPShape, tile: int) -> TileRow:
    size = mlp_tile_bytes(tile, shape.hidden, shape.intermediate, itemsize=shape.itemsize)
    return TileRow(name, shape.hidden, shape.intermediate, tile, size)


def _survey(model: nn.Module, exclude: tuple[str, ...]) -> list[tuple[str, nn.Module, MLPShape | str]]:
    """Each MLP with its shape, or why it cannot be tiled; experts by the block that holds them."""
    found: list[tuple[str, nn.Module, MLPShape | str]] = []
    inside: list[str] = []  # prefixes of what belongs to a module that was found
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        shape = holds_experts(module) or mlp_shape(module)
        if shape is None:
            continue
        shape = excluded(name, exclude) or shape
        found.append((name, module, shape))
        inside.append(f"{name}.experts." if isinstance(shape, str) else f"{name}.")
    return found


def _install(module: nn.Module, tile: int) -> None:
    held = module.__dict__.get("forward")
    if isinstance(held, TiledMLP):
        held.blocks.tile = tile
    else:
        module.forward = TiledMLP(module, held, tile)


def _remove(module: nn.Module) -> bool:
    held = module.__dict__.get("forward")
    if not isinstance(held, TiledMLP):
        return False
    if held.inner is None:
        del module.forward
    else:
        module.forward = held.inner
    return True


def _nothing(model: nn.Module, found: list[tuple[str, nn.Module, MLPShape | str]]) -> str:
    reasons = Counter(shape for _, _, shape in found)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    seen = (
        f"none of its {len(found)} MLPs could be tiled: {listed}"
        if found
        else "it has no module of two or three nn.Linear that maps rows to rows"
    )
    return f"model: {type(model).__name__}: {seen}"
