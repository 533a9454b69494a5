"""Which calls of linear + cross-entropy the CPU's kernel without logits takes, and that it is held to the
same bounds as all others. The kernel itself: tests/native/test_loss_tiles.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from peftkern.functional import linear_cross_entropy
from peftkern.ops.linear import config, cpu_rows
from peftkern.ops.linear_cross_entropy import tiles
from peftkern.ops.linear_cross_entropy.budget import logits_bytes
from peftkern.runtime import backends

from .test_linear_cross_entropy import check, make, ours

BF16 = torch.bfloat16


@pytest.fixture
def level(level: str) -> Iterator[str]:
    """As of all tests, with a row that sends dense heads to the kernel."""
    with cpu_rows.use_row(level, replace(config.TABLE[level], loss=True)):
        yield level


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the kernel."""
    rows, native = [], backends.native()
    kernel = native.linear_cross_entropy

    def counted(weight, x, m, *rest):
        rows.append(m)
        return kernel(weight, x, m, *rest)

    monkeypatch.setattr(native, "linear_cross_entropy", counted)
    return rows


@pytest.mark.parametrize("four_bit", [None, {}, {"nested": False}], ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 64), (33, 1030, 128), (70, 257, 192), (600, 50, 64)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_within_the_bounds(
    level: str, calls: list[int], shape: tuple[int, int, int], four_bit: dict | None, reduction: str
) -> None:
    draws = [make(*shape, 0, BF16, bias=False, four_bit=four_bit) for _ in range(max(4, 256 // shape[0]))]
    d_loss = torch.rand(shape[0]) if reduction == "none" else None
    check(draws, reduction=reduction, z_loss=1e-3, d_loss=d_loss)
    assert len(calls) >= len(draws)


def test_what_it_does_not_take(level: str, calls: list[int]) -> None:
    taken = make(20, 100, 64, 4, BF16)
    x, weight, labels, bias, a, b = taken
    plain = (x, weight, labels, None, None, None)
    ours(*plain)
    assert calls == [int((labels != -100).sum())]
    calls.clear()
    ours(x, weight, labels, bias, None, None)
    ours(x, weight, labels, None, a, b)
    ours(x, weight.float(), labels, None, None, None)
    ours(x.float(), weight, labels, None, None, None)
    for options in ({"softcap": 5.0}, {"label_smoothing": 0.1}, {"train_weight": True}):
        ours(*plain, **options)
    ours(*make(20, 100, 64, 0, BF16, bias=False, four_bit={"blocksize": 32}))
    ours(*make(20, 100, 100, 0, BF16, bias=False, four_bit={}))
    backends.native().set_isa("baseline")
    ours(*plain)
    assert calls == []


def test_a_row_of_the_table_may_leave_dense_heads_to_the_vendor(level: str, calls: list[int]) -> None:
    with cpu_rows.use_row(level, replace(config.TABLE[level], loss=False)):
        ours(*make(20, 100, 64, 0, BF16, bias=False))
        assert calls == []
        ours(*make(20, 100, 64, 0, BF16, bias=False, four_bit={}))
        assert len(calls) == 1


def test_rows_of_a_call(level: str, calls: list[int]) -> None:
    """512 at most, and as a budget of bytes allows, 32 at least; the loss is the same."""
    x, weight, labels, *_ = make(1100, 300, 64, 0, BF16, bias=False, ignored=0.0)
    whole = linear_cross_entropy(x, weight, labels)
    assert calls == [367, 367, 366] and tiles.MOST_ROWS == 512
    calls.clear()
    with logits_bytes(1):
        assert torch.equal(linear_cross_entropy(x, weight, labels), whole)
    assert max(calls) == 32 and sum(calls) == 1100
    calls.clear()
    room = backends.native().linear_cross_entropy_scratch_bytes(300, 300, 64, False)
    with logits_bytes(room):
        linear_cross_entropy(x, weight, labels)
    assert max(calls) <= 300 and sum(calls) == 1100


def test_without_gradients_and_without_labels(level: str, calls: list[int]) -> None:
    x, weight, labels, *_ = make(40, 300, 64, 0, BF16, bias=False)
    trained = linear_cross_entropy(x.clone().requires_grad_(), weight, labels)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), trained)
    calls.clear()
    labels[:] = -100
    got = ours(x, weight, labels, None, None, None)
    assert got["loss"].isnan() and not got["dx"].any() and calls == []
