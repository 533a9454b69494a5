"""Which kernels a call would take, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linear import cpu_rows
from ..runtime import backends
from . import checks

__all__ = ["explain"]


def explain(x: Tensor, n: int, k: int, r: int = 16) -> str:
    """Which kernels a 4-bit linear with out_features `n`, in_features `k` and rank `r` takes for `x` [...,
    k], and why.

    "refused: ..." with the reason where `functional.qlora_linear` takes no such call; a patched module then
    runs its stock forward.
    """
    if refusal := _refusal(x, n, k, r):
        return f"refused: {refusal}; a patched module runs its stock forward on such a call"
    backend, reason = backends.served_by(x)
    m, dtype = x.numel() // max(k, 1), str(x.dtype).removeprefix("torch.")
    if backend == "reference":
        return f"reference: {reason}"
    if backend == "cpu":
        choice = cpu_rows.choose(dtype=dtype, isa=backends.native().isa(), m=m, n=n, k=k)
        return f"cpu: {reason}; {choice.regime} ({choice.why})"
    from ..ops.linear import plan

    return f"{backend}: {reason}; {plan.explain(x, m, n, k, r)}"


def _refusal(x: Tensor, n: int, k: int, r: int) -> str:
    """What is wrong with a call, as the public function says it; empty where nothing is."""
    for name, value, least in (("n", n, 1), ("k", k, 1), ("r", r, 0)):
        if value < least:
            return f"{name}: got {value}, expected at least {least}"
    try:
        checks.activation(x, (n, k), x.device)
        if r:
            checks.adapter(
                torch.empty(r, k, device="meta"), torch.empty(n, r, device="meta"), n, k, torch.device("meta")
            )
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
