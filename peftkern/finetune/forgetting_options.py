"""--source-data, --forget-budget, --ewc, --l2-sp and --replay: which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from .config import FinetuneConfig

__all__ = ["OPTION", "check_forgetting", "needs_factors"]

OPTION = "--source-data"
_FISHERS = ("true", "empirical")


def check_forgetting(config: FinetuneConfig) -> None:
    """Raise InputError where the options that hold the source's knowledge do not go together."""
    given = [
        name for name in ("forget_budget", "ewc", "l2_sp", "replay") if getattr(config, name) is not None
    ]
    if given and not config.source_data:
        raise InputError(f"{_flag(given[0])} needs text of what must not be forgotten: give {OPTION}")
    if config.replay is not None and not config.replay <= 1:
        raise InputError(
            f"--replay must be at most 1, source rows for each training row, got {config.replay:g}"
        )
    if config.forget_budget is not None and config.ewc is not None:
        raise InputError(
            "give --forget-budget (the weight follows from it) or --ewc (a fixed weight), not both"
        )
    if config.fisher not in _FISHERS:
        raise InputError(f"--fisher must be one of {', '.join(_FISHERS)}; got {config.fisher!r}")
    if needs_factors(config) and config.dora:
        raise InputError(
            "--forget-budget, --ewc and --l2-sp hold an update s B A, and --dora scales the rows of the"
            " weight besides: drop --dora, or use --replay"
        )


def needs_factors(config: FinetuneConfig) -> bool:
    """Whether an update is held by Fisher information, as low-rank factors tell it."""
    return any(value is not None for value in (config.forget_budget, config.ewc, config.l2_sp))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
