"""Adapters added, scaled, negated and merged: exactly by concatenated ranks, or by TIES and DARE in a stated
space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import BaseWeights, base_weights
from .expression import parse
from .lora import LoraModule, LoraWeights, plain_config, scaled, zeros_like
from .low_rank import Recompressed, concatenate, recompress
from .merging import merge_modules
from .terms import Term, update_of

__all__ = ["SPACES", "Combined", "combine", "interpolate", "negate", "scale"]

SPACES = ("core", "weights")


@dataclass(frozen=True)
class Combined:
    """The adapter, and of every module the relative Frobenius error of what was cut from its update; 0 where
    nothing was."""

    adapter: LoraWeights
    errors: dict[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the greatest error, and that error."""
        return max(self.errors.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.adapter.modules.values()})
        size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        name, error = self.worst
        lost = f"relative error at most {error:.2e} ({name})" if error else "nothing was cut"
        return f"{len(self.adapter.modules)} modules of {size}; {lost}"


def combine(
    what: str | Mapping[str, float],
    adapters: Mapping[str, LoraWeights],
    *,
    method: Any = None,
    space: str = "core",
    rank: int | None = None,
    max_error: float | None = None,
    base: str | Path | nn.Module | None = None,
    any_base: bool = False,
) -> Combined:
    """One adapter from several: scale * method(w_1 D_1, ..., w_T D_T), D_i what adapter i adds to the base.

    A sum is exact: ranks side by side, scaling 1, fp32; 1.0*a is a with its own ranks, alpha and variants,
    a - a adds exactly nothing, and (a + b) - b is a, in one expression to the bit and over a saved a + b to
    fp32 rounding. With `rank` or `max_error` the sum is recompressed (see `recompress`), no matrix of N x K
    is made. TIES and DARE are not invariant to a change of basis: space "core" lets them act on the R x R
    cores of every module (see `core_space`), "weights" on the N x K updates themselves, whose result is then
    cut to `rank` ranks (default: the sum of the ranks), one module's matrices in memory at a time. Their
    threshold is that of all modules.

    Args:
        what: an expression ("a + 0.5*b - c"), or a coefficient for each name.
        adapters: LoraWeights by name.
        method: a `Method`; default the sum.
        space: "core" or "weights"; for TIES and DARE.
        rank: the most ranks a module may have.
        max_error: of the ranks, the fewest whose relative error is at most this.
        base: the base's weights, a folder or a model; needed where an adapter is DoRA, or replaces tensors of
            the base. A combined DoRA becomes a plain LoRA of `rank` ranks, with its error.
        any_base: combine adapters whose configurations name different bases.
    Raises: ValueError where adapters differ in base or shapes, or are of a kind whose sum would be wrong;
        ExpressionError.
    """
    from .rules import Method

    coefficients = parse(what) if isinstance(what, str) else dict(what)
    method = method or Method()
    _check_options(space, rank, max_error)
    _check_adapters(coefficients, adapters, any_base)
    factor = method.scale if method.name == "sum" else 1.0
    live = [
        Term(name, weight * factor, adapters[name])
        for name, weight in coefficients.items()
        if weight * factor
    ]
    if not live:
        empty = zeros_like(adapters[next(iter(coefficients))])
        return Combined(
            replace(empty, record=_record(coefficients, method)),
            dict.fromkeys(empty.modules, 0.0),
        )
    cut = rank is not None or max_error is not None
    if len(live) == 1 and method.name == "sum" and not cut and (one := _alone(live[0])) is not None:
        return Combined(replace(one, record=_record(coefficients, method)), dict.fromkeys(one.modules, 0.0))
    source = None if base is None else base_weights(base)
    for term in live:
        _require_plain(term, source, rank)
    if method.name == "sum":
        modules = {name: _summed(name, live, source, rank, max_error) for name in _names(live)}
    else:
        modules = merge_modules(_names(live), live, method, space, rank, max_error, source)
    return _finish(live, modules, source, _record(coefficients, method) | {"space": space})


def scale(adapter: LoraWeights, weight: float, **options: Any) -> LoraWeights:
    """weight * adapter. `options`: those of `combine`, here and below."""
    return combine({"a": weight}, {"a": adapter}, **options).adapter


def negate(adapter: LoraWeights, **options: Any) -> LoraWeights:
    """-adapter: what it added to the base is taken from it."""
    return scale(adapter, -1.0, **options)


def interpolate(one: LoraWeights, other: LoraWeights, t: float, **options: Any) -> LoraWeights:
    """(1 - t) one + t other."""
    return combine({"a": 1.0 - t, "b": t}, {"a": one, "b": other}, **options).adapter


def _check_options(space: str, rank: int | None, max_error: float | None) -> None:
    if space not in SPACES:
        raise ValueError(f"space: got {space!r}, expected core or weights")
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank}, expected 1 or more")
    if max_error is not None and not 0.0 <= max_error < 1.0:
        raise ValueError(f"max_error: got {max_error}, expected at least 0 and less than 1")


def _check_adapters(
    coefficients: Mapping[str, float],
    adapters: Mapping[str, LoraWeights],
    any_base: bool,
) -> None:
    if not coefficients:
        raise ValueError("what: it names no adapter")
    unknown = [name for name in coefficients if name not in adapters]
    if unknown:
        raise ValueError(
            f"adapters: {unknown[0]!r} is unknown; there are {', '.join(map(repr, adapters)) or 'none'}",
        )
    if wrong := [name for name, weight in coefficients.items() if not abs(weight) < float("inf")]:
        raise ValueError(
            f"what: the coefficient of {wrong[0]} is {coefficients[wrong[0]]}, expected a finite number",
        )
    bases = {name: adapters[name].config.get("base_model_name_or_path") for name in coefficients}
    named = {name: base for name, base in bases.items() if base}
    if len(set(named.values())) > 1 and not any_base:
        listed = ", ".join(f"{name} of {base}" for name, base in named.items())
        raise ValueError(
            f"adapters: they are of different bases: {listed}. Where that is one base under two names, give"
            " --any-base (any_base)"
        )
    _check_shapes({name: adapters[name] for name in coefficients})


def _check_shapes(adapters: Mapping[str, LoraWeights]) -> None:
    first: dict[str, tuple[str, LoraModule]] = {}
    for name, adapter in adapters.items():
        for place, module in adapter.modules.items():
            other, known = first.setdefault(place, (name, module))
            if known.shape != module.shape:
                shapes = [
                    f"{who} has A {tuple(of.a.shape)} and B {tuple(of.b.shape)}"
                    for who, of in ((other, known), (name, module))
                ]
                raise ValueError(
                    f"adapters: they do not fit each other at {place}: {', '.join(shapes)}; they are of"
                    " different bases"
                )


def _alone(term: Term) -> LoraWeights | None:
    """One adapter times its weight, in its own form; None where that form cannot be scaled."""
    adapter = term.adapter
    if term.weight == 1.0:
        return adapter
    return None if adapter.is_dora or adapter.trained or adapter.obstacle else scaled(adapter, term.weight)


def _require_plain(term: Term, base: BaseWeights | None, rank: int | None) -> None:
    """Raise where a term cannot be combined, or not without the base."""
    adapter, name = term.adapter, term.name
    if adapter.obstacle:
        raise ValueError(
            f"adapter {name}: {adapter.obstacle}. Alone and unscaled (1.0*{name}) it can be copied",
        )
    if adapter.is_dora and (base is None or rank is None):
        raise ValueError(
            f"adapter {name}: it is DoRA, whose change of the base is no b @ a: give "
            "the base's weights (--base) and --rank, to take the "
            "nearest plain LoRA, or combine plain LoRA adapters"
        )
    if adapter.trained and base is None:
        raise ValueError(
            f"adapter {name}: it replaces {next(iter(adapter.trained))} in the base; give the base's weights"
            " (--base)"
        )
    tokens = [key for key in adapter.trained if "trainable_tokens" in key or "token_adapter" in key]
    if tokens:
        raise ValueError(f"adapter {name}: it has trained tokens ({tokens[0]}), which cannot be combined")


def _names(live: Iterable[Term]) -> list[str]:
    return list(dict.fromkeys(name for term in live for name in term.adapter.modules))


def _summed(
    name: str,
    live: list[Term],
    base: BaseWeights | None,
    rank: int | None,
    max_error: float | None,
) -> tuple[LoraModule, float]:
    """One module of the sum, and its relative error."""
    terms = [term for term in live if name in term.adapter.modules]
    like = terms[0].adapter.modules[name]
    bias = _bias(name, terms)
    if any(term.adapter.modules[name].magnitude is not None for term in terms):
        from .low_rank import compress_dense

        total: Tensor = sum(update_of(term, name, base) for term in terms)  # type: ignore[assignment]
        found = compress_dense(total, rank or 1)
        return like.with_factors(found.b, found.a, bias), found.error
    b, a = concatenate(
        [(b * term.weight, a) for term in terms for b, a in [term.adapter.modules[name].factors()]],
    )
    if rank is None and max_error is None:
        return like.with_factors(b, a, bias), 0.0
    found = _cut(b, a, rank, max_error)
    return like.with_factors(found.b, found.a, bias), found.error


def _cut(b: Tensor, a: Tensor, rank: int | None, max_error: float | None) -> Recompressed:
    return recompress(b, a, rank=rank, max_error=max_error or 0.0)


def _bias(name: str, terms: Iterable[Term]) -> Tensor | None:
    parts = [term.bias(name) for term in terms]
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]).float() if there else None


def _finish(
    live: list[Term],
    modules: Mapping[str, tuple[LoraModule, float]],
    base: BaseWeights | None,
    record: dict[str, Any],
) -> Combined:
    """The adapter of these modules, with the first's configuration where that says the same places."""
    plain = {name: module for name, (module, _) in modules.items()}
    if any(module.bias is not None for module in plain.values()):  # PEFT's lora_bias holds for all modules
        plain = {name: _with_bias(module) for name, module in plain.items()}
    first = live[0].adapter
    same = all(term.adapter.modules.keys() == first.modules.keys() for term in live)
    config = plain_config(first.config, plain, same_targets=same)
    replaced = _replaced(live, base)
    if replaced:
        saved = dict.fromkeys(
            name for term in live for name in term.adapter.config.get("modules_to_save") or ()
        )
        kinds = {term.adapter.config.get("bias", "none") for term in live if term.adapter.trained} or {"none"}
        config |= {"modules_to_save": list(saved) or None, "bias": kinds.pop() if len(kinds) == 1 else "all"}
    errors = {name: error for name, (_, error) in modules.items()}
    record = record | {"errors": {name: error for name, error in errors.items() if error}}
    return Combined(
        LoraWeights("+".join(term.name for term in live), config, plain, replaced, record),
        errors,
    )


def _with_bias(module: LoraModule) -> LoraModule:
    if module.bias is not None:
        return module
    return replace(module, bias=torch.zeros(module.b.shape[0], device=module.b.device))


def _replaced(live: list[Term], base: BaseWeights | None) -> dict[str, Tensor]:
    """base + sum of w (value - base) of every tensor that an adapter has trained; a frozen weight's copy as
    it is."""
    result: dict[str, Tensor] = {}
    for term in live:
        for key in term.adapter.replaced.keys() - term.adapter.trained.keys():
            value = term.adapter.replaced[key]
            if key in result and not torch.equal(result[key], value):
                raise ValueError(
                    f"adapter {term.name}: its copy of {key} is not the others'; they are of different bases",
                )
            result[key] = value
    for key in dict.fromkeys(key for term in live for key in term.adapter.trained):
        if base is not None:  # _require_plain has seen to it
            result[key] = _weighted(key, [term for term in live if key in term.adapter.trained], base)
    return result


def _weighted(key: str, terms: list[Term], base: BaseWeights) -> Tensor:
    own = base.tensor(key.removeprefix("base_model.model.").replace(".base_layer.", ".")).double()
    total = own * (1.0 - sum(term.weight for term in terms))
    for term in terms:
        value = term.adapter.replaced[key]
        if value.shape != own.shape:
            raise ValueError(
                f"adapter {term.name}: {key} has shape {tuple(value.shape)}, the base's has"
                f" {tuple(own.shape)}"
            )
        total += value.double().to(total.device) * term.weight
    return total.float()


def _record(coefficients: Mapping[str, float], method: Any) -> dict[str, Any]:
    return {"coefficients": dict(coefficients), "method": vars(method)}
