"""Eager attention functions of transformers that compute what attention by tiles does: each is recognized by
what it computes on a small probe."""

from __future__ import annotations

import dis
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import autocast_off
from .attention_masks import CausalMask, DenseMask
from .attention_reference import reference
from .attention_tiles import against_shapes, tiled

__all__ = ["against_tiles", "by_tiles"]

_OURS = ("dropout", "scaling", "softcap")
_CAP, _SIZE, _TOLERANCE = 2.0, 3.0, 1e-4  # of the probe: its cap, its scores' size, what it may differ by
_PROVED: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, str | None]] = weakref.WeakKeyDictionary()


def by_tiles(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any], groups: int | None
) -> tuple[Tensor, None]:
    """What the eager function returns, [B, S, nH, e], without the weights, which are in memory no more."""
    if mask is None:
        mask = CausalMask(query.shape[2], key.shape[2], False, None, query.device)
    elif isinstance(mask, Tensor):
        mask = DenseMask(mask)
    cap, scale = options.get("softcap"), options.get("scaling")
    out = tiled(query, key, value, mask, softcap=cap, scale=scale, groups=groups)
    return out.transpose(1, 2), None


def against_tiles(
    function: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    options: dict[str, Any],
    groups: int | None,
) -> str | None:
    """Why an eager function has to run as it is; None where tiles give the same.

    Args:
        function: called as (module, query, key, value, mask, **options). tensors: query, key, value.
        groups: of the key/value heads, None for any.
    """
    query, key, _ = tensors
    if options.get("dropout"):
        return "attention has dropout, whose mask is drawn for all heads at once"
    if options.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    ):
        return "its weights are asked for"
    reason = against_shapes(*tensors)
    if reason is not None:
        return reason
    if groups is not None and key.shape[1] % groups:
        return f"{groups} groups do not divide its {key.shape[1]} key/value heads"
    return _against_mask(mask, query, key) or _against_function(function, module, tensors, mask, options)


def _against_mask(mask: Any, query: Tensor, key: Tensor) -> str | None:
    if mask is None:
        return None
    shape, whole = tuple(mask.shape), (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = len(shape) == 4 and shape[2:] == whole[2:]
    if not fits or shape[0] not in (1, whole[0]) or shape[1] not in (1, whole[1]):
        return f"its mask is {shape}, expected {whole}, of which the first two may be 1"
    if isinstance(mask, Tensor) and (mask.requires_grad or not mask.is_floating_point()):
        return "its mask has a gradient or is of truth values"
    return None


def _against_function(
    function: Callable[..., Any],
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    options: dict[str, Any],
) -> str | None:
    plain = inspect.unwrap(function)
    if not isinstance(plain, types.FunctionType):
        return "its eager attention is no Python function"
    parameters = inspect.signature(plain).parameters.values()
    read = {one.name for one in list(parameters)[5:] if one.kind is not one.VAR_KEYWORD} - set(_OURS)
    unknown = sorted(name for name in read if options.get(name) is not None)
    if unknown:
        return f"its eager attention reads {', '.join(unknown)}"
    capped = options.get("softcap") is not None
    asked = type(module), capped, mask is None, options.get("scaling"), query_sizes(tensors)
    known = _PROVED.setdefault(plain, {})
    if asked not in known:
        known[asked] = _against_probe(function, plain, module, tensors, mask is not None, options)
    return known[asked]


def query_sizes(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[int, ...]:
    """Heads and their widths."""
    query, key, value = tensors
    return query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]


def _against_probe(
    function: Callable[..., Any],
    plain: types.FunctionType,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    masked: bool,
    options: dict[str, Any],
) -> str | None:
    rest = [one.name for one in inspect.signature(plain).parameters.values() if one.kind is one.VAR_KEYWORD]
    if any(_loads(plain, name) for name in rest):
        return "its eager attention reads arguments that it does not name"
    q, k, v, mask = _probe(tensors, options.get("scaling"))
    ours = {name: options[name] for name in _OURS if name in options}
    if ours.get("softcap") is not None:
        ours["softcap"] = _CAP
    try:
        with torch.no_grad(), autocast_off(q):
            got = function(module, q, k, v, mask if masked else None, **ours)[0]
        expected = reference(
            *(t.double() for t in (q, k, v)),
            mask.double() if masked else None,
            softcap=ours.get("softcap"),
            scale=ours.get("scaling"),
        ).transpose(1, 2)
        same = got.shape == expected.shape and bool((got - expected).abs().max() <= _TOLERANCE)
    except Exception as error:  # any function is possible
        return f"its eager attention failed on a probe: {type(error).__name__}: {error}"
    return None if same else "its eager attention computes something else, as a probe shows"


def _probe(
    tensors: tuple[Tensor, Tensor, Tensor], scaling: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q of 3 rows, k, v of 5, and a mask, in fp32, whose scores a cap of _CAP bends."""
    heads, of_keys, width, of_values = query_sizes(tensors)
    device, generator = tensors[0].device, torch.Generator().manual_seed(0)
    scale = width**-0.5 if scaling is None else abs(scaling) or 1.0
    size = (_SIZE / (scale * width**0.5)) ** 0.5

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device)

    q, k = size * draw(1, heads, 3, width), size * draw(1, of_keys, 5, width)
    mask = draw(1, 1, 3, 5)
    mask[..., 1, 3:] = torch.finfo(torch.float32).min
    return q, k, draw(1, of_keys, 5, of_values), mask


def _loads(function: types.FunctionType, name: str) -> bool:
    """Whether the function's own code reads a variable."""
    for step in dis.get_instructions(function):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith("LOAD") and name in names:
            return True
    return name in function.__code__.co_cellvars
