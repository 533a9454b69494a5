"""Rotary position embedding by the Triton kernel, against fp64 and bounded by plain PyTorch's own error."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from peftkern.ops.rope import empty_heads  # noqa: E402
from peftkern.ops.rope import triton as kernels  # noqa: E402

from ..ops.bounds import assert_as_accurate  # noqa: E402
from ..ops.test_rope import DTYPES, case, run, stock  # noqa: E402

# As in tests/ops, and more heads than a program takes.
SHAPES = [
    (1, 4, 2, 1, 64, 64),
    (2, 9, 3, 5, 22, 22),
    (2, 4, 4, 3, 96, 72),
    (1, 2, 2, 5, 80, 20),
    (1, 2, 1, 4, 8, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_seq", [True, False])
def test_every_output_and_gradient(device: str, shape, dtype: torch.dtype, by_seq: bool) -> None:
    args = case(shape, dtype, angle_batch=shape[0] if by_seq else 1)
    args[2], args[3] = torch.rand_like(args[2]), torch.rand_like(args[3])  # halves that differ
    plain, exact = run(stock, *args), run(stock, *(t.double() for t in args))
    q, k, cos, sin, dq, dk = (t.to(device) for t in args)
    for names, pair, inverse in ((("q", "k"), (q, k), False), (("dq", "dk"), (dq, dk), True)):
        outs = [empty_heads(x, by_seq).fill_(torch.nan) for x in pair]
        kernels.rope(*pair, cos, sin, inverse, *outs)
        for name, out in zip(names, outs, strict=True):
            assert_as_accurate(name, out.cpu(), plain[name], exact[name])


def test_gapped_elements_and_nothing(device: str) -> None:
    q, k, cos, sin, *_ = (t.to(device) for t in case(SHAPES[1], torch.float32))
    expected, got = ([empty_heads(x, True).fill_(torch.nan) for x in (q, k)] for _ in range(2))
    kernels.rope(q, k, cos, sin, False, *expected)
    gapped = torch.empty(*q.shape[:3], 2 * q.shape[3], device=device)[..., ::2].copy_(q)
    kernels.rope(gapped, k, cos, sin, False, *got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    kernels.rope(q[:0], k[:0], cos, sin, False, *(empty_heads(x[:0], True) for x in (q, k)))
