"""The report on one fine-tuning that is about to be: every section measured within a time budget, and the
command they speak for."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, require
from ...finetune.config import FinetuneConfig
from ..extras import require_transfer
from .data_section import DataFound, check_data, data_section
from .page import Line, Page, Section, check_path, write_page
from .sections import (
    cut_section,
    distance_section,
    forgetting_section,
    measured,
    pretraining_section,
    run_shortly,
)
from .short_runs import ShortRuns
from .subject import Subject, load_subject

__all__ = ["BUDGET", "ReportOptions", "transfer_report"]

BUDGET = 0.02  # nats a token of source loss, as --forget-budget's example
_WINDOWS = 16  # held-out windows of target and of source
_PACKAGES = ("transformers", "peft", "accelerate", "datasets", "trl", "matplotlib", "tqdm")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is asked for: the source's texts, where the page goes, and the minutes it may take (on the machine
    at hand)."""

    source_data: tuple[str, ...]
    output: Path
    minutes: float = 10.0
    steps: int = 16
    arms: int = 4

    def __post_init__(self) -> None:
        check_path(self.output)
        if not 0 < self.minutes < float("inf"):
            raise InputError(f"--minutes must be greater than 0 and finite, got {self.minutes}")
        if self.steps < 1 or self.arms < 1:
            raise InputError(f"--steps and --arms must be at least 1, got {self.steps} and {self.arms}")


class _Clock:
    """The seconds that are left; a section that would begin after them is left out, and says so."""

    def __init__(self, minutes: float) -> None:
        self.end, self.minutes = time.monotonic() + 60 * minutes, minutes

    def section(self, question: str, measure: Callable[[], Section]) -> Section:
        if time.monotonic() > self.end:
            return Section(question, missing=f"the {self.minutes:g} minutes of --minutes were over")
        print(f"{question} ...", file=sys.stderr, flush=True)
        try:
            return measured(question, measure)
        except (
            InputError,
            ModuleNotFoundError,
        ) as error:  # one section that the texts are too few for leaves the others as they are
            return Section(question, missing=str(error))


def transfer_report(config: FinetuneConfig, options: ReportOptions, *, progress: bool = False) -> Page:
    """Measure everything, write the page to `options.output`, and return it.

    Raises: InputError for data, models and options that cannot be used, ModuleNotFoundError for a missing
    extra.
    """
    require(*_PACKAGES, *(() if config.quantization == "none" else ("bitsandbytes",)))
    require_transfer()
    config, clock = config.resolved(), _Clock(options.minutes)
    subject = load_subject(config, options.source_data, windows=_WINDOWS, steps=options.steps)
    held: list[ShortRuns] = []
    checked: list[DataFound] = []

    def cut() -> Section:
        held.append(run_shortly(subject, arms=options.arms, progress=progress))
        return cut_section(held[0])

    def data() -> Section:
        checked.append(check_data(subject))
        return data_section(checked[0])

    sections = [
        clock.section("What is wrong in the data?", data),
        clock.section(
            "How far is the target from the source?", lambda: distance_section(subject, seed=config.seed)
        ),
        clock.section("Does pretraining help?", lambda: pretraining_section(subject)),
        clock.section("Where to cut?", cut),
    ]
    question = "What will be forgotten?"
    if held:
        sections.append(clock.section(question, lambda: forgetting_section(held[0], budget=BUDGET)))
    else:
        sections.append(Section(question, missing="there was no short run to measure it on"))
    command, reasons = recommended(
        config, options, held[0] if held else None, checked[0].filters if checked else ()
    )
    page = Page(
        f"Before fine-tuning {config.model}", _facts(subject, options), tuple(sections), command, reasons
    )
    write_page(page, options.output)
    return page


def _facts(subject: Subject, options: ReportOptions) -> tuple[Line, ...]:
    config = subject.config
    return (
        Line("model", config.model, f"quantization {config.quantization}"),
        Line(
            "target",
            " ".join(config.data),
            f"{len(subject.train)} texts to train on, {len(subject.held_out)} held out",
        ),
        Line(
            "source",
            " ".join(options.source_data),
            f"{len(subject.source)} texts that are not to be forgotten",
        ),
    )


def recommended(
    config: FinetuneConfig, options: ReportOptions, runs: ShortRuns | None, filters: tuple[str, ...] = ()
) -> tuple[str, tuple[str, ...]]:
    """The command line, and a reason for each option that was measured."""
    words, reasons = ["peftkern", "finetune", "--model", config.model, "--data", *config.data], []
    if config.eval_data:
        words += ["--eval-data", *config.eval_data]
    if runs is not None and runs.cut():
        words += ["--first-layer", str(runs.cut())]
        reasons.append(
            f"--first-layer {runs.cut()}: it kept 90 % of the short run's gain, and its steps are cheaper"
        )
    if runs is not None and runs.forgotten.sign == 1:
        words += ["--source-data", *options.source_data, "--forget-budget", f"{BUDGET:g}"]
        reasons.append(
            f"--forget-budget: the short run lost {runs.forgotten.mean:.3f} nats a token on the source"
        )
    if filters:
        words += ["--filter-data", *filters]
        reasons.append(f"--filter-data: {' and '.join(filters)} were found in the rows")
    if not reasons:
        reasons.append("nothing measured speaks for an option beyond the defaults")
    return shlex.join(words), tuple(reasons)
