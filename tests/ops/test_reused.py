"""The memory of a large result, used again for the next one."""

from __future__ import annotations

import threading

import pytest
import torch

from peftkern.functional import linear_cross_entropy
from peftkern.runtime import native
from peftkern.runtime.native import reused

LARGE = (3000, 4000)
BYTES = 4 * 3000 * 4000  # 48 MB
HOLDERS = {
    "itself": lambda t: t,
    "a view": lambda t: t[5:6],
    "its storage": lambda t: t.untyped_storage(),
    "an array": lambda t: t.numpy()[:3],
    "dlpack": lambda t: t.__dlpack__(),
    "a parameter": lambda t: torch.nn.Parameter(t),
    "a graph": lambda t: torch.ones(1, requires_grad=True) * t,
}


def test_a_large_result_lies_where_the_last_one_was_dropped() -> None:
    first = reused(LARGE, "test").fill_(1).requires_grad_()
    place = first.data_ptr()
    del first
    again = reused(LARGE, "test")
    assert (
        again.data_ptr() == place
        and not again.requires_grad
        and again.is_contiguous()
        and again.dtype == torch.float32
    )
    del again
    assert reused((4000, 3000), "test").shape == (4000, 3000) and reused((2, 3), "test").shape == (2, 3)


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_result_that_is_held_stays_as_it_is(kind: str) -> None:
    result = reused(LARGE, "test").fill_(3)
    place, holder = result.data_ptr(), HOLDERS[kind](result)
    del result
    second = reused(LARGE, "test")
    assert holder is not None and second.data_ptr() != place
    del holder, second
    assert native._local.test.data_ptr() != place


def test_a_storage_that_was_emptied_is_not_handed_out() -> None:
    reused(LARGE, "test").untyped_storage().resize_(0)
    assert reused(LARGE, "test").untyped_storage().nbytes() == BYTES


def test_results_larger_than_what_may_stay_are_always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KEPT", BYTES - 1)
    assert reused(LARGE, "larger").shape == LARGE and native._local.larger is None


def test_threads_have_results_of_their_own() -> None:
    mine, others = reused(LARGE, "test"), []
    place = mine.data_ptr()
    del mine
    thread = threading.Thread(target=lambda: others.append(reused(LARGE, "test").data_ptr()))
    thread.start()
    thread.join()
    assert others != [place]


def test_gradients_of_a_trained_head_are_kept_apart() -> None:
    """Two heads of one size, both gradients alive, one added up over two passes, and one made when the others
    were dropped."""
    generator = torch.Generator().manual_seed(0)
    n, k = 8200, 1024  # 34 MB
    x, labels = torch.randn(3, k, generator=generator), torch.tensor([1, 7, n - 1])
    heads = [(torch.randn(n, k, generator=generator) * 0.05).requires_grad_() for _ in range(2)]
    expected = [
        torch.autograd.grad(torch.nn.functional.cross_entropy(x @ head.t(), labels), head)[0]
        for head in heads
    ]
    for head in heads:
        linear_cross_entropy(x, head, labels).backward()
    linear_cross_entropy(x, heads[0], labels).backward()
    for head, grad, times in zip(heads, expected, (2, 1), strict=True):
        torch.testing.assert_close(head.grad, grad * times)
        head.grad = None
    linear_cross_entropy(x, heads[1], labels).backward()
    torch.testing.assert_close(heads[1].grad, expected[1])


def test_a_pool_gives_what_nobody_holds() -> None:
    """As many buffers as were held at once, each again when it is free; of other sizes and threads others."""
    size = 12_345
    held = [native.pooled(size) for _ in range(3)]
    places = {t.data_ptr() for t in held}
    assert len(places) == 3 and all(t.numel() == size for t in held)
    other = native.pooled(size + 1)
    assert other.data_ptr() not in places
    view = held.pop(0)[5:9]
    held.clear()
    again = [native.pooled(size) for _ in range(3)]
    found = {t.data_ptr() for t in again}
    assert len(found & places) == 2 and view.data_ptr() - 5 not in found
    elsewhere: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: elsewhere.append(native.pooled(size)))
    thread.start()
    thread.join()
    assert elsewhere[0].data_ptr() not in found


def test_a_pool_keeps_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_KEPT", 3000)
    pool = native._Pool()
    held = [pool.take(1000) for _ in range(5)]
    assert pool.bytes == 3000 and len({t.data_ptr() for t in held}) == 5
