"""Whether a run in the output folder can be gone on with: what it was started with against what is asked for
now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import base_changes
from .config import LENGTH, FinetuneConfig
from .errors import InputError
from .folder import RunFolder, read_record
from .processes import process_count

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["changed_options", "check_length", "check_same_run", "stored_run"]

_NEEDED = {"config": dict, "data": dict, "perplexity_before": dict, "sample_before": str}


def stored_run(folder: RunFolder, needed: dict[str, type] = _NEEDED) -> dict[str, Any]:
    """What run.json holds, empty where there is none; InputError where it is damaged: `needed` are its
    keys."""
    if not folder.record.exists():
        return {}
    stored = read_record(folder.record)
    for key, kind in needed.items():
        if not isinstance(stored.get(key), kind):
            raise InputError(
                f"{folder.record} is damaged ({key!r} is missing): start again with --overwrite, or "
                "name another --output"
            )
    return stored


def check_same_run(
    stored: dict[str, Any], config: FinetuneConfig, contents: dict[str, str], output: Path
) -> None:
    """Raise InputError with a line for each option, data file and file of the base that is not as in the
    `stored` run."""
    if not stored:
        return
    differing = config.differences(stored["config"], (stored.get("processes", 1), process_count()))
    changed = [source for source, value in contents.items() if stored["data"].get(source, value) != value]
    differing += [f"the content of {source} has changed" for source in changed]
    if not differing:
        differing += base_changes(stored.get("base", {}), config.model)
    if differing:
        raise InputError(
            "--resume: the run in {} was started otherwise:\n  {}\nGive the same options, data and "
            "base model, or start again "
            "with --overwrite or another --output".format(output, "\n  ".join(differing))
        )


def check_length(config: FinetuneConfig, *, planned: int, trained: int) -> None:
    """A run can be made longer, not shorter than it is."""
    if planned < trained:
        asked = f"--steps {config.steps}" if config.steps else f"--epochs {config.epochs:g}, {planned} steps"
        raise InputError(
            f"--resume: the run has trained {trained} steps already, more than {asked}: ask for more, "
            "or start again with --overwrite"
        )


def changed_options(
    stored: dict[str, Any], config: FinetuneConfig, *, planned: int, trained: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The record of a run whose options a resumption changes, each change told to `say`; the same record
    where none does."""
    changes = config.changes(stored["config"])
    if not changes:
        return stored
    say(
        "Changed for the rest of the run: "
        + ", ".join(f"{_option(name, now)} (was {before})" for name, (before, now) in changes.items())
    )
    if any(name in LENGTH for name in changes):
        say(
            f"The learning rate follows the {config.schedule} schedule of a run of {planned} steps "
            f"from step {trained + 1} on; "
            f"the steps before had the rates of the length asked for then."
        )
    history = [*stored.get("changes", []), {"after_step": trained, "options": changes}]
    return stored | {"config": config.to_dict(), "changes": history}


def _option(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')} {value}"
