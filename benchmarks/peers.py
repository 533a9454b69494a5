"""The peers, with their own kernels: bitsandbytes and PEFT on it, never with peftkern's hook inside; and what
makes a result right."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["PEFTKERN_BNB_BACKEND"] = (
    "0"  # before bitsandbytes is imported: its entry point is peftkern's hook
)

import torch
from torch import Tensor, nn

from peftkern import NF4Weight

__all__ = ["DTYPES", "bnb_linear", "close", "equal", "has", "peft_linear", "within_bound"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTOR = 1.5  # the contract on our error
PEER_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.03,
    torch.float16: 0.01,
}  # a peer is only held to computing the same thing


def has(*packages: str) -> bool:
    return all(importlib.util.find_spec(p) is not None for p in packages)


def _check_hook() -> None:
    hook = sys.modules.get("peftkern.bnb_backend")
    if hook is not None and hook.state()[0]:
        raise RuntimeError(
            "peftkern's bitsandbytes hook is on, so bitsandbytes would run our kernels; set "
            "PEFTKERN_BNB_BACKEND=0"
        )


def bnb_linear(dense: Tensor, compute: torch.dtype, **options: Any) -> nn.Module:
    """A bitsandbytes Linear4bit (NF4, nested absmax) holding `dense` [n, k], on the CPU, in train mode."""
    import bitsandbytes as bnb

    _check_hook()
    n, k = dense.shape
    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=compute, compress_statistics=True, quant_type="nf4", **options
    )
    layer.weight = bnb.nn.Params4bit(
        dense, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    return layer.to("cpu").train()


def peft_linear(
    layer: nn.Module, r: int, dropout_p: float, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> nn.Module:
    """PEFT's LoRA layer over `layer`, with these adapters in their dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=scaling * r, lora_dropout=dropout_p, target_modules=["linear"], bias="none"
    )
    model = get_peft_model(nn.ModuleDict({"linear": layer}), config, autocast_adapter_dtype=False)
    lora = model.base_model.model["linear"].train()
    for name, value in (("lora_A", lora_a), ("lora_B", lora_b)):
        getattr(lora, name)["default"].weight = nn.Parameter(value.clone())
    return lora


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.detach().double() - exact.double()).norm() / exact.double().norm()).item()


def equal(expected: Tensor) -> Callable[[Tensor], None]:
    """A check that the result is `expected`, bit for bit."""

    def check(got: Tensor) -> None:
        if not torch.equal(got, expected):
            raise AssertionError(
                f"differs from the reference in {(got != expected).sum().item()} of {got.numel()} values"
            )

    return check


def close(exact: dict[str, Tensor], dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    """A check that a peer computes the same thing."""

    def check(got: dict[str, Tensor]) -> None:
        for name, value in got.items():
            error = relative(value, exact[name])
            if not error <= PEER_TOLERANCE[dtype]:
                raise AssertionError(
                    f"{name}: relative error {error:.2e}, a peer may have {PEER_TOLERANCE[dtype]:.0e}"
                )

    return check


def within_bound(exact: dict[str, Tensor], plain: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None]:
    """A check of our own result: its relative error is at most 1.5 times plain PyTorch's at the same dtype,
    name by name."""

    def check(got: dict[str, Tensor]) -> None:
        for name, value in got.items():
            error, allowed = (
                relative(value, exact[name]),
                FACTOR * relative(plain[name], exact[name]) + torch.finfo(value.dtype).eps,
            )
            if not error <= allowed:
                raise AssertionError(
                    f"{name}: relative error {error:.2e}, plain PyTorch's allows {allowed:.2e}"
                )

    return check


def moved_by_weight(weight: NF4Weight, *others: Tensor) -> int:
    """Bytes of the packed weight and of other tensors, each counted once."""
    return weight.nbytes + sum(t.numel() * t.element_size() for t in others)
