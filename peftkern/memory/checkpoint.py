"""Non-reentrant checkpointing of decoder layers, whose inputs are kept in a store.

Only a layer's first input, the hidden states, goes to the store. What all layers share (masks, rotary
tables) stays where it is, once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .store import Checkpoint, CheckpointStore, StorePass

__all__ = ["LayerCheckpointing", "checkpoint_layers", "stacks_of"]

_ABSENT = object()
_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def checkpoint_layers(
    model: nn.Module,
    *,
    store: CheckpointStore,
    layers: Sequence[nn.Module] | None = None,
    preserve_rng_state: bool = True,
) -> LayerCheckpointing:
    """Recompute each decoder layer in backward from its input, which `store` keeps until then.

    The gradients are bit for bit those without checkpointing, dropout included. In evaluation and
    without gradients a layer runs as before; torch.compile gets torch's own checkpointing, without the store.
    Nothing but instances is changed, and `remove` undoes it.

    Against transformers' own `gradient_checkpointing_enable`, which trainers call when they begin, this one
    wins: whoever asks for it gets this, for every layer, whatever its `use_reentrant`, `every_n_layers` and
    `offload` say. `gradient_checkpointing_disable` switches it off.

    Args:
        model: a model of transformers, with or without PEFT and `peftkern.patch` (in any order), or any
            module.
        layers: which modules, in the order in which they run; default: every layer that transformers can
            checkpoint. Each takes its hidden states [..., tokens, width] first, or by the name of its first
            parameter.
        preserve_rng_state: recompute with the random numbers of the forward. False spares some microseconds
            a layer where nothing draws any.
    Returns: a handle with `remove`; also a context manager.
    Raises: ValueError where there is no layer to checkpoint.

    The input of the first layer need not require grad: non-reentrant checkpointing finds the adapters
    inside. With `enable_input_require_grads` it does, and its gradient is computed.
    """
    stacks = [list(layers)] if layers is not None else stacks_of(model)
    if not stacks or not all(stacks):
        raise ValueError(
            f"model: {type(model).__name__} has no layers that transformers can checkpoint; pass `layers`,"
            " the modules to be checkpointed in the order in which they run"
        )
    return LayerCheckpointing(model, stacks, store, preserve_rng_state)


def stacks_of(model: nn.Module) -> list[list[nn.Module]]:
    """The stacks of layers in the model that transformers can checkpoint: each ModuleList that consists of
    them."""
    kind = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    if kind is None:
        return []
    lists = (list(module) for module in model.modules() if isinstance(module, nn.ModuleList))
    return [layers for layers in lists if layers and all(isinstance(layer, kind) for layer in layers)]


class LayerCheckpointing:
    """What `checkpoint_layers` did to a model; `remove`, or the end of a `with` block, undoes it."""

    def __init__(
        self,
        model: nn.Module,
        stacks: list[list[nn.Module]],
        store: CheckpointStore,
        preserve_rng_state: bool,
    ) -> None:
        self.store = store
        self._sites: list[_Site] = []
        for layers in stacks:
            stack = _Stack(store, len(layers), preserve_rng_state)
            self._sites += [_site(layer, stack, index) for index, layer in enumerate(layers)]
        owners = [_owners(model, layers[0]) for layers in stacks]
        flagged = {
            id(owner): owner for around in owners for owner in around if hasattr(owner, _FLAG)
        }.values()
        self._flags = [(owner, _held(owner, _FLAG)) for owner in flagged]
        for owner in flagged:  # transformers makes no cache in a module that says so
            owner.gradient_checkpointing = True
        self._hooks = [
            around[-1].register_forward_pre_hook(_Guard(self._sites)) for around in owners if around
        ]

    def remove(self) -> None:
        """Give every layer back what it had, or what transformers has been asked for since."""
        for site in self._sites:
            site.remove()
        for owner, before in self._flags:
            _restore(owner, _FLAG, before)
        for hook in self._hooks:
            hook.remove()
        self._sites, self._flags, self._hooks = [], [], []

    def __enter__(self) -> LayerCheckpointing:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Guard:
    """Before a forward: where transformers' checkpointing was switched on since, ours takes its place again.
    A copy of the model gets no guard."""

    def __init__(self, sites: list[_Site]) -> None:
        self.sites = sites

    def __call__(self, *_: Any) -> None:
        if any([site.reclaim() for site in self.sites]):
            for site in self.sites:
                site.switch_on()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, ([],)


class _Stack:
    """Layers that run one after the other; `run` is the forward that they are in."""

    def __init__(self, store: CheckpointStore, layers: int, preserve_rng_state: bool) -> None:
        self.store, self.layers, self.preserve_rng_state = store, layers, preserve_rng_state
        self._pass: StorePass | None = None
        self._at = layers

    def put(self, tensor: Tensor, index: int) -> Checkpoint | Tensor:
        if index <= self._at or self._pass is None:
            self._pass = self.store.begin(self.layers)
        self._at = index
        return self._pass.put(tensor, index)

    def run(
        self, index: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """function(*args, **kwargs), checkpointed; its first argument goes to the store."""
        plain = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=self.preserve_rng_state)
        if not args or not isinstance(args[0], Tensor) or torch.compiler.is_compiling():
            return plain(function, *args, **kwargs)
        address, shape = args[0].data_ptr(), args[0].shape

        def pack(tensor: Tensor) -> Checkpoint | Tensor:
            same = tensor.data_ptr() == address and tensor.shape == shape
            return self.put(tensor, index) if same else tensor

        with saved_tensors_hooks(
            pack, _unpack
        ):  # of `checkpoint`'s own inputs: inside it has hooks of its own
            return plain(function, *args, **kwargs)


def _unpack(packed: Checkpoint | Tensor) -> Tensor:
    return packed.get() if isinstance(packed, Checkpoint) else packed


# ---- where it is put


class _Site:
    """One layer's place in its stack."""

    def __init__(self, layer: nn.Module, stack: _Stack, index: int) -> None:
        self.layer, self.stack, self.index = layer, stack, index

    def reclaim(self) -> bool:
        """Take the place again that something else has taken; whether it had."""
        return False

    def switch_on(self) -> None:
        """Checkpoint this layer."""

    def remove(self) -> None:
        """Give the layer back what it had."""
        raise NotImplementedError


class _TransformersSite(_Site):
    """A layer whose class asks `_gradient_checkpointing_func`, an attribute of the instance, to run its
    forward."""

    def __init__(self, layer: nn.Module, stack: _Stack, index: int) -> None:
        super().__init__(layer, stack, index)
        self.function = _Function(stack, index)
        self.before = {name: _held(layer, name) for name in (_FLAG, _FUNCTION)}
        self.switch_on()

    def switch_on(self) -> None:
        self.layer.gradient_checkpointing = True
        self.layer._gradient_checkpointing_func = self.function

    def reclaim(self) -> bool:
        if self.layer._gradient_checkpointing_func is self.function:
            return False
        self.before = {name: _held(self.layer, name) for name in (_FLAG, _FUNCTION)}
        self.layer._gradient_checkpointing_func = self.function
        return self.layer.gradient_checkpointing is True

    def remove(self) -> None:
        if self.layer._gradient_checkpointing_func is self.function:
            _restore(self.layer, _FUNCTION, self.before[_FUNCTION])
            _restore(self.layer, _FLAG, self.before[_FLAG])


class _Function:
    """What stands as a layer's `_gradient_checkpointing_func`. A copy of the model gets transformers' own."""

    keywords = {"use_reentrant": False}  # as of a partial: what tells others that it is not reentrant

    def __init__(self, stack: _Stack, index: int) -> None:
        self.stack, self.index = stack, index

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not args and isinstance(function, functools.partial):
            function, args = _with_first(function)
        return self.stack.run(self.index, function, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (checkpoint,), (checkpoint, (), {"use_reentrant": False}, None)


def _with_first(function: functools.partial[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """partial(forward, layer, hidden_states=h, ...) as partial(forward, layer, ...) and (h,)."""
    keywords = dict(function.keywords)
    name = "hidden_states" if "hidden_states" in keywords else next(iter(keywords), None)
    if name is None or not isinstance(keywords[name], Tensor):
        return function, ()
    hidden = keywords.pop(name)
    return functools.partial(_named, function.func, function.args, name, keywords), (hidden,)


def _named(
    forward: Callable[..., Any], args: tuple[Any, ...], name: str, keywords: dict[str, Any], value: Tensor
) -> Any:
    return forward(*args, **{name: value}, **keywords)


class _ForwardSite(_Site):
    """Any other layer: its instance gets a forward that checkpoints the one it had."""

    def __init__(self, layer: nn.Module, stack: _Stack, index: int) -> None:
        super().__init__(layer, stack, index)
        self.before = layer.__dict__.get("forward", _ABSENT)
        self.forward = self._forward
        layer.forward = self.forward

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        run = type(self.layer).forward.__get__(self.layer) if self.before is _ABSENT else self.before
        return run(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled() and args and isinstance(args[0], Tensor)):
            return self._inner(*args, **kwargs)
        return self.stack.run(self.index, functools.partial(self._inner, **kwargs), args, {})

    def remove(self) -> None:
        if self.layer.__dict__.get("forward") is self.forward:
            _restore(self.layer, "forward", self.before)


def _site(layer: nn.Module, stack: _Stack, index: int) -> _Site:
    kind = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    ours = kind is not None and isinstance(layer, kind)
    return (_TransformersSite if ours else _ForwardSite)(layer, stack, index)


def _owners(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules around a layer from the outermost on, but lists, which are never called."""
    around = [
        module
        for module in model.modules()
        if module is not layer and any(m is layer for m in module.modules())
    ]
    return [module for module in around if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]


def _held(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, _ABSENT)


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if value is not _ABSENT:
        setattr(module, name, value)
    elif name in module.__dict__:
        delattr(module, name)
