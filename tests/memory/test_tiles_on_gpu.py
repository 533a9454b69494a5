"""On a GPU: the tiled MLP's numbers and bytes, and the workspace that attention by groups spares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from peftkern import NF4Weight
from peftkern.functional import Adapter, Member, gated_mlp
from peftkern.memory.attention_groups import grouped_sdpa
from peftkern.memory.row_blocks import RowBlocks
from peftkern.memory.tiles import mlp_tile_bytes

pytestmark = pytest.mark.gpu


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, rank: int) -> None:
        super().__init__()
        self.weights, self.low = [], nn.ParameterList()
        for n, k in ((inner, hidden), (inner, hidden), (hidden, inner)):
            self.weights.append(NF4Weight.from_dense(torch.randn(n, k, device="cuda") * 0.02))
            self.low.append(nn.Parameter(torch.randn(rank, k, device="cuda") * 0.02))
            self.low.append(nn.Parameter(torch.randn(n, rank, device="cuda") * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        low = [Adapter(self.low[2 * i], self.low[2 * i + 1]) for i in range(3)]
        return gated_mlp(x, *(Member(w, adapters=[a]) for w, a in zip(self.weights, low, strict=True)))

    def exact(self, x: Tensor) -> Tensor:
        def linear(i: int, x: Tensor) -> Tensor:
            a, b = (t.double() for t in (self.low[2 * i], self.low[2 * i + 1]))
            return x @ self.weights[i].dequantize(torch.float32).double().t() + x @ a.t() @ b.t()

        return linear(2, F.silu(linear(0, x)) * linear(1, x))


def gradients(mlp: MLP, call, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *mlp.parameters()], dy.to(y.dtype))]


def peak(call) -> int:
    """The most bytes that torch has allocated beside those that were there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("rows", [1000, 2048])
def test_a_tiled_mlp_errs_no_more_than_a_whole_one(rows: int) -> None:
    mlp = MLP(256, 704, 16)
    x, dy = (torch.randn(1, rows, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole = gradients(mlp, mlp, x, dy)
    tiled = gradients(mlp, RowBlocks(mlp, mlp.forward, 256), x, dy)
    exact = gradients(mlp, mlp.exact, x.double(), dy)
    for got, stock, true in zip(tiled, whole, exact, strict=True):
        error, allowed = (((t.double() - true).norm() / true.norm()).item() for t in (got, stock))
        assert error <= 1.5 * allowed


def test_a_tiled_mlp_takes_a_tile() -> None:
    """Beside the tile: y, dx and d_out, each as wide as x, slabs of decoded weights and fp32 gradients."""
    hidden, inner, tile = 1024, 3584, 512
    mlp = MLP(hidden, inner, 16)
    blocks = RowBlocks(mlp, mlp.forward, tile)

    def step(tokens: int, call) -> int:
        x = torch.randn(1, tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return peak(lambda: checkpoint(call, x, use_reentrant=False).sum().backward())

    tiled, whole = ([step(tokens, call) for tokens in (8192, 16384)] for call in (blocks, mlp))
    per_token = [(long - short) / 8192 for short, long in (tiled, whole)]
    assert per_token[0] <= 5 * 2 * hidden
    assert per_token[1] >= 3 * 2 * inner
    assert tiled[0] - 8192 * per_token[0] <= 2 * mlp_tile_bytes(tile, hidden, inner) + (256 << 20)


def test_attention_by_groups_spares_workspace() -> None:
    """FlashAttention's: dq in fp32 and, expanded, dk and dv, of all heads or of one group's."""
    tokens, heads, kv, width = 16384, 32, 8, 128
    q, k, v = (
        torch.randn(1, tokens, n, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for n in (heads, kv, kv)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        d_out = torch.randn_like(out)
        whole = peak(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
        out = grouped_sdpa(q, k, v, groups=kv, is_causal=True)
        grouped = peak(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
    part = tokens * heads * width * 2
    assert whole - grouped >= 2.5 * part, f"{whole / part:.2f} and {grouped / part:.2f} parts of q"
