"""Plans of plain operators of torch: what is listed, and with which bytes."""

from __future__ import annotations

import threading

import pytest
import torch

from peftkern.runtime import plan
from peftkern.runtime.plan import Device, Launch, listed, nbytes, planning


def _meta(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")


def test_operators_are_listed_with_what_they_move() -> None:
    x, w, y, bias = _meta(6, 8), _meta(4, 8), _meta(6, 4), _meta(4)
    with planning() as launches:
        torch.mm(x, w.t(), out=y)
        y.addmm_(x, w.t())
        torch.addmm(bias, x, w.t(), out=y)
        x.float()
        y.add_(y)
    flops, product = 2 * 6 * 8 * 4, 2 * (6 * 8 + 4 * 8)
    assert launches == [
        Launch("mm", product, 48, flops),
        Launch("mm", product + 48, 48, flops),
        Launch("mm", product + 8, 48, flops),
        Launch("to_copy", 96, 192),
        Launch("add", 96, 48),
    ]


def test_views_and_allocations_launch_nothing() -> None:
    x = _meta(6, 8)
    with planning() as launches:
        x.view(8, 6), x.t()[2:4], x.contiguous(), x.to(x.dtype), x.detach()
        torch.empty_like(x), x.new_empty(3)
    assert launches == []
    with planning() as launches:
        x.t().contiguous()
    assert [one.name for one in launches] == ["clone"]


def test_plans_nest_and_are_of_one_thread() -> None:
    other, within = Device(90, 132, 50 << 20), []
    with planning(other) as outer:
        listed(Launch("a", 1, 1))
        with planning() as inner:
            listed(Launch("b", 1, 1))
            assert plan.device_of(_meta(1)) == plan.INTERPRETED
        assert plan.device_of(_meta(1)) == other
        thread = threading.Thread(target=lambda: within.append(plan.device_of(_meta(1))))
        thread.start()
        thread.join()
    assert [one.name for one in outer] == ["a"] and [one.name for one in inner] == ["b"]
    assert within == [plan.INTERPRETED]
    with pytest.raises(RuntimeError, match="without storage"):
        listed(Launch("c", 1, 1))


def test_bytes_of_what_is_not_there() -> None:
    assert nbytes(None, (None, _meta(3)), [_meta(2), None]) == 10


def test_launches_side_by_side_add_up() -> None:
    both = Launch("slab", 1, 2, 3, 4).beside(Launch("xa", 10, 20, 30, 40))
    assert both == Launch("slab+xa", 11, 22, 33, 44)
