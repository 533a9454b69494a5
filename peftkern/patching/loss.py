"""A causal language model's training loss without the logits: found by what the model does, put on the instance, taken off again.

The model's own forward runs, on a stand-in for the model that answers for two names: the head, which hands the hidden states on, and the
loss function, which makes the loss from them. Nothing is set on the model, so that nothing is left behind by an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .blocks import _ON_CPU
from .detect import Candidate, _base_reason, _device_reason, _forward_reason, _replaced, _weight_reason_4bit, excluded, is_lora
from .forwards import Adapter, Forward, _autocast_off, _served, active_adapters, has_hooks, install
from .report import Row
from .weights import FLOATS, WeightCache, autocast_dtype, is_4bit

__all__ = ["LossForward", "LossPlan", "install_loss", "loss_candidate", "plan_of"]


@dataclass(frozen=True)
class LossPlan:
    """What the probe found out about a model.

    head           the attribute that holds the head
    softcap, scale what the model does to its logits: scale * l, or softcap * tanh(l / softcap)
    loss_function  the model's, which computes what transformers' ForCausalLMLoss does
    settings       the configuration's values with "logit" in their names; others than these, and the stock forward runs
    """

    head: str
    softcap: float | None
    scale: float
    loss_function: Callable[..., Tensor]
    settings: tuple[tuple[str, Any], ...]
    weights: WeightCache = field(default_factory=WeightCache, compare=False)


class LossForward(Forward):
    """A causal LM that in training, given labels, returns its loss and no logits. `cache` holds its LossPlan.

    Stock, decided at each call: evaluation, no labels, a tuple asked for, `logits_to_keep`, another loss function or other logit settings
    than when patched, hooks on the head, several adapters or dropout on it, dtypes and devices without kernels.
    """

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason(kwargs) is not None:
            return self.stock(*args, **kwargs)
        head = _Head(getattr(self.module, self.cache.head), self.cache)
        stand_in = _StandIn(self.module, {self.cache.head: head, "loss_function": head.loss})
        output = type(self.module).forward(stand_in, *args, **kwargs)
        if head.hidden is None:
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def reason(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments takes the stock forward."""
        model, plan = self.module, self.cache
        if not model.training or not isinstance(kwargs.get("labels"), Tensor):
            return "not in training, or no labels"
        keep, wanted = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
        if isinstance(keep, Tensor) or keep:
            return "logits_to_keep was given"
        if not (model.config.return_dict if wanted is None else wanted):
            return "a tuple is asked for"
        if model.loss_function is not plan.loss_function:
            return "another loss function than when it was patched"
        if any(getattr(_text_config(model), name, None) != value for name, value in plan.settings):
            return "the configuration of the logits has changed"
        parts = _parts(getattr(model, plan.head))
        return parts if isinstance(parts, str) else None


class _StandIn:
    """Passes for the model, but for a few names."""

    def __init__(self, model: nn.Module, replaced: dict[str, Any]) -> None:
        self.__dict__["_model"], self.__dict__["_replaced"] = model, replaced

    def __getattr__(self, name: str) -> Any:
        replaced = self.__dict__["_replaced"]
        return replaced[name] if name in replaced else getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_model"], name, value)


class _Parts(NamedTuple):
    """The linear that makes the logits now, and the one adapter on it."""

    base: nn.Module
    adapter: Adapter | None


def _parts(head: nn.Module) -> _Parts | str:
    """Of the head as it is at this moment, or why only the stock forward can run it."""
    if has_hooks(head):
        return "a hook is registered on the head"
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        names = [name for name in head.active_adapters if name in head.modules_to_save]
        if len(names) > 1:
            return "several adapters with a head of their own are active"
        head = head.original_module if head.disable_adapters or not names else head.modules_to_save[names[0]]
    if not is_lora(head):
        return "a hook is registered on the head" if has_hooks(head) else _Parts(head, None)
    if has_hooks(head.base_layer):
        return "a hook is registered on the head's base layer"
    if head.merged:
        return "adapters are merged but disabled" if head.disable_adapters else _Parts(head.base_layer, None)
    if head.disable_adapters or not any(name in head.lora_A for name in head.active_adapters):
        return _Parts(head.base_layer, None)
    adapters = active_adapters(head)
    if isinstance(adapters, str):
        return adapters
    if len(adapters) > 1 or adapters[0].dropout_p > 0.0:
        return "several adapters are active on the head" if len(adapters) > 1 else "the head's adapter has dropout"
    return _Parts(head.base_layer, adapters[0])


class _Head:
    """Stands in for the head and the loss function during one forward."""

    def __init__(self, head: nn.Module, plan: LossPlan) -> None:
        self.head, self.plan, self.hidden = head, plan, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Keeps the hidden states and returns a column of them in place of the logits; the logits, where the op cannot serve."""
        self.found = _operands(_parts(self.head), hidden, self.plan.weights)
        if self.found is None:
            return self.head(hidden)
        self.hidden = hidden
        return hidden[..., :1].detach()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss."""
        if self.hidden is None:
            options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, "shift_labels": shift_labels}
            return self.plan.loss_function(logits, labels, vocab_size, **options, **kwargs)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        weight, bias, adapter, compute = self.found
        x = self.hidden.reshape(-1, self.hidden.shape[-1]).to(compute)
        low_rank = {} if adapter is None else {"lora_a": adapter.a.weight, "lora_b": adapter.b.weight, "scaling": adapter.scaling}
        with _autocast_off(x):
            return functional.linear_cross_entropy(
                x if self.plan.scale == 1.0 else x * self.plan.scale,
                weight,
                shift_labels.reshape(-1).to(x.device),
                bias=_bias(bias, adapter, self.plan.scale),
                ignore_index=ignore_index,
                softcap=self.plan.softcap,
                num_items_in_batch=num_items_in_batch,
                **low_rank,
            )


class _Operands(NamedTuple):
    weight: Any
    bias: Tensor | None
    adapter: Adapter | None
    compute: torch.dtype


def _operands(parts: _Parts | str, hidden: Tensor, cache: WeightCache) -> _Operands | None:
    """What to multiply these hidden states with; None where only the stock head can."""
    if isinstance(parts, str) or hidden.dtype not in FLOATS or not _served(hidden):
        return None
    base, adapter = parts
    if not (type(base) is nn.Linear and type(base.weight) is nn.Parameter) and not is_4bit(base):
        return None  # another module took the head's place since the model was patched
    if adapter is not None and adapter.a.weight.device != hidden.device:
        return None
    if is_4bit(base):
        found = cache.operands(base, hidden)
        return None if found is None else _Operands(found.weight, found.bias, adapter, found.compute)
    wanted, weight = autocast_dtype(hidden), base.weight
    if weight.device != hidden.device or weight.dtype not in FLOATS or (wanted is None and weight.dtype != hidden.dtype):
        return None
    compute = wanted or hidden.dtype
    return _Operands(weight, base.bias, adapter, compute) if compute in FLOATS else None


def _bias(bias: Tensor | None, adapter: Adapter | None, scale: float) -> Tensor | None:
    if adapter is not None and adapter.b.bias is not None:
        scaled = adapter.scaling * adapter.b.bias
        bias = scaled if bias is None else bias + scaled
    return bias if bias is None or scale == 1.0 else bias * scale


def loss_candidate(model: nn.Module, exclude: tuple[str, ...] = ()) -> Candidate | None:
    """The causal LM in `model` whose loss can be fused, for `install_loss`, or in its row the reason why not; None where `model` holds no
    language model of transformers. `exclude` may name the model or its "loss_function".
    """
    for name, module in model.named_modules():
        if not isinstance(getattr(type(module), "loss_function", None), property) or not hasattr(module, "get_output_embeddings"):
            continue
        head = module.get_output_embeddings()
        if head is None:
            continue
        plan = excluded(name, exclude) or excluded(f"{name}.loss_function", exclude) or plan_of(module)
        reason, note = (plan, "") if isinstance(plan, str) else (None, _note(plan))
        shape = tuple(getattr(head, side, None) for side in ("out_features", "in_features"))
        shape = shape if all(isinstance(size, int) for size in shape) else None
        adapters = tuple(a for a in head.active_adapters if a in head.lora_A) if is_lora(head) else ()
        row = Row(name, "loss", "cross-entropy", "stock" if reason else "linear_cross_entropy", shape, adapters, reason, note)
        return Candidate(module, row, reason is None)
    return None


def install_loss(found: Candidate) -> bool:
    """Put a LossForward on the candidate, which `forwards.remove` takes off again; whether it could be."""
    plan = plan_of(found.module) if found.static else ""
    if isinstance(plan, str):
        return False
    install(found.module, LossForward, plan)
    return True


def _note(plan: LossPlan) -> str:
    words = "in training the output has no logits"
    return words if plan.softcap is None else f"{words}; they are capped at {plan.softcap:g}"


def plan_of(model: nn.Module) -> LossPlan | str:
    """How to fuse the loss of a causal LM, or why it cannot be."""
    head = model.get_output_embeddings()
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None:
        return "its head is not a child of its own"
    reason = _replaced(model) or _head_reason(head)
    if reason is not None:
        return reason
    if not _is_causal_lm_loss(model.loss_function):
        return "its loss function is not transformers' ForCausalLMLoss"
    try:
        seen = _probe(model, name)
    except Exception as error:  # whatever a forward does with the stand-in that it would not do with the model
        return f"its forward cannot be probed ({type(error).__name__}: {error})"
    found = seen if isinstance(seen, str) else _logit_change(seen[0])
    if isinstance(found, str):
        return found
    if seen[1] != head.out_features:
        return f"its loss takes {seen[1]} words, its head makes {head.out_features}"
    settings = tuple((key, value) for key, value in vars(_text_config(model)).items() if "logit" in key)
    return LossPlan(name, found[0], found[1], model.loss_function, settings)


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()


def _head_reason(head: nn.Module) -> str | None:
    inner = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        inner = [head.original_module, *head.modules_to_save.values()]
    for layer in inner:
        reason = _forward_reason(layer) if is_lora(layer) else None
        base = layer.base_layer if is_lora(layer) else layer
        reason = reason or _base_reason(base) or (_weight_reason_4bit(base) if is_4bit(base) else None)
        if reason is None and base.weight.device.type == "meta":
            reason = "its weight is on the meta device; load it first"
        if reason is None and not is_4bit(base) and (type(base.weight) is not nn.Parameter or base.weight.dtype not in FLOATS):
            reason = f"its weight is {type(base.weight).__name__} {base.weight.dtype}"
        reason = reason or _device_reason(base.weight)
        if reason is not None:
            return f"head: {reason}"
    return None


def _is_causal_lm_loss(function: Callable[..., Tensor]) -> bool:
    """Whether it computes the shifted cross-entropy, a mean or over num_items_in_batch, and takes labels that are shifted already."""
    logits = torch.sin(torch.arange(70, **_ON_CPU)).reshape(2, 5, 7) * 3
    labels = torch.tensor([[1, 2, -100, 6, 0], [3, 3, 3, -100, 5]], device="cpu")
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    other = labels.flip(1)
    try:
        got = (
            function(logits=logits, labels=labels, vocab_size=7),
            function(logits=logits, labels=labels, vocab_size=7, num_items_in_batch=3),
            function(logits=logits, labels=None, vocab_size=7, shift_labels=other),
        )
        expected = (
            F.cross_entropy(logits.flatten(0, 1), shifted.flatten()),
            F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / 3,
            F.cross_entropy(logits.flatten(0, 1), other.flatten()),
        )
        return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(got, expected, strict=True))
    except Exception:  # a function of another kind
        return False


# Multiples of 1 and of a cap; the first and last tell a scale and a cap, the others whether it is nothing else.
_PROBES = (1e-3, 0.5, 1.0, -2.0, 7.0, -40.0, 1e6)


class _Backbone:
    """Stands in for the transformer below the head: returns given hidden states, and None for whatever else is asked of it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _BackboneOutput:
        return _BackboneOutput(self.hidden)


class _BackboneOutput:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def _probe(model: nn.Module, head: str) -> tuple[Tensor, int] | str:
    """What the model's loss function is given for logits of _PROBES, and the vocabulary's size; only the model's outermost forward runs."""
    probes, seen = torch.tensor(_PROBES, **_ON_CPU), []
    hidden = torch.zeros(1, 3, model.get_output_embeddings().in_features, **_ON_CPU)

    def record(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        seen.append((logits, labels, vocab_size))
        return logits.sum() * 0

    replaced = {head: lambda _: probes.expand(1, 3, -1), "loss_function": record, model.base_model_prefix: _Backbone(hidden)}
    ids = torch.tensor([[1, 2, 3]], device="cpu")
    with torch.no_grad():
        type(model).forward(_StandIn(model, replaced), input_ids=ids, labels=ids)
    if len(seen) != 1:
        return "its forward does not call its loss function once"
    logits, labels, vocab_size = seen[0]
    if logits.shape != (1, 3, len(_PROBES)) or not torch.equal(labels, ids):
        return "its forward rearranges logits or labels before the loss"
    return logits[0, 0].float(), vocab_size


def _logit_change(seen: Tensor) -> tuple[float | None, float] | str:
    """(softcap, scale) of what happened to the logits _PROBES."""
    probes = torch.tensor(_PROBES, **_ON_CPU)
    scale, cap = seen[2].item(), seen[-1].item()
    if torch.equal(seen, probes):
        return None, 1.0
    if cap > 0 and torch.allclose(seen, cap * torch.tanh(probes / cap), rtol=1e-5):
        return cap, 1.0
    exact = scale > 0 and abs(math.frexp(scale)[0]) == 0.5  # a power of two: scaling x rounds nothing
    if exact and torch.allclose(seen, probes * scale, rtol=1e-6):
        return None, scale
    return "its forward changes the logits in a way that has no fused form"
