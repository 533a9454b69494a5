"""A QLoRA linear's forward and backward, against a frozen dense linear's forward and dx, and PEFT on
bitsandbytes.

Ours is called as a patched layer calls it, checked and described once. On CPUs without AVX-512 torch
multiplies bf16 matrices in a naive loop, so both dense linears are measured; the faster one is the honest
yardstick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.functional import linear

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, bnb_linear, close, has, peft_linear, within_bound
from .shapes import DOWN_135M, GATE_8B, GATE_135M, KV_135M, Q_8B, Q_135M

__all__ = ["R", "SCALING", "build", "specs"]

R, SCALING = 16, 2.0
# A peer whose bf16 products are naive loops takes a minute a call at 4096x4096 and M = 512: measured there,
# once, and not above.
LARGE = 4096 * 4096 * 512
TABLE = (
    (Q_8B, 512),
    (Q_8B, 2048),
    (GATE_8B, 512),
    (GATE_135M, 512),
    (DOWN_135M, 512),
    (Q_135M, 512),
    (KV_135M, 512),
)


def specs(small: bool) -> list[Spec]:
    table = ((KV_135M, 32),) if small else TABLE
    modes = ("dropout 0", "dropout 0.1")
    return [
        Spec("qlora_linear", mode, d, s.n, s.k, m)
        for s, m in table
        for d in ("bfloat16", "float32")
        for mode in modes
    ]


def _step(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, *trained: Tensor) -> dict[str, Tensor]:
    """One forward and backward; the outputs by name."""
    x = x.detach().requires_grad_()
    y = forward(x)
    grads = torch.autograd.grad(y, (x, *trained), dy)
    return dict(zip(("y", "dx", "d_lora_a", "d_lora_b"), (y, *grads), strict=False))


def _definition(x: Tensor, dy: Tensor, w: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Every result without dropout, computed in the tensors' dtype."""
    xa, dyb = x @ a.t(), SCALING * (dy @ b)
    y, dx = x @ w.t() + SCALING * (xa @ b.t()), dy @ w + dyb @ a
    return {"y": y, "dx": dx, "d_lora_a": dyb.t() @ x, "d_lora_b": SCALING * (dy.t() @ xa)}


def _plain(x: Tensor, dy: Tensor, w: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What plain PyTorch returns at `dtype`: factors and results rounded to it, sums in fp32 (a GEMM in fp32
    over rounded factors)."""
    factors = (t.to(dtype).float() for t in (x, dy, w, a, b))
    return {name: value.to(dtype) for name, value in _definition(*factors).items()}


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype, dropout_p = DTYPES[spec.dtype], float(spec.mode.removeprefix("dropout "))
    dense = (torch.randn(spec.n, spec.k) * 0.02).to(torch.bfloat16).to(dtype)
    layer = bnb_linear(dense, dtype) if has("bitsandbytes") else None
    weight = NF4Weight.from_dense(dense) if layer is None else NF4Weight.from_bnb(layer)
    x, dy = torch.randn(spec.m, spec.k).to(dtype), torch.randn(spec.m, spec.n).to(dtype)
    a, b = (
        (torch.randn(R, spec.k) / spec.k**0.5).to(dtype).requires_grad_(),
        (torch.randn(spec.n, R) * 0.05).to(dtype).requires_grad_(),
    )
    decoded = weight.dequantize(torch.float32)
    plain_ones = [t.detach() for t in (x, dy, decoded, a, b)]
    exact = _definition(*(t.double() for t in plain_ones))
    check, peer_check = within_bound(exact, _plain(*plain_ones, dtype)), close(exact, dtype)

    calls = {
        p: linear.prepared(x, weight, None, a, b, scaling=SCALING, dropout_p=p) for p in {0.0, dropout_p}
    }

    def ours(p: float = dropout_p) -> dict[str, Tensor]:
        return _step(calls[p], x, dy, a, b)

    def checked(timed: Callable[..., dict], judge: Callable[[dict], None]) -> Callable[[dict], None]:
        """With dropout each mask is another, so its dropout-free twin is judged and the timed result only has
        to be finite."""
        return judge if not dropout_p else lambda got: (judge(timed(0.0)), _finite(got))

    work = spec.n * spec.k * spec.m
    too_slow = (
        spec.dtype == "bfloat16" and _naive_bf16() and work >= LARGE and (dropout_p > 0 or work > LARGE)
    )
    halves = (torch.bfloat16,) if spec.dtype == "bfloat16" and not too_slow else ()
    providers = [
        Provider(OURS, ours, checked(ours, check)),
        *_dense(decoded, x, dy, (*halves, torch.float32)),
    ]
    if layer is not None and has("peft") and not too_slow:
        twins = {
            p: peft_linear(bnb_linear(dense, dtype), R, p, a.detach(), b.detach(), SCALING)
            for p in {0.0, dropout_p}
        }
        peft = functools.partial(_peft, twins, x, dy)
        providers.append(
            Provider("peft+bitsandbytes", functools.partial(peft, dropout_p), checked(peft, peer_check))
        )
    return providers


def _finite(got: dict[str, Tensor]) -> None:
    for name, value in got.items():
        if not torch.isfinite(value).all():
            raise AssertionError(f"{name}: not finite")


def _peft(twins: dict, x: Tensor, dy: Tensor, p: float) -> dict[str, Tensor]:
    lora = twins[p]
    return _step(lora, x, dy, lora.lora_A["default"].weight, lora.lora_B["default"].weight)


def _naive_bf16() -> bool:
    return "AVX512" not in torch.backends.cpu.get_cpu_capability()


def _dense(decoded: Tensor, x: Tensor, dy: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[Provider]:
    """A frozen dense linear's forward and dx in these dtypes, judged against fp64."""
    exact = {"y": x.double() @ decoded.double().t(), "dx": dy.double() @ decoded.double()}
    providers = []
    for dtype in dtypes:
        w, inputs, grads = decoded.to(dtype), x.to(dtype), dy.to(dtype)
        call = functools.partial(
            _step, functools.partial(torch.nn.functional.linear, weight=w), inputs, grads
        )
        providers.append(Provider(f"dense {str(dtype)[6:]}", call, close(exact, dtype)))
    return providers


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
