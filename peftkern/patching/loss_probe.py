"""Whether a causal language model's loss can be fused: its own forward is run on hidden states of our choice,
stock and fused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ON_CPU
from .logits import DeferredLogits, LogitForm

__all__ = ["StandIn", "is_causal_lm_loss", "probe", "shifted"]

_TOKENS, _RANK = 5, 6  # of the probe; the rank of its head, so that a large vocabulary costs little
_SIZE = 6.0  # of its logits: a cap of 100 changes the loss by more than _TOLERANCE
_TOLERANCE = 1e-4


class StandIn:
    """Passes for an object, but for a few names."""

    def __init__(self, original: Any, replaced: dict[str, Any]) -> None:
        self.__dict__["_original"], self.__dict__["_replaced"] = original, replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_original"], name, value)


class _Backbone:
    """Stands in for the transformer below the head: returns given hidden states, and None for whatever else
    is asked of its output."""

    def __init__(self, original: Any, hidden: Tensor) -> None:
        self.original, self.hidden = original, hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.original, name, None)
        return value if isinstance(value, (int, float, str)) else _Backbone(value, self.hidden)

    def __call__(self, *args: Any, **kwargs: Any) -> _BackboneOutput:
        return _BackboneOutput(self.hidden)


class _BackboneOutput:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _HeadOf:
    """Passes for the head, with other logits."""

    def __init__(self, head: nn.Module, logits: Callable[[Tensor], Any]) -> None:
        self.head, self.logits = head, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)

    def __call__(self, hidden: Tensor) -> Any:
        return self.logits(hidden)


class _Fused:
    """The head and the loss function of the probe's second run: the loss is made from the form of logits that
    were never made."""

    def __init__(self, head: Callable[[Tensor], Tensor], words: int) -> None:
        self.head, self.words = head, words
        self.logits: list[DeferredLogits] = []
        self.losses: list[LogitForm | None] = []
        self.vocabulary: int | None = None

    def __call__(self, hidden: Tensor) -> DeferredLogits:
        self.logits.append(DeferredLogits(self.head, hidden, self.words, torch.float32))
        return self.logits[-1]

    def loss(self, logits: Any, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        form = logits.form() if isinstance(logits, DeferredLogits) else None
        self.losses.append(form)
        self.vocabulary = vocab_size
        u = self.head(self.logits[-1].hidden) * (form or LogitForm()).scale
        changed = u if form is None or form.softcap is None else form.softcap * torch.tanh(u / form.softcap)
        return F.cross_entropy(changed.flatten(0, -2), shifted(labels, kwargs.get("shift_labels")).flatten())

    def reason(self) -> str | None:
        """What the forward did that the fused loss cannot follow."""
        if len(self.logits) != 1 or len(self.losses) != 1:
            return "its forward does not call its head and its loss function once"
        if self.losses[0] is None:
            return "its forward changes the logits in a way that has no fused form"
        if self.vocabulary != self.words:
            return f"its loss takes {self.vocabulary} words, its head makes {self.words}"
        return None


def shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int = -100) -> Tensor:
    """The label of each position: that of the next token, unless they are shifted already."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def probe(model: nn.Module, head: str) -> LogitForm | str:
    """What the model does to its logits, or why its loss cannot be made without them; only the model's
    outermost forward runs.

    Compared are the whole forward's loss and its gradient with respect to the hidden states: what a model
    does with its logits beside the loss function, a further term say, shows in them.
    """
    layer = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    weight = getattr(layer, "base_layer", layer).weight
    dtype = getattr(getattr(embedding, "weight", None), "dtype", torch.float32)
    hidden = _wave(_TOKENS, layer.in_features, device=weight.device)[None].to(
        dtype if dtype.is_floating_point else torch.float32
    )
    low, high = (
        _wave(*shape, device=weight.device)
        for shape in ((_RANK, layer.in_features), (layer.out_features, _RANK))
    )
    scale = _SIZE / F.linear(F.linear(hidden.float(), low), high).std()

    def logits(x: Tensor) -> Tensor:
        return F.linear(F.linear(x.float(), low), high) * scale

    fused = _Fused(logits, layer.out_features)
    stock = _outcome(model, head, hidden, logits, model.loss_function)
    ours = _outcome(model, head, hidden, fused, fused.loss)
    if fused.reason() is not None:
        return fused.reason()
    if any(item.tensor is not None for item in fused.logits):
        return "its forward uses the logits for more than its loss"
    if not all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE * b.abs().max().item())
        for a, b in zip(ours, stock, strict=True)
    ):
        return "its forward gives another loss than that of its logits"
    return fused.losses[0]


def _outcome(
    model: nn.Module, head: str, hidden: Tensor, logits: Any, loss_function: Any
) -> tuple[Tensor, Tensor]:
    """The loss of the model's forward and its gradient with respect to the hidden states."""
    x = hidden.clone().requires_grad_()
    backbone = _backbone_name(model)
    replaced = {
        head: _HeadOf(model.get_output_embeddings(), logits),
        backbone: _Backbone(getattr(model, backbone, None), x),
    }
    stand_in = StandIn(model, replaced | {"loss_function": loss_function})
    ids = (
        torch.arange(1, _TOKENS + 1, device=hidden.device)[None] % model.get_output_embeddings().out_features
    )
    # The router's loss needs what only the real layers give, and has no part in the logits.
    quiet = (
        {"output_router_logits": False}
        if "output_router_logits" in inspect.signature(type(model).forward).parameters
        else {}
    )
    with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []), torch.enable_grad():
        torch.manual_seed(0)
        output = type(model).forward(stand_in, input_ids=ids, labels=ids, **quiet)
        loss = output[0] if isinstance(output, tuple) else output.loss
        (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach().float(), gradient.float()


def _backbone_name(model: nn.Module) -> str:
    """The child that holds the input embeddings; the model's own word for it, where none does."""
    embedding = model.get_input_embeddings()
    holds = (
        name
        for name, child in model.named_children()
        if any(module is embedding for module in child.modules())
    )
    return next(holds, model.base_model_prefix)


def _wave(rows: int, columns: int, *, device: torch.device) -> Tensor:
    """A matrix of no pattern, the same everywhere."""
    return torch.sin(torch.arange(rows * columns, dtype=torch.float32, device=device) * 12.9898).reshape(
        rows, columns
    )


def is_causal_lm_loss(function: Callable[..., Tensor]) -> bool:
    """Whether it computes the shifted cross-entropy, a mean or over num_items_in_batch, and takes labels that
    are shifted already."""
    logits = torch.sin(torch.arange(70, **ON_CPU)).reshape(2, 5, 7) * 3
    labels = torch.tensor([[1, 2, -100, 6, 0], [3, 3, 3, -100, 5]], device="cpu")
    aligned, other = shifted(labels, None), labels.flip(1)
    try:
        got = (
            function(logits=logits, labels=labels, vocab_size=7),
            function(logits=logits, labels=labels, vocab_size=7, num_items_in_batch=3),
            function(logits=logits, labels=None, vocab_size=7, shift_labels=other),
        )
        expected = (
            F.cross_entropy(logits.flatten(0, 1), aligned.flatten()),
            F.cross_entropy(logits.flatten(0, 1), aligned.flatten(), reduction="sum") / 3,
            F.cross_entropy(logits.flatten(0, 1), other.flatten()),
        )
        return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, expected, strict=True))
    except Exception:  # a function of another kind
        return False
