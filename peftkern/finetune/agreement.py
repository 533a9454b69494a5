"""One choice of `--fit` for all processes of a run: made by process 0, of the least that any of them has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..memory.planner.budgets import Limits
from ..memory.planner.cards import Card
from ..memory.planner.choose import choose
from ..memory.planner.options import RunOptions
from ..memory.planner.plan import fits
from ..memory.planner.shapes import Shape
from .errors import InputError
from .processes import is_first, process_count

__all__ = ["Need", "agree", "least_of"]


@dataclasses.dataclass(frozen=True)
class Need:
    """What one process knows of the run: the options with its longest batch, its limits, its card."""

    options: RunOptions
    limits: Limits
    card: Card


def agree(shape: Shape, need: Need) -> Need:
    """The options that all processes run with and the limits that these keep to, with this process's card.
    All processes of the run call it; one process alone chooses for itself.

    Raises: InputError, the same in every process, where nothing fits the least of them.
    """
    if process_count() == 1:
        return dataclasses.replace(need, options=choose(shape, need.options, need.limits, need.card))
    from torch import distributed

    needs: list[Any] = [None] * process_count()
    distributed.all_gather_object(needs, need)
    least = least_of(needs)
    answer = _answer(shape, least, [one.card for one in needs]) if is_first() else [None, None]
    distributed.broadcast_object_list(answer)
    options, refusal = answer
    if options is None:
        raise InputError(refusal)
    return dataclasses.replace(least, options=options, card=need.card)


def least_of(needs: Sequence[Need]) -> Need:
    """A run that fits where this one does fits in each process: the longest batch, the smallest of every
    limit, and the attention that all have; the card is that of the first process."""
    options = [need.options for need in needs]
    fields = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: min(getattr(need.limits, name) for need in needs) for name in fields})
    longest = options[0].but(
        length=max(one.length for one in options),
        dtype_bytes=max(one.dtype_bytes for one in options),
        attention=options[0].attention if len({one.attention for one in options}) == 1 else "math",
    )
    return Need(longest, limits, needs[0].card)


def _answer(shape: Shape, least: Need, cards: Sequence[Card]) -> list[Any]:
    """The options, or why there are none: what process 0 tells the others."""
    try:
        return [_chosen(shape, least, tuple(dict.fromkeys(cards))), None]
    except InputError as error:
        return [None, str(error)]


def _chosen(shape: Shape, least: Need, kinds: Sequence[Card]) -> RunOptions:
    """Options with which the run fits cards of every kind: kernels allocate otherwise on another one."""
    refusal = None
    for card in kinds:
        try:
            options = choose(shape, least.options, least.limits, card)
        except InputError as error:
            refusal = refusal or error
            continue
        if all(fits(shape, options, least.limits, other) for other in kinds):
            return options
    names = " and ".join(sorted({card.name for card in kinds}))
    raise refusal or InputError(f"no choice fits {names} alike: run on cards of one kind")
