"""Gated MLPs: where a module's forward turns out to be down(act(gate(x)) * up(x)), it runs as one function."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .detect import excluded
from .forwards import Forward, _autocast_off, _PlannedForward, _served, find, has_hooks, install

__all__ = ["GatedMLPForward", "install_mlps"]

_CHILDREN = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class GatedMLPForward(Forward):
    """gate_proj, up_proj, act_fn and down_proj as one call; stock where one of them cannot take part. `cache`: the activation."""

    __slots__ = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plans = None if args or kwargs or not _served(x) else self._plans(x)
        if plans is None:
            return self.stock(x, *args, **kwargs)
        gate, up, down = plans
        with _autocast_off(x):
            return down.cast(functional.gated_mlp(x.to(gate.compute), gate.member, up.member, down.member, activation=self.cache))

    def _plans(self, x: Tensor) -> tuple | None:
        layers = [getattr(self.module, child) for child in _CHILDREN]
        held = [find(layer) for layer in layers]
        if any(has_hooks(layer) for layer in layers) or not all(item and isinstance(item[1], _PlannedForward) for item in held):
            return None
        gate, up = (item[1].plan(x) for item in held[:2])
        if gate is None or up is None or gate.compute != up.compute or not (gate.result == up.result == gate.compute):
            return None
        rows = x.new_empty((1,)).to(gate.compute).expand(*x.shape[:-1], layers[0].out_features)
        down = held[2][1].plan(rows)
        return (gate, up, down) if down is not None and down.compute == gate.compute else None


def install_mlps(model: nn.Module, exclude: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Patch every module with these three children whose forward is a gated MLP; its name, and None or why not."""
    found = []
    for name, module in model.named_modules():
        layers = [getattr(module, child, None) for child in _CHILDREN]
        held = [find(layer) if isinstance(layer, nn.Module) else None for layer in layers]
        if not all(item and isinstance(item[1], _PlannedForward) for item in held) or excluded(name, exclude):
            continue
        activation = _activation(module)
        if activation:
            install(module, GatedMLPForward, activation)
        found.append((name, None if activation else "its forward is not down(act(gate(x)) * up(x)) of a known activation"))
    return found


def _activation(module: nn.Module) -> str | None:
    """The activation with which the class's forward computes a gated MLP of three small random linears, in fp64; None where none does."""
    if has_hooks(module) or ("forward" in module.__dict__ and find(module) is None):
        return None
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, 4), (4, 5)))
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    stub = types.SimpleNamespace(**{name: value for name, value in vars(module).items() if not name.startswith("_")})
    for name, weight in zip(_CHILDREN, (gate, up, down), strict=True):
        setattr(stub, name, lambda value, weight=weight: value @ weight.t())
    for name, child in module.named_children():
        if name not in _CHILDREN:
            setattr(stub, name, child)
    try:
        with torch.no_grad():
            got = type(module).forward(stub, x)
    except Exception:  # whatever the forward wants that the stub has not: it is no plain gated MLP
        return None
    for name, act in _ACTIVATIONS.items():
        expected = (act(x @ gate.t()) * (x @ up.t())) @ down.t()
        if isinstance(got, Tensor) and got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-12, atol=1e-12):
            return name
    return None
