"""Which keys a query reads, a tile of both at a time: no matrix of queries by keys is in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .tiles import ROWS

__all__ = ["CausalMask", "DenseMask", "LazyMask", "TileMask"]

Span = tuple[slice, slice]  # of rows, and of the keys that any of them reads


class TileMask(Protocol):
    """What attention by tiles asks of a mask."""

    def spans(self, rows: int) -> list[Span]:
        """The tiles of `rows` queries, in order, each with the keys it has to read."""

    def tile(self, rows: slice, keys: slice) -> Tensor | None:
        """What is added to these scores, broadcast to [B, nH, rows, keys]; None for nothing."""


@dataclass(frozen=True)
class CausalMask:
    """Causal, with a window or without, or neither: positions alone decide.

    queries, keys: how many there are. causal: row i reads the keys up to i. window: and of these the last
    `window`.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    device: torch.device

    def spans(self, rows: int) -> list[Span]:
        return [(tile, self._keys(tile)) for tile in _tiles(self.queries, rows)]

    def _keys(self, tile: slice) -> slice:
        last = min(tile.stop, self.keys) if self.causal else self.keys
        first = 0 if self.window is None else min(max(tile.start - self.window + 1, 0), last)
        return slice(first, last)

    def tile(self, rows: slice, keys: slice) -> Tensor | None:
        ahead = self.causal and keys.stop > rows.start + 1
        behind = self.window is not None and rows.stop - 1 - keys.start >= self.window
        if not ahead and not behind:
            return None
        i = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
        distance = i - torch.arange(keys.start, keys.stop, device=self.device)
        hidden = distance < 0 if ahead else torch.zeros_like(distance, dtype=torch.bool)
        if behind:
            hidden |= distance >= self.window
        return torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class DenseMask:
    """A mask that is in memory already, of which a tile is a slice. mask: [B or 1, nH or 1, S, S']."""

    mask: Tensor

    def spans(self, rows: int) -> list[Span]:
        queries, keys = self.mask.shape[-2:]
        return [(tile, slice(0, keys)) for tile in _tiles(queries, rows)]

    def tile(self, rows: slice, keys: slice) -> Tensor | None:
        return self.mask[..., rows, keys]


@dataclass(eq=False)
class LazyMask:
    """The mask that transformers would build for eager attention, [B, 1, S, S'], of which tiles are built.

    Whoever treats it as a tensor gets the whole one, built then: an attention that runs whole is served as
    it was.

    function: transformers' mask function. options: its arguments. Both are public (`AttentionMaskInterface`).
    """

    function: Any
    options: dict[str, Any]
    _spans: dict[int, list[Span]] = field(default_factory=dict)
    _whole: Tensor | None = None

    def spans(self, rows: int) -> list[Span]:
        """By looking at each tile of the mask once. A row without any key reads all, as a softmax of equal
        numbers does."""
        if rows not in self._spans:
            tiles = _tiles(self.options["q_length"], rows)
            if rows > ROWS and rows % ROWS == 0:
                few = self.spans(ROWS)
                ends = [_hull(few[tile.start // ROWS : -(-tile.stop // ROWS)]) for tile in tiles]
            else:
                ends = torch.stack([self._ends(tile) for tile in tiles]).tolist()
            self._spans[rows] = [(tile, slice(*end)) for tile, end in zip(tiles, ends, strict=True)]
        return self._spans[rows]

    def _ends(self, rows: slice) -> Tensor:
        """int64 [2]: the first key that a row of the tile reads, and the one behind the last."""
        keys = self.options["kv_length"]
        reads = self.tile(rows, slice(0, keys))[:, 0] == 0  # [B, rows, S']
        alone = ~reads.any(-1).all()
        columns = reads.any(0).any(0) | alone
        place = torch.arange(keys, device=columns.device)
        return torch.stack(
            [torch.where(columns, place, keys).min(), torch.where(columns, place, -1).max() + 1]
        )

    def tile(self, rows: slice, keys: slice) -> Tensor:
        """[B, 1, rows, keys], of zeros and the least number of the dtype."""
        options = dict(self.options)
        options |= {"q_length": rows.stop - rows.start, "kv_length": keys.stop - keys.start}
        options |= {"q_offset": options.get("q_offset", 0) + rows.start}
        options |= {"kv_offset": options.get("kv_offset", 0) + keys.start}
        return self.function(**options | {"allow_is_bidirectional_skip": False})

    def whole(self) -> Tensor:
        """[B, 1, S, S'], as transformers builds it."""
        if self._whole is None:
            self._whole = self.function(**self.options)
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    @property
    def shape(self) -> torch.Size:
        options = self.options
        return torch.Size((options["batch_size"], 1, options["q_length"], options["kv_length"]))

    @property
    def dtype(self) -> torch.dtype:
        return self.options.get("dtype", torch.float32)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.get("device", "cpu"))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where a tensor would be itself, as hooks that move arguments ask of every layer's."""
        sample = torch.empty(0, dtype=self.dtype, device=self.device)
        return self if sample.to(*args, **kwargs) is sample else self.whole().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("function", "options", "_spans", "_whole"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.whole()[index]

    def __add__(self, other: Any) -> Tensor:
        return self.whole() + _plain(other)

    __radd__ = __add__


def _tiles(queries: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]


def _hull(spans: list[Span]) -> tuple[int, int]:
    return min(keys.start for _, keys in spans), max(keys.stop for _, keys in spans)


def _plain(value: Any) -> Any:
    return value.whole() if isinstance(value, LazyMask) else value
