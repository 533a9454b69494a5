"""How many rows a tile may have for its temporaries to stay within a budget of bytes: pure functions of
shapes."""

from __future__ import annotations

__all__ = ["ROWS", "loss_tile", "loss_tile_bytes", "mlp_tile", "mlp_tile_bytes"]

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


def _rows(budget: int, row: int, what: str) -> int:
    rows = int(budget) // row // ROWS * ROWS
    if rows < ROWS:
        raise ValueError(
            f"budget: got {budget} bytes, but {ROWS} rows of {what} take {ROWS * row}; give that many at "
            "least"
        )
    return rows
