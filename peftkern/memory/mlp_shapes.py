"""Which modules are MLPs that map rows to rows, and their widths: found by what a forward does, on a small
probe."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..patching.hooks import Ours
from ..patching.wrappers import UNKNOWN, innermost

__all__ = ["MLPShape", "holds_experts", "mlp_shape"]

_EXPERTS = "a block of experts chooses rows by the whole batch; its experts see few rows each as it is"
_ROWS = 5  # of a probe
_SCALES = (1.0, 30.0, 1e4, 1e-2, 0.0)  # of its rows


class MLPShape(NamedTuple):
    """An MLP's width, its inner width, and the bytes of an element of what it computes."""

    hidden: int
    intermediate: int
    itemsize: int


def holds_experts(module: nn.Module) -> str | None:
    """Why a mixture of experts is not tiled; None where the module is none."""
    return _EXPERTS if isinstance(module._modules.get("experts"), nn.Module) else None


def mlp_shape(module: nn.Module) -> MLPShape | str | None:
    """The widths of an MLP; why it cannot be tiled; None where the module is not an MLP at all.

    An MLP is a module with two or three linears as children, all else in it without parameters, whose forward
    takes one tensor and gives for each row what depends on that row alone.
    """
    linears = {name: base for name, child in module._modules.items() if (base := _linear(child)) is not None}
    if not 2 <= len(linears) <= 3:
        return None
    sizes = {name: (base.in_features, base.out_features) for name, base in linears.items()}
    forward = innermost(type(module).forward)
    hidden = None if forward is None else _hidden(forward, module, sizes)
    if hidden is None:
        return (
            f"{type(module).__name__}.forward {UNKNOWN}" if forward is None and _named_mlp(module) else None
        )
    reason = _against(module, linears)
    if reason is not None:
        return reason
    inner = max((k for k, _ in sizes.values() if k != hidden), default=hidden)
    return MLPShape(hidden, inner, max(_itemsize(base) for base in linears.values()))


def _linear(child: nn.Module | None) -> nn.Linear | None:
    """The linear that a child is or holds: beneath adapters, or the original of one that is trained as a
    copy."""
    base = getattr(child, "original_module", child) if hasattr(child, "modules_to_save") else child
    base = getattr(base, "base_layer", base)
    return base if isinstance(base, nn.Linear) else None


def _named_mlp(module: nn.Module) -> bool:
    return {"gate_proj", "gate_up_proj", "down_proj"} & module._modules.keys() != set()


def _against(module: nn.Module, linears: dict[str, nn.Linear]) -> str | None:
    for name, child in module._modules.items():
        if name not in linears and child is not None and any(True for _ in child.parameters()):
            return f"it holds {name}, a {type(child).__name__} with parameters of its own"
    for child in module.modules():
        hook = child.__dict__.get("_hf_hook")
        if getattr(hook, "offload", False):
            return "accelerate moves its weights at every call, which would be at every tile"
    held = module.__dict__.get("forward")
    if held is None or isinstance(held, Ours) or "_hf_hook" in module.__dict__ or hasattr(held, "blocks"):
        return None
    return f"its forward was replaced by {getattr(held, '__qualname__', type(held).__qualname__)}"


def _itemsize(base: nn.Linear) -> int:
    weight = base.weight
    if weight.dtype.is_floating_point and not hasattr(weight, "quant_state"):
        return weight.dtype.itemsize
    return (getattr(base, "compute_dtype", None) or torch.float32).itemsize


# ---- the probe


def _hidden(forward: Callable[..., Any], module: nn.Module, sizes: dict[str, tuple[int, int]]) -> int | None:
    """The width of the input for which the forward maps rows to rows; None where there is none."""
    small = _small_widths(sizes)
    linears = {
        name: _small_linear(small[k], small[n], seed=i) for i, (name, (k, n)) in enumerate(sizes.items())
    }
    for hidden in dict.fromkeys(k for k, _ in sizes.values()):
        x = (
            _random(_ROWS, small[hidden], seed=99)
            * torch.tensor(_SCALES, dtype=torch.float64, device="cpu")[:, None]
        )
        if _by_rows(lambda rows: _run(forward, module, linears, rows), x):
            return hidden
    return None


def _by_rows(call: Callable[[Tensor], Tensor | None], x: Tensor) -> bool:
    """Whether each row's result depends on it alone, in batches of any shape."""
    whole = call(x[None])
    if whole is None or whole.shape[:-1] != (1, _ROWS):
        return False
    whole = whole[0]
    single = [call(x[None, i : i + 1]) for i in range(_ROWS)]
    parts = [call(x[None, :2]), call(x[None, 2:])]
    if any(part is None for part in (*single, *parts)):
        return False
    return all(_close(torch.cat([part[0] for part in found]), whole) for found in (single, parts))


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


def _small_widths(sizes: dict[str, tuple[int, int]]) -> dict[int, int]:
    """A small number for each width, so that what is twice another stays so."""
    small: dict[int, int] = {}
    for place, width in enumerate(sorted({w for pair in sizes.values() for w in pair})):
        half = small.get(width // 2) if width % 2 == 0 else None
        small[width] = 4 + 3 * place if half is None else 2 * half
    return small


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _small_linear(k: int, n: int, *, seed: int) -> nn.Linear:
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(_random(n, k, seed=seed), requires_grad=False)
    return linear


def _run(
    forward: Callable[..., Any], module: nn.Module, linears: dict[str, nn.Linear], x: Tensor
) -> Tensor | None:
    """What the forward gives in evaluation with these linears as its own; None where it gives no
    tensor."""
    stub = types.SimpleNamespace(**{n: v for n, v in vars(module).items() if not n.startswith("_")})
    stub.training = False
    for name, child in module.named_children():
        dropout = isinstance(child, nn.modules.dropout._DropoutNd)
        setattr(stub, name, nn.Identity() if dropout else child)
    for name, linear in linears.items():
        setattr(stub, name, linear)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = forward(stub, x)
    except Exception:  # whatever it wants that a stub has not: it is no MLP of this form
        return None
    return result if isinstance(result, Tensor) else None
