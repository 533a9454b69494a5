"""Learning-rate schedules as pure functions of the global step: what a resumed run computes at a step is what
the unbroken one does.

Each gives the factor on a group's rate for the update number `step` (from 0) of `total`. Of these
transformers has all but the slanted triangular one, made here in the same form so that each serves plain
PyTorch too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "constant", "cosine", "linear", "schedule", "slanted"]


def slanted(step: int, total: int, *, warmup: float = 0.1, ratio: float = 32.0) -> float:
    """The slanted triangular schedule: a short linear rise, a long linear fall.

    factor = (1 + p (ratio - 1)) / ratio with p = step / cut before cut = floor(total * warmup), p = 1 - (step
    - cut) / (total - cut) after.

    ULMFiT divides by cut * (1 / warmup - 1) instead of total - cut, which is the same where total * warmup is
    whole; elsewhere p becomes negative before the end.

    Args:
        warmup: part of the steps over which the rate rises, in [0, 1); ULMFiT: 0.1.
        ratio: how much lower than the peak the rate begins and ends; ULMFiT: 32.
    Raises: ValueError for a ratio below 1, and as `schedule`.
    Source: Howard and Ruder, 2018, Universal Language Model Fine-tuning for Text Classification, equation 3.

    >>> slanted(10, 100), slanted(0, 100), slanted(100, 100)
    (1.0, 0.03125, 0.03125)
    """
    if not ratio >= 1:
        raise ValueError(f"ratio: got {ratio}, expected 1 or more")
    cut = _check(step, total, warmup)
    part = step / cut if step < cut else _left(step, total, cut)
    return (1 + part * (ratio - 1)) / ratio


def linear(step: int, total: int, *, warmup: float = 0.0) -> float:
    """A linear rise from 0 over the part `warmup` of the steps, then a linear fall to 0."""
    cut = _check(step, total, warmup, up=True)
    return step / cut if step < cut else _left(step, total, cut)


def cosine(step: int, total: int, *, warmup: float = 0.0) -> float:
    """A linear rise from 0 over the part `warmup` of the steps, then half a cosine down to 0."""
    cut = _check(step, total, warmup, up=True)
    return step / cut if step < cut else 0.5 * (1 + math.cos(math.pi * (1 - _left(step, total, cut))))


def constant(step: int, total: int, *, warmup: float = 0.0) -> float:
    """A linear rise from 0 over the part `warmup` of the steps, then 1."""
    cut = _check(step, total, warmup, up=True)
    return min(1.0, step / cut) if cut else 1.0


SCHEDULES: dict[str, Callable[..., float]] = {
    "slanted": slanted,
    "linear": linear,
    "cosine": cosine,
    "constant_with_warmup": constant,
}


def schedule(name: str, total: int, **options: float) -> Callable[[int], float]:
    """The schedule called `name` for a run of `total` updates, as torch.optim.lr_scheduler.LambdaLR takes it.

    It holds no state, and a scheduler stores nothing of it: an extended run goes on with the schedule of its
    new length.

    Args:
        name: one of SCHEDULES.
        options: warmup, and for "slanted" ratio.
    Raises: ValueError for another name, a total below 1, a warmup outside [0, 1).

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("slanted", 100)).get_last_lr()
    [0.03125]
    """
    if name not in SCHEDULES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(SCHEDULES)}")
    made = functools.partial(SCHEDULES[name], total=total, **options)
    made(0)  # so that a wrong option is told here
    return made


def _check(step: int, total: int, warmup: float, *, up: bool = False) -> int:
    """The step at which the rate is at its peak, rounded `up` as transformers does."""
    if total < 1:
        raise ValueError(f"total: got {total}, expected the number of updates of the run, 1 or more")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: got {warmup}, expected a part of the steps, from 0 to less than 1")
    if step < 0:
        raise ValueError(f"step: got {step}, expected 0 or more")
    return math.ceil(total * warmup) if up else math.floor(total * warmup)


def _left(step: int, total: int, cut: int) -> float:
    """From 1 at the peak to 0 at the end, and after it."""
    return max(0.0, (total - step) / max(1, total - cut))
