"""What each layer reads and the gradient of what it gives, example by example, at the pretrained weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..features import adapters_disabled
from .layers import Factors
from .predictions import LABELS, Predictions, labels_of, step_generator, summed_loss

__all__ = ["Receive", "Seen", "as_pretrained", "source_gradients"]

# (layer, x [E, T, K], delta [E, T, N]): what the layer read, and the gradient of the summed loss w.r.t. what
# it gave.
Receive = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Seen:
    """How much of the source one batch was."""

    predictions: int
    examples: int


def source_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    factors: Mapping[str, Factors],
    receive: Receive,
    *,
    labels: str,
    predictions: Predictions,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Seen]:
    """Run forward and backward over every batch with adapters off, handing each layer's x and delta to
    `receive` as backward reaches it; yields after each batch. No gradient of a weight is formed, and every x
    lives only until its layer's turn.

    Raises: ValueError for an unknown kind of labels, for batches without any prediction, or for a layer that
    is called twice in one pass.
    """
    if labels not in LABELS:
        raise ValueError(f"labels: got {labels!r}, expected one of {LABELS}")
    watch, counted = _Watch(factors, receive), 0
    device = next(iter(factors.values())).a.device
    with as_pretrained(model), watch.installed(), torch.enable_grad():
        for number, batch in enumerate(_shown(batches, progress)):
            batch = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
            watch.begin(next(len(value) for value in batch.values() if isinstance(value, Tensor)))
            logits, known = predictions(model, batch)
            drawn = labels_of(logits, known, labels, step_generator(logits.device, seed, number))
            if len(drawn):
                summed_loss(logits, drawn).backward()
                counted += len(drawn)
                yield Seen(len(drawn), watch.examples)
    if not counted:
        raise ValueError(
            "batches: the source has no prediction to measure on: give at least one batch with labels other"
            " than -100"
        )


@contextlib.contextmanager
def as_pretrained(model: nn.Module) -> Iterator[None]:
    """Within it: adapters off, evaluation mode. After it every module's mode and every parameter's
    requires_grad are as before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with adapters_disabled(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needed in trained:  # PEFT turns all of an adapter on again
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)


class _Watch:
    """Hooks on every layer while it is installed."""

    def __init__(self, factors: Mapping[str, Factors], receive: Receive) -> None:
        self.factors, self.receive, self.examples = factors, receive, 1
        self._called: set[str] = set()

    def begin(self, examples: int) -> None:
        """A pass over so many examples begins."""
        self.examples = examples
        self._called.clear()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """For as long as this lasts."""
        handles = [
            layer.module.register_forward_hook(functools.partial(self._forward, name), with_kwargs=True)
            for name, layer in self.factors.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if name in self._called:
            raise ValueError(
                f"{name} is called twice in one pass: the squares of its two gradients do not add up; leave"
                " it out"
            )
        self._called.add(name)
        if not output.requires_grad:
            output.requires_grad_()  # all weights are frozen: the graph begins at the first watched layers
        x = (args[0] if args else kwargs["x"]).detach()
        output.register_hook(functools.partial(self._backward, name, x))

    def _backward(self, name: str, x: Tensor, delta: Tensor) -> None:
        with torch.no_grad():
            self.receive(name, self._by_example(x, name), self._by_example(delta, name))

    def _by_example(self, tensor: Tensor, name: str) -> Tensor:
        """[E, T, width] of whatever shape the layer sees."""
        if len(tensor) != self.examples and self.examples != 1:
            raise ValueError(
                f"{name} sees {tuple(tensor.shape)}, in which the {self.examples} examples of a batch cannot"
                " be told apart: give batches of one example"
            )
        return tensor.reshape(self.examples, -1, tensor.shape[-1])


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="Measuring what to keep", unit="batch")
