"""Decoding tokens (few rows of x) through a frozen 4-bit linear, against dense F.linear and bitsandbytes in
eval and in train mode."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.functional import linear_4bit

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, bnb_linear, close, has, moved_by_weight, within_bound
from .shapes import GATE_8B, Q_8B, Q_135M

__all__ = ["build", "specs"]


def specs(small: bool) -> list[Spec]:
    shapes = (Q_135M,) if small else (Q_8B, GATE_8B)
    return [
        Spec("gemv", "decode", d, s.n, s.k, m)
        for s in shapes
        for d in ("bfloat16", "float32")
        for m in (1, 4, 16)
    ]


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype = DTYPES[spec.dtype]
    dense, x = (
        (torch.randn(spec.n, spec.k) * 0.05).to(torch.bfloat16).to(dtype),
        torch.randn(spec.m, spec.k).to(dtype),
    )
    layer = bnb_linear(dense, dtype) if has("bitsandbytes") else None
    weight = NF4Weight.from_dense(dense) if layer is None else NF4Weight.from_bnb(layer)
    decoded = weight.dequantize(torch.float32)
    exact = {"y": (x.double() @ decoded.double().t())}
    rounded = {
        "y": (x.float() @ decoded.to(dtype).float().t()).to(dtype)
    }  # plain PyTorch's arithmetic: rounded factors, fp32 sums
    y = exact["y"].to(dtype)
    fp32, bf16 = decoded, decoded.to(torch.bfloat16)
    ours = _inference(lambda: linear_4bit(x, weight))
    providers = [Provider(OURS, ours, _y(within_bound(exact, rounded)), moved_by_weight(weight, x, y))]
    check = _y(close(exact, dtype))
    for name, w, inputs in (
        ("dense bfloat16", bf16, x.to(torch.bfloat16)),
        ("dense float32", fp32, x.float()),
    ):
        call = _inference(lambda w=w, inputs=inputs: torch.nn.functional.linear(inputs, w))
        providers.append(Provider(name, call, _y(close(exact, w.dtype)), w.nbytes + inputs.nbytes + y.nbytes))
    if layer is not None:
        trained, evaluated, repacked = layer, bnb_linear(dense, dtype).eval(), bnb_linear(dense, dtype).eval()
        evaluated.support_avx512bf16_for_cpu = False
        moved = moved_by_weight(weight, x, y)
        wants = x.clone().requires_grad_()
        providers.append(Provider("bitsandbytes eval", _inference(lambda: evaluated(x)), check, moved))
        if getattr(
            repacked, "support_avx512bf16_for_cpu", False
        ):  # its first evaluation repacks the weight for good
            providers.append(
                Provider(
                    "bitsandbytes, repacked for inference", _inference(lambda: repacked(x)), check, moved
                )
            )
        providers.append(Provider("bitsandbytes train", lambda: trained(wants), check, moved))
    return providers


def _inference(call):
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def _y(check):
    return lambda y: check({"y": y})


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
