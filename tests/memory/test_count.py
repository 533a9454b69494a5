"""The count of storages: once each, from birth to death, whoever holds them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern.memory.count import MemoryCount, SavedCount


def test_views_and_what_was_there_are_not_counted() -> None:
    before = torch.ones(1000)
    with MemoryCount() as count:
        view = before.view(10, 100).t()[1:]
        again = torch.ones(10)
        part = again[2:].view(2, 4)
        before.add_(1)
    assert count.current == 40 and count.peaks == {"forward": 40}
    assert view.shape == (99, 10) and part.shape == (2, 4)


def test_a_peak_is_what_was_alive_at_once() -> None:
    with MemoryCount() as count:
        x = torch.ones(100)
        x = x * 2  # the old x is alive until the new one is
        x = x * 3
    assert count.current == 400 and count.peaks["forward"] == 800
    assert [live.op for live in count.live("forward")] == ["ones", "mul"]


def test_autograd_holds_what_it_saved_and_frees_it() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    with MemoryCount() as count:
        y = (torch.ones(20, 50) @ weight).exp().sum()
        saved = count.current
        y.backward()
    assert saved == 4 * (20 * 50 + 20 * 50 + 1)
    assert count.current == 4 + weight.grad.nbytes


def test_phases_are_told_by_hand_or_by_operators() -> None:
    with MemoryCount(phase="one", classify=None) as count:
        first = torch.ones(10)
        with count.enter("two"):
            second = torch.ones(20)
        third = torch.ones(1)
    assert count.peaks == {"one": 124, "two": 120}
    assert first.numel() + second.numel() + third.numel() == 31


def test_blocks_are_rounded_up() -> None:
    with MemoryCount(round_to=512) as count:
        x = torch.ones(1)
    assert count.current == 512 and x.item() == 1


def test_fake_tensors_are_counted_without_memory() -> None:
    with FakeTensorMode(), MemoryCount() as count:
        x = torch.empty(1 << 20, 1 << 20, dtype=torch.bfloat16)
        y = x[0] + 1
    assert count.current == 2 * (1 << 40) + 2 * (1 << 20) and y.shape == (1 << 20,)


def test_saved_tensors_are_counted_once_without_parameters() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.ones(4, 8, requires_grad=True)
    with SavedCount(layer) as saved:
        y = layer(x)
        z = y.exp() * y
    assert saved.bytes == 4 * 3 * 32  # x, y once though two functions saved it, exp(y)
    assert sum(saved.by_shape().values()) == 3 and z.shape == (4, 8)
