"""How activations flow through a model: one forward on a tiny input, in which every tensor's origin is
followed.

Linears are stood in for by constants of the right shape, so that nothing is decoded, repacked or
multiplied; patched modules run their stock forwards. What comes of it is the list of residual additions a +
s, where s was computed from a through at least one linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...patching.forwards import find

__all__ = ["Call", "LinearCall", "Node", "ResidualSum", "Trace", "trace"]

# Operators whose result is the same activation in another form or dtype.
_ALIASES = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "alias",
    "detach",
    "_to_copy",
    "clone",
    "unsqueeze",
    "squeeze",
    "transpose",
}
_ALIASES |= {"permute", "t", "expand", "lift_fresh"}
# Operators after which an activation is still the one that a module gave, scaled: the adapter may act before
# them.
_SCALINGS = {"mul", "div", "native_dropout", "dropout"}
_PRODUCTS = {"mm", "addmm", "linear", "bmm", "baddbmm", "matmul", "convolution", "_grouped_mm", "einsum"}
_FILL = 0.5  # what a stand-in gives: finite through any norm or softmax


class Node:
    """One activation.

    uid: its number; ancestors: uids of what it was computed from since the last residual addition; depth:
    how many linears lie in between; mixes: whether tokens were mixed in between; leaves: the summands that
    it is a plain sum of; source: the activation that it is a scaled copy of, or None; calls: the module
    calls that gave it, innermost first; bases: what a residual addition also counts as.
    """

    __slots__ = ("uid", "ancestors", "depth", "mixes", "leaves", "source", "calls", "bases", "shape")

    def __init__(self, uid: int, shape: torch.Size) -> None:
        self.uid, self.shape = uid, shape
        self.ancestors: frozenset[int] = frozenset()
        self.depth, self.mixes = 0, False
        self.leaves: tuple[Node, ...] = (self,)
        self.source: Node | None = None
        self.calls: list[Call] = []
        self.bases: frozenset[int] = frozenset((uid,))


class Call:
    """A module that was called: its path, the argument that each activation was (by position or keyword),
    what it gave (a tensor, or a tuple whose first element it is), and the activations that went in."""

    __slots__ = ("path", "module", "inputs", "as_tuple")

    def __init__(self, path: str, module: nn.Module, inputs: dict[int | str, Node], as_tuple: bool) -> None:
        self.path, self.module, self.inputs, self.as_tuple = path, module, inputs, as_tuple


class LinearCall:
    """A product with a weight: what went in, what came out, and the path of the module that computed it."""

    __slots__ = ("before", "after", "path")

    def __init__(self, before: Node, after: Node, path: str) -> None:
        self.before, self.after, self.path = before, after, path


class ResidualSum:
    """a + s: the stream, what is added, and the result."""

    __slots__ = ("stream", "added", "result")

    def __init__(self, stream: Node, added: Node, result: Node) -> None:
        self.stream, self.added, self.result = stream, added, result


class Trace(TorchDispatchMode):
    """Follows activations; `sums`, `linears` and `calls` are in the order in which they happened."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[int, Node] = {}
        self.alive: list[Tensor] = []  # no id is used twice
        self.sums: list[ResidualSum] = []
        self.linears: list[LinearCall] = []
        self.calls: list[Call] = []
        self.running: list[str] = [""]  # paths of the modules that have not yet returned
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = [self.node(t) for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        known = [node for node in inputs if node is not None]
        if known:
            name = func._schema.name.rpartition("::")[2]
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.is_floating_point():
                    self._follow(name if name.startswith("_") else name.rstrip("_"), known, t)
        return out

    def node(self, t: Tensor) -> Node | None:
        """What is known of a tensor; None of weights, masks and indices."""
        return self.nodes.get(id(t))

    def begin(self, t: Tensor) -> Node:
        """An activation that comes from nothing that was followed."""
        self._count += 1
        node = self._hold(t, Node(self._count, t.shape))
        return node

    def stand_in(self, x: Tensor, y: Tensor) -> None:
        """y is what a linear gave for x."""
        before = self.node(x) or self.begin(x)
        self._product(before, y)

    def called(self, call: Call, out: Tensor) -> None:
        """A module has returned."""
        node = self.node(out)
        if node is None and out.is_floating_point():
            node = self.begin(out)
        if node is not None:
            node.calls.append(call)
            self.calls.append(call)

    def _hold(self, t: Tensor, node: Node) -> Node:
        self.nodes[id(t)] = node
        self.alive.append(t)
        return node

    def _follow(self, name: str, known: list[Node], t: Tensor) -> None:
        first = known[0]
        if name in _ALIASES and len(known) == 1 and t.numel() == first.shape.numel():
            self._hold(t, first)
        elif name == "add" and len(known) == 2:
            self._sum(*known, t)
        elif name in _PRODUCTS and len(known) == 1:
            self._product(first, t)
        else:
            node = self._derived(known, t)
            node.mixes |= (name in _PRODUCTS and len(known) > 1) or "attention" in name or "flash" in name
            if name in _SCALINGS and len(known) == 1 and t.shape == first.shape:
                node.source = first

    def _derived(self, known: list[Node], t: Tensor) -> Node:
        node = self.begin(t)
        node.ancestors = frozenset().union(*(one.ancestors | one.bases for one in known))
        node.depth = max(one.depth for one in known)
        node.mixes = any(one.mixes for one in known)
        return node

    def _product(self, before: Node, t: Tensor) -> None:
        after = self._derived([before], t)
        after.depth += 1
        self.linears.append(LinearCall(before, after, self.running[-1]))

    def _sum(self, one: Node, other: Node, t: Tensor) -> None:
        for stream, added in ((one, other), (other, one)):
            alike = stream.shape.numel() == added.shape.numel()
            if alike and added.depth > stream.depth and stream.bases & added.ancestors:
                result = self.begin(t)
                result.bases |= stream.bases if len(stream.bases) == 1 else frozenset((stream.uid,))
                self.sums.append(ResidualSum(stream, added, result))
                return
        node = self._derived([one, other], t)
        if one.depth and other.depth and one.shape == other.shape:
            node.leaves = one.leaves + other.leaves


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """What happens in `model(**inputs)`; the model is left as it was, and its random state too."""
    seen = Trace()
    for t in tree_leaves(dict(inputs)):
        if isinstance(t, Tensor) and t.is_floating_point():
            seen.begin(t)
    with _stood_in(model, seen), _watched(model, seen), torch.no_grad(), torch.random.fork_rng(), seen:
        model(**inputs)
    return seen


@contextlib.contextmanager
def _watched(model: nn.Module, seen: Trace) -> Iterator[None]:
    """Every module tells what it was given and what it gave."""
    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: seen.running.append(path)))
            handles.append(module.register_forward_hook(_hook(path, seen), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(path: str, seen: Trace) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        seen.running.pop()
        as_tuple = isinstance(out, tuple) and bool(out)
        first = out[0] if as_tuple else out
        if isinstance(first, Tensor):
            given = [*enumerate(args), *kwargs.items()]
            inputs = {
                key: node for key, t in given if isinstance(t, Tensor) and (node := seen.node(t)) is not None
            }
            seen.called(Call(path, module, inputs, as_tuple), first)

    return hook


@contextlib.contextmanager
def _stood_in(model: nn.Module, seen: Trace) -> Iterator[None]:
    """In evaluation, linears give constants and patched modules run their stock forwards."""
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    inside: set[int] = set()
    try:
        for module in model.modules():
            own = module.__dict__
            held.append(
                (own, {key: own[key] for key in ("forward", "_old_forward", "training") if key in own})
            )
            own["training"] = False
            width = None if id(module) in inside else _width(module)
            if width is not None:
                inside |= {id(child) for child in module.modules()}
                own["forward"] = _constant(width, seen)
            elif (patched := find(module)) is not None:
                own[patched[0]] = patched[1].bound()
        yield
    finally:
        for own, before in held:
            for key in ("forward", "_old_forward"):
                own.pop(key, None)
            own.update(before)


def _width(module: nn.Module) -> int | None:
    """What a linear gives an activation's last dimension; None for other modules."""
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        return module.out_features
    weight, nf = getattr(module, "weight", None), getattr(module, "nf", None)
    if isinstance(nf, int) and isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == nf:
        return nf  # transformers' Conv1D
    return None


def _constant(width: int, seen: Trace) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = x.new_full((*x.shape[:-1], width), _FILL)
        seen.stand_in(x, y)
        return y

    return forward
