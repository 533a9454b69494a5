"""Gated MLPs: where a module's forward turns out to be down(act(gate(x)) * up(x)), it runs as one
function."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..ops import autocast_off, served
from ..ops.linear.glu import halves
from .blocks import replacement
from .decode import Ready, signed
from .hooks import running
from .linears import PlannedForward
from .reads import Reads, RecognizedForward, reads
from .report import block_row
from .rewrite import Context, Finding, Rewrite
from .wrappers import UNKNOWN, innermost

__all__ = ["GatedMLPForward", "GatedMLPs", "PackedMLPForward"]

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
_WIDTH = 5  # of the probe's gate and up; it has 4 inputs and outputs
_SCALES = (1.0, 30.0, 1e4)  # of the probe's rows: a limit of 7 or 10 on gate or up must show
_OTHER = "its forward is not down(act(gate(x)) * up(x)) of a known activation"


class GatedMLPForward(RecognizedForward):
    """gate_proj, up_proj, act_fn and down_proj as one call; stock where one of them cannot take part.
    `cache`: what the probe found."""

    __slots__ = ("prepared",)
    children = ("gate_proj", "up_proj", "down_proj")
    function, members = "gated_mlp", ("gate", "up")

    def build(self) -> None:
        self.let_go()
        super().build()

    def let_go(self) -> None:
        # prepared: for which signature, and the call; replaced together, as threads share them
        self.prepared, self.ready = (None, None), None

    def inside(self, stock: types.FunctionType) -> Callable[..., Any]:
        """`stock` as one call."""

        def forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            y = self._fused(x) if not args and not kwargs and served(x) else None
            return stock(module, x, *args, **kwargs) if y is None else y

        return forward

    def look(self) -> tuple[dict[str, Any] | None, Reads | str]:
        options, seen = _recognized(self.module, type(self))
        return (None if isinstance(options, str) else options), seen

    def _fused(self, x: Tensor) -> Tensor | None:
        """The whole block; None where only the stock forward can run it."""
        linears = self._linears()
        options = None if linears is None else self.now()
        if options is None:
            return None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = self._few_rows(x, linears, options)
            if y is not None:
                return y
        call = self.prepared_call(x, linears, options)
        if call is not None:
            return call(x)
        plans = self._plans(x, linears)
        if plans is None:
            return None
        with autocast_off(x):
            members = [plan.member for plan in plans]
            return plans[-1].cast(
                getattr(functional, self.function)(x.to(plans[0].compute), *members, **options)
            )

    def _linears(self) -> list[PlannedForward] | None:
        """The forwards of the children; None where one of them is not ours, or is watched."""
        modules, found = self.module._modules, []
        for child in self.children:
            layer = modules.get(child)
            forward = None if layer is None else running(layer)
            if not isinstance(forward, PlannedForward):
                return None
            found.append(forward)
        return found

    def _few_rows(self, x: Tensor, linears: list[PlannedForward], options: dict[str, Any]) -> Tensor | None:
        """With what an earlier call prepared; None where that does not serve."""
        ready = self.ready
        if ready is None or ready[0].linears != linears[:-1] or ready[1].linears != linears[-1:]:
            self.ready = ready = Ready(linears[:-1]), Ready(linears[-1:])
        inner, outer = ready
        hidden = inner(x)
        if hidden is None:
            return None
        gate, up = halves(hidden, options.get("gate_first", True))
        parts = outer(functional.glu(gate, up, activation=options["activation"]))
        return None if parts is None else parts[0]

    def prepared_call(
        self, x: Tensor, linears: list[PlannedForward], options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor] | None:
        """The block, checked and described for as long as nothing that it was made of has changed; None where
        that cannot be told cheaply."""
        device = x.device
        if (
            torch.compiler.is_compiling()
            or torch.is_autocast_enabled(device.type)
            or torch.is_autocast_enabled()
        ):
            return None
        signature = signed(linears, x.dtype, x.shape[-1:], device, *options.items())
        if signature is None:
            return None
        known, call = self.prepared
        if signature != known:
            call, plans = None, self._plans(x, linears)
            if plans is not None and all(plan.can_be_held(x) for plan in plans):
                *inner, down = (plan.member for plan in plans)
                named = dict(zip(self.members, inner, strict=True))
                call = functional.mlp.prepared(x, named, down, **options)
            self.prepared = signature, call
        return call

    def _plans(self, x: Tensor, linears: list[PlannedForward]) -> list | None:
        inner = [linear.plan(x) for linear in linears[:-1]]
        if any(
            plan is None or plan.compute != inner[0].compute or plan.result != plan.compute for plan in inner
        ):
            return None
        compute = inner[0].compute
        down = linears[-1].plan(
            x.new_empty((1,)).to(compute).expand(*x.shape[:-1], linears[-1].module.in_features)
        )
        return [*inner, down] if down is not None and down.compute == compute else None

    @staticmethod
    def products(gate: Tensor, up: Tensor) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The weights of the inner children of a probe, in every order they may have, with the options that
        say so."""
        return [({}, [gate, up])]


class PackedMLPForward(GatedMLPForward):
    """gate_up_proj, whose output's halves are gate and up, and down_proj."""

    __slots__ = ()
    children = ("gate_up_proj", "down_proj")
    function, members = "gated_mlp_packed", ("gate_up",)

    @staticmethod
    def products(gate: Tensor, up: Tensor) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return [
            ({"gate_first": True}, [torch.cat([gate, up])]),
            ({"gate_first": False}, [torch.cat([up, gate])]),
        ]


class GatedMLPs(Rewrite):
    """Modules with the children of a known layout whose forward is a gated MLP."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's."""
        kinds = GatedMLPForward, PackedMLPForward
        kind = next((kind for kind in kinds if _has_linears(module, kind, context)), None)
        if kind is None or context.excluded(name):
            return None
        options, seen = _recognized(module, kind)
        if isinstance(options, str):
            return Finding(module, block_row(name, "mlp", kind.function, options))
        return Finding(module, block_row(name, "mlp", kind.function), kind, options, seen)


def _has_linears(module: nn.Module, kind: type[GatedMLPForward], context: Context) -> bool:
    """Whether its children of these names will be ours; what stands around an MLP passes for it."""
    layers = (module._modules.get(child) for child in kind.children)
    return all(context.forward_of(layer, PlannedForward) is not None for layer in layers)


def _recognized(module: nn.Module, kind: type[GatedMLPForward]) -> tuple[dict[str, Any] | str, Reads | str]:
    """The options with which the class's forward is `kind`'s function, or why it is not; and what that
    depends on."""
    reason = replacement(module) or (None if innermost(type(module).forward) else f"its forward {UNKNOWN}")
    seen = reason or reads(module, skip=frozenset(kind.children))
    if isinstance(seen, str):
        return seen, seen
    options = _probe(module, kind)
    return (_OTHER if options is None else options), seen


def _probe(module: nn.Module, kind: type[GatedMLPForward]) -> dict[str, Any] | None:
    """The options with which the forward is `kind`'s function, on small random linears in fp64; None where it
    is not."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for shape in ((len(_SCALES), 4), (_WIDTH, 4), (_WIDTH, 4), (4, _WIDTH))
    )
    x = x * torch.tensor(_SCALES, dtype=torch.float64, device="cpu")[:, None]
    for options, weights in kind.products(gate, up):
        got = _forward(module, dict(zip(kind.children, (*weights, down), strict=True)), x)
        for name, act in _ACTIVATIONS.items():
            expected = (act(x @ gate.t()) * (x @ up.t())) @ down.t()
            if got is not None and got.shape == expected.shape and _close(got, expected):
                return {"activation": name, **options}
    return None


def _close(got: Tensor, expected: Tensor) -> bool:
    """Row by row, in fp64."""
    return bool(((got - expected).abs().amax(-1) <= 1e-12 * (1 + expected.abs().amax(-1))).all())


def _forward(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """What the forward gives with these weights in place of its linears; None where it gives no tensor."""
    stub = types.SimpleNamespace(
        **{name: value for name, value in vars(module).items() if not name.startswith("_")}
    )
    for name, weight in weights.items():
        setattr(stub, name, lambda value, weight=weight: value @ weight.t())
    for name, child in module.named_children():
        if name not in weights:
            setattr(stub, name, child)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            got = innermost(type(module).forward)(stub, x)
    except Exception:  # whatever the forward wants that the stub has not: it is no plain gated MLP
        return None
    return got if isinstance(got, Tensor) else None
