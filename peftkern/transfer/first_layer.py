"""No backward and no activations below a layer: what a run saves that trains the upper layers only.

Frozen layers on an input that needs no gradient record nothing by themselves. Two things break that: hooks
that let the embeddings' output require a gradient (`enable_input_require_grads`, which trainers call for
gradient checkpointing), and checkpointing itself, which keeps the input of each layer and runs it twice. Here
the input of the first layer is detached and the layers below the cut are not checkpointed; where reentrant
checkpointing follows, the first trained layer's input requires a gradient, as it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .depth import LayerStack, below, layer_stacks

__all__ = ["BackwardStop", "freeze_below"]


class BackwardStop:
    """Hooks that end the backward pass at a layer of a model; `move` sets another layer, `remove` takes them
    off.

    It freezes no parameter: those below the layer must not be trainable, as their gradients would silently be
    missing (`freeze_below` freezes them).

    Args:
        model: any module with a stack of layers, also one wrapped by PEFT or patched.
        first_layer: the lowest layer with a backward pass, counted from 0; 0: no hooks, the number of layers:
            the head alone.
        layers: the containers of the layers, where `depth.layer_stacks` would take others.
        reentrant: whether the layers' caller uses reentrant checkpointing; None: what transformers has set on
            the layer.
    Raises: ValueError for a first_layer that is no layer of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        first_layer: int,
        *,
        layers: str | Sequence[str] | None = None,
        reentrant: bool | None = None,
    ) -> None:
        self._stacks = layer_stacks(model, layers)
        self._reentrant = reentrant
        self._handles: list[Any] = []
        self._unchecked: list[nn.Module] = []
        self.first_layer = 0
        self.move(first_layer)

    def move(self, first_layer: int) -> None:
        """End the backward pass at another layer from the next forward on."""
        count = sum(len(stack.layers) for stack in self._stacks)
        if not 0 <= first_layer <= count:
            raise ValueError(
                f"first_layer: got {first_layer}, expected one of the model's {count} layers, from 0, or"
                f" {count}: the head"
            )
        self.remove()
        self.first_layer = first_layer
        for stack in self._stacks:
            below = stack.layers[: max(0, first_layer - stack.first)]
            if below:
                self._cut(stack, below)

    def _cut(self, stack: LayerStack, below: tuple[nn.Module, ...]) -> None:
        """Hooks on the owner, on the first layer and, where the stack goes on, on the last layer below the
        cut."""

        self._handles.append(stack.owner.register_forward_pre_hook(partial(self._leave_unchecked, below)))
        self._handles.append(below[0].register_forward_pre_hook(_detach_inputs, with_kwargs=True))
        if len(below) < len(stack.layers):
            hook = partial(self._let_require_grad, stack.layers[len(below)])
            self._handles.append(below[-1].register_forward_hook(hook))

    def _leave_unchecked(self, below: tuple[nn.Module, ...], *_: Any) -> None:
        """Before each forward, as trainers switch checkpointing on when they begin."""
        for layer in below:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False
                self._unchecked.append(layer)

    def _let_require_grad(self, following: nn.Module, _module: nn.Module, _args: Any, output: Any) -> Any:
        return _requiring_grad(output) if torch.is_grad_enabled() and self._is_reentrant(following) else None

    def _is_reentrant(self, layer: nn.Module) -> bool:
        if self._reentrant is not None:
            return self._reentrant
        if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
            return False
        function = getattr(layer, "_gradient_checkpointing_func", None)
        return getattr(function, "keywords", {}).get("use_reentrant", True) is not False

    def remove(self) -> None:
        """Take the hooks off, and let the layers be checkpointed again that were."""
        for handle in self._handles:
            handle.remove()
        for layer in self._unchecked:
            layer.gradient_checkpointing = True
        self._handles, self._unchecked, self.first_layer = [], [], 0


class FrozenLayers:
    """What `freeze_below` did to a model; `remove` undoes it."""

    def __init__(self, stop: BackwardStop, frozen: list[nn.Parameter]) -> None:
        self.stop, self.frozen = stop, frozen

    def remove(self) -> None:
        """Let the frozen parameters be trainable again, and backward run to the bottom."""
        self.stop.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []


def freeze_below(
    model: nn.Module,
    first_layer: int,
    *,
    layers: str | Sequence[str] | None = None,
    reentrant: bool | None = None,
) -> FrozenLayers:
    """Freeze everything below a layer, and keep no activation and run no backward there, with gradient
    checkpointing of either kind too.

    Frozen are the layers before `first_layer`, the embeddings and whatever else comes before it by
    `depth.below`; a head that is tied to the embeddings is frozen with them. The values that the model
    computes do not change.

    Args: as `BackwardStop`.
    Returns: what takes it back, by `remove()`.
    Raises: ValueError as `BackwardStop`, and where nothing above the cut is trainable.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    >>> frozen = freeze_below(model, 2)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['2.weight', '2.bias']
    """
    stop = BackwardStop(model, first_layer, layers=layers, reentrant=reentrant)
    frozen = [
        parameter for _, parameter in below(model, first_layer, layers=layers) if parameter.requires_grad
    ]
    if len(frozen) == sum(parameter.requires_grad for parameter in model.parameters()):
        stop.remove()
        raise ValueError(
            f"first_layer: got {first_layer}, but nothing from there up is trainable: choose a lower one",
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None
    return FrozenLayers(stop, frozen)


def _detach_inputs(
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _requiring_grad(output: Any) -> Any:
    """The output with a hidden state that requires a gradient: the tensor itself, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output.detach().requires_grad_(True)
    return (output[0].detach().requires_grad_(True), *output[1:]) if isinstance(output, tuple) else output
