"""The attention layers of a model that can hold a prefix, found by running it on two tokens; and the keys and
values of a text.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..patching.attention import release, surround, surroundable

__all__ = ["Layer", "Survey", "keys_and_values", "survey"]

_ROTARY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Layer:
    """An attention module and its place among the prefix's layers.

    index: as `layer_idx` of the module; source: the layer whose keys and values it reads, itself unless they
    are shared; heads, width,
    value_width: of its keys and values; query_heads: of its queries.
    """

    name: str
    module: nn.Module
    index: int
    source: int
    heads: int
    width: int
    value_width: int
    query_heads: int


@dataclass(frozen=True)
class Survey:
    """What a model offers a prefix.

    layers: in the order of the computation. backbone: the module that makes positions for all of them.
    rotary: whether positions enter by rotation, where any whole number will do. positions: how the backbone
    counts where it is given none, "tokens" (from the first one on, padding too) or "mask" (of the attention
    mask's ones); None for an encoder, beside whose prefix they stay as they are.
    refused: the other attention modules, each with the reason.
    """

    layers: tuple[Layer, ...]
    backbone: nn.Module
    rotary: bool
    positions: str | None
    refused: dict[str, str]


@dataclass
class _Seen:
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor


def survey(model: nn.Module) -> Survey:
    """The self-attention layers of a decoder that ask transformers' attention interface, in order.

    Runs the model on two tokens, so that what its code does decides, not a list of families. Raises
    ValueError where there is none, or the model is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: a prefix inside attention serves decoders and"
            " encoders alone; use PEFT's own prefix tuning for it, which puts the prefix into the decoder"
        )
    modules = [(name, module) for name, module in model.named_modules() if hasattr(type(module), "forward")]
    usable = {name: module for name, module in modules if surroundable(module) is None}
    refused = {
        name: str(surroundable(module))
        for name, module in modules
        if _is_other_attention(name, module, usable)
    }
    if not usable:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise ValueError(
            f"{type(model).__name__} has no attention module that a prefix can be put into"
            f" ({listed or 'none was found'}): it must be a transformers model whose attention asks"
            " ALL_ATTENTION_FUNCTIONS; use PEFT's own prefix tuning for it"
        )
    seen = _run(model, usable.values(), torch.zeros(1, 2, dtype=torch.long, device=_device(model)))
    names = {id(module): name for name, module in usable.items()}
    layers, more = _layers(seen, names)
    if not layers:
        raise ValueError(
            f"no attention module of {type(model).__name__} looked from a text at itself:"
            f" {more or 'none was called'}"
        )
    inside = [layer.module for layer in layers]
    rotary = all("position_embeddings" in inspect.signature(module.forward).parameters for module in inside)
    positions = (
        _positions(model, inside) if all(getattr(module, "is_causal", True) for module in inside) else None
    )
    uncalled = {
        name: "it is not called for text" for name in usable if name not in {layer.name for layer in layers}
    }
    return Survey(tuple(layers), _backbone(model, inside), rotary, positions, refused | uncalled | more)


def _is_other_attention(name: str, module: nn.Module, usable: dict[str, nn.Module]) -> bool:
    """Whether it calls itself an attention, and neither holds nor is one that can be used."""
    called = "attention" in type(module).__name__.lower() and next(module.children(), None) is not None
    return called and not any(f"{other}.".startswith(f"{name}.") for other in usable)


def _positions(model: nn.Module, modules: list[nn.Module]) -> str:
    """By what the model gives for a text and a padded one without positions, and with those that it may count
    itself.
    """
    ids = torch.zeros(2, 3, dtype=torch.long, device=_device(model)) + torch.arange(
        1,
        4,
        device=_device(model),
    )
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=ids.device)
    counted = {
        "tokens": torch.arange(3, device=ids.device).expand(2, -1),
        "mask": (mask.cumsum(1) - 1).clamp(min=0),
    }

    def last(**positions: Tensor) -> Tensor:
        return (
            _run(model, modules, ids, attention_mask=mask, use_cache=False, **positions)[-1]
            .query[:, :, -1]
            .float()
        )

    own = last()
    for name, positions in counted.items():
        if torch.allclose(last(position_ids=positions), own, rtol=1e-3, atol=1e-4):
            return name
    raise ValueError(
        f"{type(model).__name__} counts positions in another way than from 0 on: use PEFT's own prefix tuning"
    )


def _layers(seen: list[_Seen], names: dict[int, str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of what a run on two tokens showed, and reasons against the others."""
    layers: list[Layer] = []
    refused, keys, calls = {}, {}, {}
    for item in seen:
        calls[id(item.module)] = calls.get(id(item.module), 0) + 1
    for order, item in enumerate(seen):
        name, key = names[id(item.module)], item.key
        if key.shape[2] != 2 or item.query.shape[2] != 2:
            refused[name] = (
                f"it looks from {item.query.shape[2]} at {key.shape[2]} tokens, no self-attention over the"
                " text"
            )
        elif calls[id(item.module)] > 1:
            refused[name] = f"it is called {calls[id(item.module)]} times in one pass"
        else:
            index = getattr(item.module, "layer_idx", None)
            index = order if index is None else int(index)
            source = keys.setdefault((key.data_ptr(), key.shape), index)
            shape = (key.shape[1], key.shape[3], item.value.shape[3], item.query.shape[1])
            layers.append(Layer(name, item.module, index, source, *shape))
    if len({layer.index for layer in layers}) != len(layers):
        layers = [Layer(*(layer.name, layer.module, i), i, *_shape(layer)) for i, layer in enumerate(layers)]
    return layers, refused


def _shape(layer: Layer) -> tuple[int, int, int, int]:
    return layer.heads, layer.width, layer.value_width, layer.query_heads


def keys_and_values(
    model: nn.Module,
    found: Survey,
    ids: Tensor,
    *,
    first_position: int = 0,
) -> dict[int, tuple[Tensor, Tensor]]:
    """The keys and values [Hkv, P, D] that each source layer's attention gets for the text `ids` [1, P], by
    its index.

    first_position: of the text's first token; rotary models take any. The prefix that the model has, if any,
    is not seen.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + first_position
    seen = _run(model, [layer.module for layer in found.layers], ids, position_ids=positions)
    by_module = {id(item.module): item for item in seen}
    items = ((layer, by_module[id(layer.module)]) for layer in found.layers if layer.source == layer.index)
    return {layer.index: (item.key[0].clone(), item.value[0].clone()) for layer, item in items}


def _run(model: nn.Module, modules: Any, ids: Tensor, **inputs: Any) -> list[_Seen]:
    """What each attention module gets when the model reads `ids`, in evaluation mode, in the order of the
    calls.
    """
    seen: list[_Seen] = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with _tapped(modules, seen), torch.no_grad():
            model(input_ids=ids, **inputs)
    finally:
        for module, training in modes:
            module.training = training
    return seen


@contextlib.contextmanager
def _tapped(modules: Any, seen: list[_Seen]) -> Iterator[None]:
    def tap(
        function: Callable[..., Any],
        kind: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Any:
        seen.append(_Seen(module, query, key, value))
        return function(module, query, key, value, *args, **kw)

    held = [(module, surround(module, tap)) for module in modules]
    try:
        yield
    finally:
        for module, before in held:
            release(module) if before is None else surround(module, before)


def _backbone(model: nn.Module, modules: list[nn.Module]) -> nn.Module:
    """The smallest module around all of these whose forward takes position_ids."""
    wanted, found = {id(module) for module in modules}, None
    for _, candidate in model.named_modules():
        if (
            wanted <= {id(module) for module in candidate.modules()}
            and "position_ids" in inspect.signature(candidate.forward).parameters
        ):
            found = candidate
    if found is None:
        raise ValueError(
            f"no module of {type(model).__name__} takes position_ids, which follow the prefix: use PEFT's own"
            " prefix tuning"
        )
    return found


def _device(model: nn.Module) -> torch.device:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return next((embedding if embedding is not None else model).parameters()).device
