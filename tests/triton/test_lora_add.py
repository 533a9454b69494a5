"""The low-rank branch on a GPU's kernels against the reference: the launchers' composition; the passes have
tests of their own."""

import pytest
import torch

from peftkern import use_backend
from peftkern.functional import lora_add


def run(tensors, dy, backend, dropout_p):
    inputs = [t.clone().requires_grad_() for t in tensors]
    with use_backend(backend):
        out = lora_add(
            *inputs,
            scaling=0.7,
            dropout_p=dropout_p,
            seed=torch.tensor([11], device=dy.device) if dropout_p else None,
        )
        out.backward(dy)
    return [out.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(1, 33, 70, 3), (40, 96, 64, 16), (0, 20, 64, 4)], ids=str)
def test_like_the_reference(device, shape, dropout_p):
    m, n, k, r = shape
    tensors = [
        t.to(device)
        for t in (
            torch.randn(m, n),
            torch.randn(m, k),
            torch.randn(r, k) / 8,
            torch.randn(n, r) / 8,
            torch.randn(n),
        )
    ]
    dy = torch.randn(m, n, device=device)
    results = [run(tensors, dy, backend, dropout_p) for backend in ("triton", "reference")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_asked_for(device):
    y, x, a, b = (
        t.to(device) for t in (torch.randn(9, 32), torch.randn(9, 64), torch.randn(4, 64), torch.randn(32, 4))
    )
    for wanted in (a, b, x):
        with use_backend("triton"):
            leaf = wanted.clone().requires_grad_()
            lora_add(y, *(leaf if t is wanted else t for t in (x, a, b))).sum().backward()
        expected = wanted.clone().requires_grad_()
        x_, a_, b_ = (expected if t is wanted else t for t in (x, a, b))
        (y + x_ @ a_.t() @ b_.t()).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-4)
