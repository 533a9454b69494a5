"""Rows of a tile from a budget of bytes."""

from __future__ import annotations

import pytest

from peftkern.memory.row_blocks import equal_tiles
from peftkern.memory.tiles import loss_tile, loss_tile_bytes, mlp_tile, mlp_tile_bytes


def test_a_tile_takes_what_the_formula_says() -> None:
    h, i = 2 * 4096, 2 * 14336
    assert mlp_tile_bytes(2048, 4096, 14336) == 2048 * (h + 6 * i) == 369_098_752
    assert mlp_tile_bytes(2048, 4096, 14336, itemsize=4) == 2 * 369_098_752
    assert loss_tile_bytes(1024, 128_256) == 1024 * 128_256 * 2


@pytest.mark.parametrize("budget", [20 << 20, 100 << 20, 369_098_752, 1 << 30])
def test_the_tile_is_the_largest_multiple_of_64_in_the_budget(budget: int) -> None:
    rows = mlp_tile(budget, 4096, 14336)
    assert rows % 64 == 0
    assert mlp_tile_bytes(rows, 4096, 14336) <= budget < mlp_tile_bytes(rows + 64, 4096, 14336)
    rows = loss_tile(budget, 128_256)
    assert rows % 64 == 0
    assert loss_tile_bytes(rows, 128_256) <= budget < loss_tile_bytes(rows + 64, 128_256)


def test_a_budget_below_the_smallest_tile_is_refused_with_the_minimum() -> None:
    least = mlp_tile_bytes(64, 4096, 14336)
    assert mlp_tile(least, 4096, 14336) == 64
    with pytest.raises(
        ValueError, match=rf"budget: got {least - 1} bytes.*64 rows.*4096 x 14336 take {least};"
    ):
        mlp_tile(least - 1, 4096, 14336)
    with pytest.raises(ValueError, match=f"128256 words take {64 * 128_256 * 2};"):
        loss_tile(1000, 128_256)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 1000, 4100])
@pytest.mark.parametrize("most", [1, 7, 64, 128, 2048])
def test_tiles_cover_every_row_once_and_are_alike(rows: int, most: int) -> None:
    spans = equal_tiles(rows, most)
    assert [row for begin, end in spans for row in range(begin, end)] == list(range(rows))
    sizes = [end - begin for begin, end in spans]
    assert max(sizes) <= most and len(spans) == -(-rows // most)
    if most % 64 == 0:
        assert all(size % 64 == 0 for size in sizes[:-1])
