"""Gated MLPs: where a module's forward turns out to be down(act(gate(x)) * up(x)), it runs as one function."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..ops.qlora_glu import halves
from .decode import Ready
from .detect import excluded
from .forwards import Forward, _autocast_off, _PlannedForward, _served, find, has_hooks, install

__all__ = ["GatedMLPForward", "PackedMLPForward", "install_mlps"]

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
_WIDTH = 5  # of the probe's gate and up; it has 4 inputs and outputs


class GatedMLPForward(Forward):
    """gate_proj, up_proj, act_fn and down_proj as one call; stock where one of them cannot take part. `cache`: what the probe found."""

    __slots__ = ()
    children = ("gate_proj", "up_proj", "down_proj")
    function = "gated_mlp"

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not args and not kwargs and _served(x)
        y = self._few_rows(x) if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        if y is not None:
            return y
        plans = self._plans(x) if plain else None
        if plans is None:
            return self.stock(x, *args, **kwargs)
        with _autocast_off(x):
            members = [plan.member for plan in plans]
            return plans[-1].cast(getattr(functional, self.function)(x.to(plans[0].compute), *members, **self.cache))

    def _linears(self) -> list[_PlannedForward] | None:
        """The forwards of the children; None where one of them is not ours or is watched."""
        layers = [self.module._modules[child] for child in self.children]
        held = [find(layer) for layer in layers]
        if any(has_hooks(layer) for layer in layers) or not all(item and isinstance(item[1], _PlannedForward) for item in held):
            return None
        return [item[1] for item in held]

    def _few_rows(self, x: Tensor) -> Tensor | None:
        """With what an earlier call prepared; None where that does not serve."""
        linears = self._linears()
        if linears is None:
            return None
        ready = self.ready
        if ready is None or ready[0].linears != linears[:-1] or ready[1].linears != linears[-1:]:
            self.ready = ready = Ready(linears[:-1]), Ready(linears[-1:])
        inner, outer = ready
        hidden = inner(x)
        if hidden is None:
            return None
        gate, up = halves(hidden, self.cache.get("gate_first", True))
        parts = outer(functional.glu(gate, up, activation=self.cache["activation"]))
        return None if parts is None else parts[0]

    def _plans(self, x: Tensor) -> list | None:
        linears = self._linears()
        if linears is None:
            return None
        inner = [linear.plan(x) for linear in linears[:-1]]
        if any(plan is None or plan.compute != inner[0].compute or plan.result != plan.compute for plan in inner):
            return None
        compute = inner[0].compute
        down = linears[-1].plan(x.new_empty((1,)).to(compute).expand(*x.shape[:-1], linears[-1].module.in_features))
        return [*inner, down] if down is not None and down.compute == compute else None

    @staticmethod
    def products(gate: Tensor, up: Tensor) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The weights of the inner children of a probe, in every order they may have, with the options that say so."""
        return [({}, [gate, up])]


class PackedMLPForward(GatedMLPForward):
    """gate_up_proj, whose output's halves are gate and up, and down_proj."""

    __slots__ = ()
    children = ("gate_up_proj", "down_proj")
    function = "gated_mlp_packed"

    @staticmethod
    def products(gate: Tensor, up: Tensor) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return [({"gate_first": True}, [torch.cat([gate, up])]), ({"gate_first": False}, [torch.cat([up, gate])])]


def install_mlps(model: nn.Module, exclude: tuple[str, ...]) -> list[tuple[str, str, str | None]]:
    """Patch every module with the children of a known layout whose forward is a gated MLP; its name, what it runs, and None or why not."""
    found = []
    for name, module in model.named_modules():
        kind = next((kind for kind in (GatedMLPForward, PackedMLPForward) if _held(module, kind)), None)
        if kind is None or excluded(name, exclude):
            continue
        options = _probe(module, kind)
        if options is not None:
            install(module, kind, options)
        why = "its forward is not down(act(gate(x)) * up(x)) of a known activation" if options is None else None
        found.append((name, kind.function if options is not None else "stock", why))
    return found


def _held(module: nn.Module, kind: type[GatedMLPForward]) -> bool:
    layers = [getattr(module, child, None) for child in kind.children]
    held = [find(layer) if isinstance(layer, nn.Module) else None for layer in layers]
    return all(item and isinstance(item[1], _PlannedForward) for item in held)


def _probe(module: nn.Module, kind: type[GatedMLPForward]) -> dict[str, Any] | None:
    """The options with which the class's forward is `kind`'s function, on small random linears in fp64; None where it is not."""
    if has_hooks(module) or ("forward" in module.__dict__ and find(module) is None):
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in ((3, 4), (_WIDTH, 4), (_WIDTH, 4), (4, _WIDTH))
    )
    for options, weights in kind.products(gate, up):
        got = _forward(module, dict(zip(kind.children, (*weights, down), strict=True)), x)
        for name, act in _ACTIVATIONS.items():
            expected = (act(x @ gate.t()) * (x @ up.t())) @ down.t()
            if got is not None and got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-12, atol=1e-12):
                return {"activation": name, **options}
    return None


def _forward(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """What the class's forward gives with these weights in place of its linears; None where it gives no tensor."""
    stub = types.SimpleNamespace(**{name: value for name, value in vars(module).items() if not name.startswith("_")})
    for name, weight in weights.items():
        setattr(stub, name, lambda value, weight=weight: value @ weight.t())
    for name, child in module.named_children():
        if name not in weights:
            setattr(stub, name, child)
    try:
        with torch.no_grad():
            got = type(module).forward(stub, x)
    except Exception:  # whatever the forward wants that the stub has not: it is no plain gated MLP
        return None
    return got if isinstance(got, Tensor) else None
