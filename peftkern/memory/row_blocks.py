"""A module that maps rows to rows, run a tile of rows at a time in both directions, as one function of
autograd.

Forward keeps the module's input and nothing else; backward computes one tile after the other again and takes
its gradients at once. The output's place in the graph is taken before its values are computed: a checkpointed
layer, when it is computed again in backward, stops at the last tensor that it has to save, which is the
module's input where nothing behind the module saves anything. The tiles then run twice in all, as under plain
checkpointing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.autograd.function import once_differentiable

from .tiles import ROWS

__all__ = ["RowBlocks", "equal_tiles"]


def equal_tiles(rows: int, most: int) -> list[tuple[int, int]]:
    """Begin and end of tiles of at most `most` rows, alike in size so that none is a small rest; of multiples
    of 64 rows where `most` is one."""
    count = -(-rows // most)
    size = -(-rows // count)
    size = -(-size // ROWS) * ROWS if most % ROWS == 0 else size
    return [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


class RowBlocks:
    """Calls of one module in tiles of its rows.

    Args:
        module: whose parameters are trained; its result for a row depends on that row alone.
        call: what computes it, `module`'s own forward say.
        tile: the most rows at a time.
    """

    __slots__ = ("module", "call", "tile", "results")

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Tensor], tile: int) -> None:
        self.module, self.call, self.tile = module, call, tile
        # The output's width and dtype, by the input's dtype and autocast's state.
        self.results: dict[Any, tuple[int, torch.dtype]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], as the module itself would give it."""
        owners = _trainable(self.module) if torch.is_grad_enabled() else []
        grad = bool(owners) or (torch.is_grad_enabled() and x.requires_grad)
        rows = x.numel() // x.shape[-1]
        if not grad and rows <= self.tile:
            return self.call(x)
        flat = x.reshape(rows, x.shape[-1])
        out = None
        while out is None:
            out = self._run(flat, x.dim() - 2, owners, grad)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _run(self, flat: Tensor, leading: int, owners: list[_Owner], grad: bool) -> Tensor | None:
        """The output, or None where the module gave another width or dtype than it did before: once more
        then."""
        run = _Run(self, flat, leading, owners)
        first = None
        if run.key not in self.results:
            first = run.tile(flat, 0, grad)
            self.results[run.key] = first.shape[1], first.dtype
        width, dtype = self.results[run.key]
        if grad:
            parameters = [owner._parameters[name] for owner, name in owners]
            out = _InTiles.apply(run, width, dtype, flat, *parameters)
        else:
            out = flat.new_empty((len(flat), width), dtype=dtype)
        if not run.fill(flat, out.detach(), first, grad):
            del self.results[run.key]
            return None
        return out


_Owner = tuple[nn.Module, str]


def _trainable(module: nn.Module) -> list[_Owner]:
    """The parameters that are trained, by the module that holds each and its name there; each once."""
    found: dict[int, _Owner] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                found.setdefault(id(parameter), (owner, name))
    return list(found.values())


class _InTiles(torch.autograd.Function):
    """The module's place in the graph. Its output's values are filled in afterwards."""

    @staticmethod
    def forward(ctx, run, width, dtype, x, *parameters):
        ctx.save_for_backward(x)
        ctx.run, ctx.versions = run, [parameter._version for parameter in parameters]
        return x.new_empty((len(x), width), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return None, None, None, *ctx.run.gradients(x, dy, ctx.versions, ctx.needs_input_grad[3:])


class _Run:
    """One call: what its backward pass has to find as its forward pass did.

    key: the input's dtype and autocast's state; casts: the latter, to be entered again. spans: begin and end
    of the tiles. draws: the states of torch's generators before each tile, where the module draws random
    numbers."""

    __slots__ = ("blocks", "owners", "leading", "spans", "casts", "key", "draws")

    def __init__(self, blocks: RowBlocks, flat: Tensor, leading: int, owners: list[_Owner]) -> None:
        self.blocks, self.owners, self.leading = blocks, owners, leading
        self.spans = equal_tiles(len(flat), blocks.tile)
        self.casts = _autocast_states(flat)
        self.key = flat.dtype, *self.casts
        self.draws: list[list[Tensor]] = []

    # ---- forward

    def tile(self, flat: Tensor, index: int, grad: bool) -> Tensor:
        """The output of one tile, on the path that the module takes in training where `grad` says so; nothing
        is saved."""
        begin, end = self.spans[index]
        part, before = flat[begin:end].detach(), None
        if grad and (index == 0 or self.draws):
            before = _generators(flat)
        with self._casting(), torch.set_grad_enabled(grad), graph.saved_tensors_hooks(_nothing, _never):
            y = self._compute(part.requires_grad_(grad and flat.requires_grad)).detach()
        if before is not None and (self.draws or not _same(before, _generators(flat))):
            self.draws.append(before)
        return y

    def fill(self, flat: Tensor, out: Tensor, first: Tensor | None, grad: bool) -> bool:
        """Write the output; False where a tile's width or dtype is not `out`'s. first: the first tile's, if
        it has been computed."""
        for index, (begin, end) in enumerate(self.spans):
            y = self.tile(flat, index, grad) if first is None else first
            first = None
            if y.shape[1] != out.shape[1] or y.dtype != out.dtype:
                return False
            out[begin:end] = y
        return True

    # ---- backward

    def gradients(
        self, x: Tensor, dy: Tensor, versions: list[int], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """dx, and each parameter's gradient, summed over the tiles in fp32 and rounded once."""
        parameters = [owner._parameters[name] for owner, name in self.owners]
        self._check(parameters, versions)
        dx = torch.empty_like(x) if needs[0] else None
        sums: list[Tensor | None] = [None] * len(parameters)
        with _leaves(self.blocks.module, parameters) as leaves, _forked(x, bool(self.draws)):
            for index, (begin, end) in enumerate(self.spans):
                if self.draws:
                    _set_generators(x, self.draws[index])
                part, *found = self._tile_gradients(
                    x[begin:end], dy[begin:end], leaves, dx is not None, index == 0
                )
                if dx is not None:
                    dx[begin:end] = 0 if part is None else part
                for place, gradient in enumerate(found):
                    sums[place] = _added(sums[place], gradient)
                del part, found
        return [dx, *(s if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))]

    def _tile_gradients(
        self, x: Tensor, dy: Tensor, leaves: list[nn.Parameter], need_x: bool, first: bool
    ) -> list[Tensor | None]:
        """Of the tile's input, where it is needed, and of the parameters."""
        x = x.detach().requires_grad_(need_x)
        with self._casting(), torch.enable_grad():
            y = self._compute(x)
        if not y.requires_grad:
            return [None] * (1 + len(leaves))
        if first:
            _check_leaves(y, [x, *leaves], self.blocks.module)
        wanted = [x, *leaves] if need_x else leaves
        found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        return list(found) if need_x else [None, *found]

    def _check(self, parameters: list[Tensor], versions: list[int]) -> None:
        for (_, name), parameter, version in zip(self.owners, parameters, versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"{type(self.blocks.module).__name__}: its parameter {name} {tuple(parameter.shape)} was "
                    f"written to between forward and backward (version {parameter._version}, expected "
                    f"{version}); the tiles would be computed again with other weights. Call backward before "
                    "the optimizer's step"
                )

    # ---- both

    def _compute(self, part: Tensor) -> Tensor:
        """[rows, K] -> [rows, N], with as many dimensions around it as the module's input had."""
        y = self.blocks.call(part.view(*(1,) * self.leading, *part.shape))
        return y.reshape(len(part), y.shape[-1])

    @contextlib.contextmanager
    def _casting(self) -> Iterator[None]:
        """autocast as it was in forward, without its cache of cast weights: that of a tile would outlive
        it."""
        with contextlib.ExitStack() as stack:
            for device, enabled, dtype in self.casts:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def _nothing(_: Tensor) -> None:
    """In place of what a graph that nobody will use would save."""


def _never(_: None) -> Tensor:
    raise AssertionError("the graph of a tile's forward pass was kept")


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return total
    if total is None:
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        return gradient.to(wide, copy=True)
    return total.add_(gradient)


@contextlib.contextmanager
def _leaves(module: nn.Module, held: list[Tensor]) -> Iterator[list[nn.Parameter]]:
    """Leaves that share the parameters' memory, in their place: hooks on the parameters fire for the sum of
    the tiles' gradients alone, not for each tile."""
    leaves = [nn.Parameter(parameter.detach()) for parameter in held]
    by_id = dict(zip(map(id, held), leaves, strict=True))
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if id(p) in by_id
    ]
    try:
        for owner, name, parameter in places:
            owner._parameters[name] = by_id[id(parameter)]
        yield leaves
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def _check_leaves(y: Tensor, known: list[Tensor], module: nn.Module) -> None:
    """Every trained tensor behind y has to be one whose gradient is taken: another's would be lost without a
    word."""
    leaves, seen, waiting = {id(tensor) for tensor in known}, set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the nodes that gather a leaf's gradient
        if isinstance(variable, Tensor) and id(variable) not in leaves:
            raise RuntimeError(
                f"{type(module).__name__}: its output depends on a trained tensor {tuple(variable.shape)} "
                "that is no parameter of it, whose gradient tiles would lose; leave it out (exclude=)"
            )
        waiting.extend(following for following, _ in node.next_functions)


# ---- the states around a call


def _autocast_states(x: Tensor) -> tuple[tuple[str, bool, torch.dtype], ...]:
    """(device type, whether autocast is enabled, to which dtype) of x's device and of the CPU."""
    devices = dict.fromkeys((x.device.type, "cpu"))
    kinds = [kind for kind in devices if torch.amp.is_autocast_available(kind)]
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _device_generators(x: Tensor) -> Any:
    """The module of torch with x's device's generators, None for the CPU and for devices that are not
    there."""
    if x.device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(x.device.type)
    return module if module.is_available() else None


def _generators(x: Tensor) -> list[Tensor]:
    """The states of torch's generators, of the CPU and of x's device: they are on the CPU, no device is
    waited for."""
    device = _device_generators(x)
    return [torch.get_rng_state(), *([] if device is None else [device.get_rng_state(x.device)])]


def _set_generators(x: Tensor, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        _device_generators(x).set_rng_state(states[1], x.device)


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """By their bytes, which also fake-tensor modes leave alone."""
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def _forked(x: Tensor, draws: bool) -> Iterator[None]:
    """What is drawn inside leaves torch's generators as they were."""
    states = _generators(x) if draws else None
    try:
        yield
    finally:
        if states is not None:
            _set_generators(x, states)
