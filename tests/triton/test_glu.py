"""Gated linear units by the Triton kernels, against fp64 and bounded by plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern.ops.glu import ACTIVATIONS, reference  # noqa: E402
from peftkern.ops.glu import triton as kernels  # noqa: E402

from ..ops.bounds import assert_as_accurate  # noqa: E402
from ..ops.test_glu import ACTS, DTYPES, _run  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("halves", [True, False])
def test_every_output_and_gradient(device: str, dtype: torch.dtype, activation: str, halves: bool) -> None:
    """Rows of more than one program, the last one cut; or matrices without gaps, taken as one row."""
    both, dy = (2 * torch.randn(3, 2 * 1100)).to(dtype), torch.randn(3, 1100).to(dtype)
    gate, up = both[:, :1100], both[:, 1100:]
    on = [t.to(device) for t in ((gate, up) if not halves else both.to(device).split(1100, 1))]
    assert on[0].is_contiguous() is not halves or device == "cpu"
    if not halves:
        on = [t.contiguous() for t in on]
    grads = torch.full((3, 2300), torch.nan, dtype=dtype, device=device)
    d_gate, d_up, h = (
        grads[:, :1100],
        grads[:, 1150:2250],
        torch.full((3, 1100), torch.nan, dtype=dtype, device=device),
    )
    kernels.backward(dy.to(device), *on, activation, d_gate, d_up, h)
    assert grads[:, 1100:1150].isnan().all() and grads[:, 2250:].isnan().all()
    assert torch.equal(h, kernels.forward(*on, activation))
    plain = _run(lambda g, u: ACTS[activation](g) * u, gate, up, dy)
    exact = _run(lambda g, u: ACTS[activation](g) * u, gate.double(), up.double(), dy.double())
    for name, got in (("h", h), ("d_gate", d_gate), ("d_up", d_up)):
        assert_as_accurate(name, got.cpu(), plain[name], exact[name])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(device: str, activation: str) -> None:
    x = torch.tensor([3e38, -3e38, 1e4, -1e4, 90.0, -90.0, 0.0, -0.0, torch.inf, torch.nan], device=device)
    one, d_gate, d_up = torch.ones_like(x), torch.empty_like(x), torch.empty_like(x)
    kernels.backward(one, x, one, activation, d_gate, d_up, None)
    exact = [torch.empty_like(x) for _ in range(2)]
    reference.backward(one, x, one, "silu", *exact, None)
    torch.testing.assert_close(
        d_up[:9], torch.where(x > 1, x, torch.zeros_like(x))[:9], rtol=1e-6, atol=1e-30
    )
    torch.testing.assert_close(
        d_gate[:8], torch.where(x > 1, 1.0, torch.where(x < -1, 0.0, 0.5))[:8], rtol=1e-6, atol=1e-30
    )
    assert d_up[9].isnan() and d_gate[9].isnan()


def test_one_value_and_none(device: str) -> None:
    x = torch.randn(1, 1, device=device)
    torch.testing.assert_close(kernels.forward(x, x, "gelu"), reference.forward(x, x, "gelu"))
    assert kernels.forward(x[:0], x[:0], "silu").shape == (0, 1)
    kernels.backward(x[:0], x[:0], x[:0], "silu", x[:0], x[:0], None)
