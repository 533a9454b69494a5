"""How many rows a tile may have for its temporaries to stay within a budget of bytes: pure functions of
shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "ROWS",
    "Tiling",
    "attention_tiling",
    "fitted_tiling",
    "loss_tile",
    "loss_tile_bytes",
    "mlp_tile",
    "mlp_tile_bytes",
]

_SCORES = 64 << 20  # bytes of a tile's scores in backward, beyond which a tile has fewer rows
SCORE_BYTES = 14  # of a score in backward: its tanh, p and dp in fp32, and dp as a 16-bit product gives it
ROWS = 64  # tiles are multiples of it: whole tiles of the matrix products, on every device


def mlp_tile_bytes(rows: int, hidden: int, intermediate: int, *, itemsize: int = 2) -> int:
    """Bytes that a tile of a gated MLP takes in its backward pass: rows * (h + 6i).

    h and i are the bytes a row of the hidden and of the intermediate width: the tile's output or its gradient
    of the input, and gate, up, their product and the three gradients. An MLP without a gate takes less.

    Args:
        rows: of the tile. hidden, intermediate: the MLP's widths. itemsize: bytes an element in the dtype
        that
            it computes in.
    """
    return rows * itemsize * (hidden + 6 * intermediate)


def mlp_tile(budget: int, hidden: int, intermediate: int, *, itemsize: int = 2) -> int:
    """The most rows of an MLP's tile whose temporaries fit a budget: a multiple of `ROWS`.

    Args:
        budget: bytes. The others as in `mlp_tile_bytes`.
    Raises: ValueError where the budget does not hold the smallest tile, naming what that takes.

    >>> mlp_tile(369 << 20, 4096, 14336)
    2112
    """
    row = mlp_tile_bytes(1, hidden, intermediate, itemsize=itemsize)
    return _rows(budget, row, f"an MLP of {hidden} x {intermediate}")


def loss_tile_bytes(rows: int, words: int, *, itemsize: int = 2) -> int:
    """Bytes of the logits that the fused loss has at a time: rows * words, which become their own gradient.

    Args:
        rows: of the tile. words: the vocabulary's size. itemsize: bytes a logit: those of the hidden states'
            dtype on a GPU, 4 on the CPU.
    """
    return rows * words * itemsize


def loss_tile(budget: int, words: int, *, itemsize: int = 2) -> int:
    """The most rows whose logits fit a budget: a multiple of `ROWS`.

    Args:
        budget: bytes. The others as in `loss_tile_bytes`.
    Raises: ValueError where the budget does not hold the smallest tile, naming what that takes.

    >>> loss_tile(256 << 20, 128256)
    1024
    """
    return _rows(budget, loss_tile_bytes(1, words, itemsize=itemsize), f"the logits of {words} words")


@dataclass(frozen=True)
class Tiling:
    """What is computed at a time.

    samples: of the batch. heads: key/value heads, with the queries' that they serve. rows: queries of each.
    """

    samples: int
    heads: int
    rows: int


def attention_tiling(
    batch: int,
    kv_heads: int,
    queries_each: int,
    rows: int,
    keys: int,
    *,
    groups: int | None = None,
    budget: int | None = None,
) -> Tiling:
    """The largest tile whose scores stay within `budget` bytes in backward; `ROWS` rows where none does.

    Rows come first, then heads, then samples: gradients of keys are added up once a tile.

    Args:
        batch, kv_heads: of the operands. queries_each: query heads of a key/value head. rows, keys: of one.
        groups: how many groups the key/value heads make, None for as few as the budget allows.
        budget: None for 64 MiB.

    >>> attention_tiling(1, 4, 2, 131072, 131072), attention_tiling(2, 4, 2, 128, 128)
    (Tiling(samples=1, heads=1, rows=64), Tiling(samples=2, heads=4, rows=128))
    """
    row = max(queries_each * keys * SCORE_BYTES, 1)
    budget = _SCORES if budget is None else budget
    most = budget // row // ROWS * ROWS
    heads = kv_heads // groups if groups else 1
    fitting = max(most // heads // ROWS * ROWS, ROWS)
    if fitting < rows:
        return Tiling(1, heads, fitting)
    if not groups:
        divisors = (n for n in range(kv_heads, 0, -1) if kv_heads % n == 0)
        heads = next(n for n in divisors if n == 1 or n * rows * row <= budget)
    together = heads == kv_heads and batch * heads * rows * row <= budget
    return Tiling(batch if together else 1, heads, rows)


def fitted_tiling(
    most_keys: Callable[[int], int],
    batch: int,
    kv_heads: int,
    queries_each: int,
    rows: int,
    *,
    groups: int | None = None,
) -> tuple[Tiling, int]:
    """`attention_tiling` where a tile of more queries reads more keys, as under a window: the tiling, and the
    keys that its tiles read at the most.

    Args:
        most_keys: the most keys that a tile of so many queries reads. The others as in `attention_tiling`.
    """
    sizes = batch, kv_heads, queries_each, rows
    first = attention_tiling(*sizes, most_keys(ROWS), groups=groups)
    tiling = attention_tiling(*sizes, most_keys(first.rows), groups=groups)
    return tiling, most_keys(tiling.rows)


def _rows(budget: int, row: int, what: str) -> int:
    rows = int(budget) // row // ROWS * ROWS
    if rows < ROWS:
        raise ValueError(
            f"budget: got {budget} bytes, but {ROWS} rows of {what} take {ROWS * row}; give that many at "
            "least"
        )
    return rows
