"""bf16 tiles (csrc/cpu/tile_impl.h) on the levels that have them and this CPU too; emulated elsewhere, in
tests/native/test_bf16_emulated.py. What every level is held to is in test_qlora_linear.py and
test_qlora_group.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.formats.nf4 import operands
from peftkern.functional import qlora_linear
from peftkern.ops.linear import cpu
from peftkern.runtime import backends
from peftkern.runtime.native import weight_view


def _results(x: Tensor, weight: NF4Weight, dy: Tensor, **options) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    trained = [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    y = qlora_linear(x, weight, **options)
    return (y.detach(), *torch.autograd.grad(y, (x, *trained), dy))


@pytest.mark.parametrize("n, k, blocksize", [(45, 64, 64), (97, 192, 64), (32, 576, 64), (70, 512, 256)])
def test_one_hot_rows_bring_up_the_weight(level: str, n: int, k: int, blocksize: int) -> None:
    """Each code and absmax at its place, bit for bit, in y and in dx: what dequantization gives."""
    weight = NF4Weight.from_dense(torch.randn(n, k), blocksize=blocksize)
    dense = weight.dequantize(torch.bfloat16)
    y, _ = _results(torch.eye(k, dtype=torch.bfloat16), weight, torch.zeros(k, n, dtype=torch.bfloat16))
    assert torch.equal(y.t(), dense)
    dy = torch.zeros(max(n, 33), n, dtype=torch.bfloat16)
    dy[:n] = torch.eye(n)
    _, dx = _results(torch.zeros(len(dy), k, dtype=torch.bfloat16), weight, dy)
    assert torch.equal(dx[:n], dense) and not dx[n:].any()


@pytest.mark.parametrize("m", [*range(1, 18), 32, 33, 48, 64])
@pytest.mark.parametrize(
    "n, k, options",
    [(33, 64, {}), (46, 576, {}), (48, 4224, {}), (70, 512, {"blocksize": 256, "nested": False})],
)
def test_few_rows(level: str, m: int, n: int, k: int, options: dict) -> None:
    """What the kernel for few rows gives at every number of rows it takes, whichever the table sends there:
    dropout, an adapter and a bias, next to exact arithmetic on the decoded weight."""
    weight = NF4Weight.from_dense(torch.randn(n, k) / k**0.5, **options)
    x, bias = torch.randn(m, k).to(torch.bfloat16), torch.randn(n)
    a, b = (torch.randn(5, k) / k**0.5).to(torch.bfloat16), torch.randn(n, 5).to(torch.bfloat16)
    y, xa = torch.full((m, n), float("nan")).to(torch.bfloat16), torch.full((m, 5), float("nan"))
    native, lora = backends.native(), cpu.lora_view(a, b, 0.5, 0.0, None)
    view = weight_view(weight.packed, operands(weight)[1], n, k)
    made = bias.data_ptr(), 0, y.data_ptr(), xa.data_ptr(), True
    native.qlora_linear_fwd(view, lora, x.data_ptr(), 1, m, *made)
    exact_xa = x.double() @ a.double().t()
    exact = x.double() @ weight.dequantize(torch.float32).double().t() + bias.double()
    exact += 0.5 * exact_xa @ b.double().t()
    torch.testing.assert_close(xa.double(), exact_xa, rtol=1e-5, atol=1e-5)
    # y's rounding, and W's where tiles take bf16 numbers
    assert (y.double() - exact).norm() <= 2.0**-8 * exact.norm()
    assert ((y.double() - exact).abs() <= 2.0**-7 * exact.abs() + 2.0**-6).all()


def test_numbers_below_the_normal_ones_are_zero(level: str) -> None:
    """vdpbf16ps and AMX take and give them as zero: the one place where a level's results are not within a
    rounding."""
    weight = NF4Weight.from_dense(torch.ones(64, 64))
    tiny = torch.full((40, 64), 2.0**-130).to(torch.bfloat16)
    y, dx = _results(tiny, weight, tiny)
    assert tiny.any() and not y.any() and not dx.any()


def test_not_finite_numbers_stay_in_their_rows(level: str) -> None:
    weight, x = NF4Weight.from_dense(torch.randn(70, 128)), torch.randn(50, 128).to(torch.bfloat16)
    dy = torch.randn(50, 70).to(torch.bfloat16)
    clean = _results(x, weight, dy)
    x[7, 3], x[33, 100], dy[12, 69] = float("inf"), float("nan"), float("nan")
    y, dx = _results(x, weight, dy)
    touched = torch.tensor([7, 33])
    assert not torch.isfinite(y[touched]).any() and dx[12].isnan().all()
    others = torch.ones(50, dtype=torch.bool)
    others[touched] = False
    assert torch.equal(y[others], clean[0][others])
    others[touched], others[12] = True, False
    assert torch.equal(dx[others], clean[1][others])


@pytest.fixture
def cores():
    """Sets whether threads share work as on cores with a common cache (1) or without (2)."""
    yield backends.native().set_cores
    backends.native().set_cores(0)


@pytest.mark.parametrize("m, dtype, dropout_p", [(100, torch.bfloat16, 0.25), (300, torch.float32, 0.0)])
def test_threads_do_not_change_a_bit(level: str, cores, m: int, dtype: torch.dtype, dropout_p: float) -> None:
    """However they share the work; from 128 rows on gradients are summed over either half of them apart."""
    weight, threads = NF4Weight.from_dense(torch.randn(200, 320)), torch.get_num_threads()
    a, b = torch.randn(8, 320).to(dtype).requires_grad_(), torch.randn(200, 8).to(dtype).requires_grad_()
    x, dy = torch.randn(m, 320).to(torch.bfloat16), torch.randn(m, 200).to(torch.bfloat16)
    bias = torch.randn(200).requires_grad_()
    results = []
    try:
        for count, how in itertools.product((1, 2, 3, 4), (1, 2)):
            torch.set_num_threads(count)
            cores(how)
            torch.manual_seed(5)
            options = dict(bias=bias, lora_a=a, lora_b=b, dropout_p=dropout_p)
            results.append(_results(x, weight, dy, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
