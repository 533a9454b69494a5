"""A frozen or trained language-model head with its cross-entropy, forward + backward, against stock logits,
and against its GEMMs alone.

The target is the GEMMs: all else (softmax, gradient, the passes between) may add 15 %. The GEMMs alone write
logits [M, V] into a tensor that was allocated before, which ours never has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern.functional import linear_cross_entropy

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, close, has, within_bound

__all__ = ["build", "specs"]

MODES = ("frozen", "trained", "frozen softcap")


def specs(small: bool) -> list[Spec]:
    """The heads of SmolLM2-135M and Gemma 2 2B's width."""
    if small:
        return [Spec("linear_cross_entropy", mode, "float32", 1000, 64, 40) for mode in MODES]
    heads = ((49_152, 576, 512), (49_152, 576, 2048), (256_000, 2304, 256))
    found = [
        Spec("linear_cross_entropy", "frozen", d, v, k, m)
        for v, k, m in heads
        for d in ("float32", "bfloat16")
    ]
    return found + [Spec("linear_cross_entropy", mode, "float32", 49_152, 576, 512) for mode in MODES[1:]]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype, softcap = DTYPES[spec.dtype], 30.0 if "softcap" in spec.mode else None
    x, weight = torch.randn(spec.m, spec.k).to(dtype), (torch.randn(spec.n, spec.k) * 0.05).to(dtype)
    labels, trained = torch.randint(0, spec.n, (spec.m,)), spec.mode == "trained"
    fast = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    exact = _stock(x.double(), weight.double(), labels, softcap, trained)()
    # Plain PyTorch at the same dtype. Its own bf16 product takes minutes on a CPU without bf16 instructions,
    # where our logits are fp32: there it is the arithmetic in fp32 on rounded inputs, the results rounded.
    plain = _stock(x if fast else x.float(), weight if fast else weight.float(), labels, softcap, trained)()
    rounded = {name: t if name == "loss" else t.to(dtype) for name, t in plain.items()}
    moved = (3 if trained else 2) * weight.nbytes + 3 * x.nbytes
    providers = [
        Provider(OURS, _ours(x, weight, labels, softcap, trained), within_bound(exact, rounded), moved)
    ]
    wide, head = (x, weight) if fast else (x.float(), weight.float())
    providers.append(
        Provider("stock logits", _stock(wide, head, labels, softcap, trained), close(exact, wide.dtype))
    )
    providers.append(Provider("GEMMs alone", _gemms(wide, head, trained), lambda _: None))
    if has("liger_kernel") and not trained:
        providers.append(
            Provider("liger's chunks", _chunked(wide, head, labels, softcap), close(exact, wide.dtype))
        )
    return providers


def _named(loss: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"loss": loss.detach().reshape(1), "dx": x.grad} | (
        {} if weight.grad is None else {"d_weight": weight.grad}
    )


def _ours(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, trained: bool):
    def run() -> dict[str, Tensor]:
        x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        loss = linear_cross_entropy(x_, weight_, labels, softcap=softcap)
        loss.backward()
        return _named(loss, x_, weight_)

    return run


def _stock(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, trained: bool):
    def run() -> dict[str, Tensor]:
        x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_(trained)
        logits = F.linear(x_, weight_)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits if x.dtype == torch.float64 else logits.float(), labels)
        loss.backward()
        return _named(loss, x_, weight_)

    return run


def _gemms(x: Tensor, weight: Tensor, trained: bool):
    logits, dx = x.new_empty(len(x), len(weight)), torch.empty_like(x)
    d_weight = torch.empty_like(weight) if trained else None

    def run() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        if d_weight is not None:
            torch.mm(logits.t(), x, out=d_weight)

    return run


def _chunked(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None):
    """Liger's way in plain torch: as many chunks of rows as V is times K, the gradient of each at once."""
    step = 1 << max(0, (-(-len(x) // -(-weight.shape[0] // weight.shape[1])) - 1).bit_length())

    def run() -> dict[str, Tensor]:
        loss, x_ = torch.zeros(()), x.detach().requires_grad_()
        grad = torch.empty_like(x)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            leaf = x[part].detach().requires_grad_()
            logits = F.linear(leaf, weight)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            piece = F.cross_entropy(logits.float(), labels[part], reduction="sum") / len(x)
            (grad[part],) = torch.autograd.grad(piece, leaf)
            loss += piece.detach()
        x_.grad = grad
        return _named(loss, x_, weight)

    return run


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
