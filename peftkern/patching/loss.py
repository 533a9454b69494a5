"""A causal language model's training loss without the logits: found by what the model does, put on the
instance, taken off again.

The model's own forward runs, on a stand-in for the model that answers for two names: the head, which hands on
logits that nobody has made yet, and the loss function, which makes the loss from what the forward has done to
them. Where it does anything else with them they are made, and the stock loss function gets them. Nothing is
set on the model, so that nothing is left behind by an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import autocast_off, served
from ..ops.linear_cross_entropy.budget import logits_bytes
from . import mixed
from .detect import (
    against_4bit_weight,
    against_base,
    against_device,
    against_forward,
    is_lora,
    replaced_on_instance,
)
from .forwards import Forward
from .hooks import against
from .linears import Adapter, active_adapters
from .logits import DeferredLogits, LogitForm, made
from .loss_probe import StandIn, is_causal_lm_loss, probe, shifted
from .report import Row
from .rewrite import Context, Finding, Rewrite
from .weights import FLOATS, WeightCache, autocast_dtype, is_4bit

__all__ = ["LOGITS_BYTES", "Loss", "LossForward", "LossPlan", "plan_of"]

LOGITS_BYTES = "_peftkern_logits_bytes"  # of the model: how many bytes of its logits may be there at a time

# What torch's cross_entropy can be told besides; a model may hand such an option on.
_OPTIONS = {"weight", "reduction", "label_smoothing"}


@dataclass(frozen=True)
class LossPlan:
    """What the probe found out about a model.

    head           the attribute that holds the head
    form           what the model did to its logits when it was patched, for the report: each call looks again
    loss_function  the model's, which computes what transformers' ForCausalLMLoss does
    """

    head: str
    form: LogitForm
    loss_function: Callable[..., Tensor]
    weights: WeightCache = field(default_factory=WeightCache, compare=False)


class LossForward(Forward):
    """A causal LM that in training, given labels, returns its loss and no logits. `cache` holds its LossPlan.

    Stock, decided at each call: evaluation, no labels, a tuple asked for, `logits_to_keep`, another loss
    function than when patched, hooks on the head, several adapters or dropout on it, dtypes and devices
    without kernels.

    watcher: gets what a loss was made of before it was reduced, the loss of each label in nats (fp32 [batch,
    length], at the place that predicts it, without gradient) and these labels (-100: none); the loss stays as
    it is, bit for bit. None: nobody looks.
    """

    __slots__ = ("watcher",)

    def __init__(self, module: nn.Module, previous: Callable[..., Tensor] | None, cache: LossPlan) -> None:
        super().__init__(module, previous, cache)
        self.watcher: Callable[[Tensor, Tensor], None] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state)
        self.watcher = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training or self.reason(kwargs) is not None:
            return self.stock(*args, **kwargs)
        output, _ = self._run(args, kwargs, watcher=self.watcher)
        if not isinstance(output, dict):
            return made(output)
        if not any(isinstance(value, DeferredLogits) for value in output.values()):
            return output
        return type(output)(**{name: made(value) for name, value in output.items() if not _unmade(value)})

    def negative_log_likelihood(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Summed over the labels of one call of the model in the mode it is in, and nothing else that the
        model adds to its loss; None where only the logits tell.
        """
        if self.reason(kwargs) is not None:
            return None
        _, head = self._run(args, kwargs, items=1)
        return head.value

    def token_losses(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """As `negative_log_likelihood`, but of each label: fp32, the labels' shape, at the place that
        predicts it, 0 where there is none. Without gradients.
        """
        if self.reason(kwargs) is not None:
            return None
        with torch.no_grad():
            _, head = self._run(args, kwargs, reduction="none")
        return head.value

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        items: int | None = None,
        reduction: str = "mean",
        watcher: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Any, _Head]:
        head = _Head(getattr(self.module, self.cache.head), self.cache, items, reduction, watcher)
        stand_in = StandIn(self.module, {self.cache.head: head, "loss_function": head.loss})
        budget = self.module.__dict__.get(LOGITS_BYTES)
        with (
            contextlib.nullcontext()
            if budget is None or torch.compiler.is_compiling()
            else logits_bytes(budget)
        ):
            return type(self.module).forward(stand_in, *args, **kwargs), head

    def reason(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments takes the stock forward, whatever mode the model is in."""
        model, plan = self.module, self.cache
        if not isinstance(kwargs.get("labels"), Tensor):
            return "no labels"
        keep, wanted = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
        if isinstance(keep, Tensor) or keep:
            return "logits_to_keep was given"
        if not (model.config.return_dict if wanted is None else wanted):
            return "a tuple is asked for"
        if model.loss_function is not plan.loss_function:
            return "another loss function than when it was patched"
        parts = _parts(getattr(model, plan.head))
        return parts if isinstance(parts, str) else None


def _unmade(value: Any) -> bool:
    """Whether it passes for logits that nobody needed."""
    return isinstance(value, DeferredLogits) and value.tensor is None


class _Parts(NamedTuple):
    """The linear that makes the logits now, and the one adapter on it."""

    base: nn.Module
    adapter: Adapter | None


def _parts(head: nn.Module) -> _Parts | str:
    """Of the head as it is at this moment, or why only the stock forward can run it."""
    if mixed.current(head) is not None:
        return "the head mixes adapters"
    watched = against("the head", head)
    if watched:
        return watched
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        names = [name for name in head.active_adapters if name in head.modules_to_save]
        if len(names) > 1:
            return "several adapters with a head of their own are active"
        head = head.original_module if head.disable_adapters or not names else head.modules_to_save[names[0]]
    if not is_lora(head):
        return against("the head", head) or _Parts(head, None)
    watched = against("the head", head) or against("the head's base layer", head.base_layer)
    if watched:
        return watched
    if head.merged:
        return "adapters are merged but disabled" if head.disable_adapters else _Parts(head.base_layer, None)
    if head.disable_adapters or not any(name in head.lora_A for name in head.active_adapters):
        return _Parts(head.base_layer, None)
    adapters = active_adapters(head)
    if isinstance(adapters, str):
        return adapters
    if len(adapters) > 1 or adapters[0].dropout_p > 0.0:
        return (
            "several adapters are active on the head"
            if len(adapters) > 1
            else "the head's adapter has dropout"
        )
    return _Parts(head.base_layer, adapters[0])


class _Head:
    """Stands in for the head and the loss function during one forward. `value`: the fused loss alone; `items`
    overrules its divisor.

    With the reduction "none" the value is that of each label, and the model is given their sum.
    """

    def __init__(
        self,
        head: nn.Module,
        plan: LossPlan,
        items: int | None,
        reduction: str,
        watcher: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.head, self.plan, self.items, self.value, self.reduction = head, plan, items, None, reduction
        self.watcher = watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def __call__(self, hidden: Tensor) -> Tensor | DeferredLogits:
        """Logits that are not made; the logits, where the op cannot serve."""
        operands = _operands(_parts(self.head), hidden, self.plan.weights)
        if operands is None:
            return self.head(hidden)
        return DeferredLogits(self.head, hidden, operands.weight.shape[0], operands.compute)

    def loss(
        self,
        logits: Tensor | DeferredLogits,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' ForCausalLMLoss."""
        form = logits.form() if isinstance(logits, DeferredLogits) else None
        if form is None or vocab_size != logits.words or kwargs.keys() & _OPTIONS:
            options = {
                "num_items_in_batch": num_items_in_batch,
                "ignore_index": ignore_index,
                "shift_labels": shift_labels,
            }
            self.value = None
            return self.plan.loss_function(made(logits), labels, vocab_size, **options, **kwargs)
        items = num_items_in_batch if self.items is None else self.items
        targets = shifted(labels, shift_labels, ignore_index)
        loss = self._fused(logits.hidden, form, targets, ignore_index, items)
        self.value = loss.detach().clone()  # models of several experts add the router's loss in place
        if self.reduction == "none":
            self.value, loss = self.value.reshape(targets.shape), loss.sum()
        return loss

    def _fused(
        self, hidden: Tensor, form: LogitForm, labels: Tensor, ignore_index: int, items: Tensor | int | None
    ) -> Tensor:
        weight, bias, adapter, compute = _operands(_parts(self.head), hidden, self.plan.weights)
        x = hidden.reshape(-1, hidden.shape[-1]).to(compute)
        low_rank = (
            {}
            if adapter is None
            else {"lora_a": adapter.a.weight, "lora_b": adapter.b.weight, "scaling": adapter.scaling}
        )
        flat, watcher = labels.reshape(-1).to(x.device), self.watcher
        watched = None if watcher is None else torch.empty(flat.shape, dtype=torch.float32, device=x.device)
        with autocast_off(x):
            loss = functional.linear_cross_entropy(
                x if form.scale == 1.0 else x * form.scale,
                weight,
                flat,
                bias=_bias(bias, adapter, form.scale),
                ignore_index=ignore_index,
                softcap=form.softcap,
                num_items_in_batch=items if self.reduction == "mean" else None,
                reduction=self.reduction,
                row_losses=watched,
                **low_rank,
            )
        if watched is not None:
            watcher(watched.view(labels.shape), labels)
        return loss


class _Operands(NamedTuple):
    weight: Any
    bias: Tensor | None
    adapter: Adapter | None
    compute: torch.dtype


def _operands(parts: _Parts | str, hidden: Tensor, cache: WeightCache) -> _Operands | None:
    """What to multiply these hidden states with; None where only the stock head can."""
    if isinstance(parts, str) or hidden.dtype not in FLOATS or not served(hidden):
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
    if (
        weight.device != hidden.device
        or weight.dtype not in FLOATS
        or (wanted is None and weight.dtype != hidden.dtype)
    ):
        return None
    compute = wanted or hidden.dtype
    return _Operands(weight, base.bias, adapter, compute) if compute in FLOATS else None


def _bias(bias: Tensor | None, adapter: Adapter | None, scale: float) -> Tensor | None:
    if adapter is not None and adapter.b.bias is not None:
        scaled = adapter.scaling * adapter.b.bias
        bias = scaled if bias is None else bias + scaled
    return bias if bias is None or scale == 1.0 else bias * scale


class Loss(Rewrite):
    """The causal LM in the model whose loss can be fused; no finding where it holds no language model of
    transformers. `exclude` may name the model or its "loss_function"."""

    def survey(self, name: str, module: nn.Module, context: Context) -> Finding | None:
        """As Rewrite's: of the first language model that has a head."""
        if any(isinstance(rewrite, Loss) for rewrite, _ in context.findings):
            return None
        head = _head_of(module)
        if head is None:
            return None
        left = context.excluded(name) or context.excluded(f"{name}.loss_function")
        plan = left or plan_of(module)
        if isinstance(plan, str):
            return Finding(module, _row(name, head, plan, ""))
        return Finding(module, _row(name, head, None, _note(plan)), LossForward, plan)


def _head_of(module: nn.Module) -> nn.Module | None:
    """The head of a language model of transformers, None where the module is none."""
    lm = isinstance(getattr(type(module), "loss_function", None), property)
    return module.get_output_embeddings() if lm and hasattr(module, "get_output_embeddings") else None


def _row(name: str, head: nn.Module, reason: str | None, note: str) -> Row:
    shape = tuple(getattr(head, side, None) for side in ("out_features", "in_features"))
    shape = shape if all(isinstance(size, int) for size in shape) else None
    adapters = tuple(a for a in head.active_adapters if a in head.lora_A) if is_lora(head) else ()
    got = "stock" if reason else "linear_cross_entropy"
    return Row(name, "loss", "cross-entropy", got, shape, adapters, reason, note)


def _note(plan: LossPlan) -> str:
    words = "in training the output has no logits"
    return words if plan.form.softcap is None else f"{words}; they are capped at {plan.form.softcap:g}"


def plan_of(model: nn.Module) -> LossPlan | str:
    """How to fuse the loss of a causal LM, or why it cannot be."""
    head = model.get_output_embeddings()
    name = next((name for name, child in model.named_children() if child is head), None)
    if name is None:
        return "its head is not a child of its own"
    reason = replaced_on_instance(model) or _head_reason(head)
    if reason is not None:
        return reason
    if not is_causal_lm_loss(model.loss_function):
        return "its loss function is not transformers' ForCausalLMLoss"
    try:
        form = probe(model, name)
    # whatever a forward does with the stand-in that it would not do with the model
    except Exception as error:
        return f"its forward cannot be probed ({type(error).__name__}: {error})"
    return form if isinstance(form, str) else LossPlan(name, form, model.loss_function)


def _head_reason(head: nn.Module) -> str | None:
    inner = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        inner = [head.original_module, *head.modules_to_save.values()]
    for layer in inner:
        reason = against_forward(layer) if is_lora(layer) else None
        base = layer.base_layer if is_lora(layer) else layer
        reason = reason or against_base(base) or (against_4bit_weight(base) if is_4bit(base) else None)
        if reason is None and base.weight.device.type == "meta":
            reason = "its weight is on the meta device; load it first"
        if (
            reason is None
            and not is_4bit(base)
            and (type(base.weight) is not nn.Parameter or base.weight.dtype not in FLOATS)
        ):
            reason = f"its weight is {type(base.weight).__name__} {base.weight.dtype}"
        reason = reason or against_device(base.weight)
        if reason is not None:
            return f"head: {reason}"
    return None
