"""--source-data, --forget-budget, --ewc, --l2-sp and --replay at work in a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, require
from .forgetting_options import OPTION, needs_factors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..transfer.forgetting import FisherFactors
    from .config import FinetuneConfig
    from .trainer import RecipeTrainer

__all__ = [
    "FOLDER",
    "choose_adapter",
    "forgetting_lines",
    "install_forgetting",
    "load_source",
]

FOLDER = "forgetting"  # in the output: the Fisher information, and the adapters on the Pareto front
_HELD_OUT = 0.25  # of the source rows: measured on, never trained on
_FISHER_WINDOWS = 64
_LEAST_WINDOWS = 8


def load_source(
    config: FinetuneConfig, evaluations: dict[str, Dataset], train: Dataset
) -> tuple[Dataset, Dataset] | None:
    """The rows to keep and the held-out ones to measure on; None without --source-data.

    Raises InputError where there are fewer than two rows, or where they share passages with what the run is
    evaluated on.
    """
    if not config.source_data:
        return None
    from ..transfer.forgetting.overlap import overlapping
    from .data import load_data

    require("scipy", extra="transfer")
    rows = load_data(config.source_data, option=OPTION)
    if len(rows) < 2:
        raise InputError(
            f"{OPTION} has one row only, so none can be held out to measure on: give more rows, or split it"
        )
    texts = _texts(rows)
    for name, evaluated in (evaluations or {"--data (a part of it is held out)": train}).items():
        shared = overlapping(texts, _texts(evaluated))
        if shared:
            raise InputError(
                f"{OPTION} overlaps the evaluation text {name}: {len(shared)} of its {len(rows)} rows share"
                f" passages with it, the first at {rows[shared[0]]['place']}. Leave those rows out of one of"
                " them, or evaluate on other text"
            )
    return _split(rows, texts, config.seed)


def install_forgetting(
    trainer: RecipeTrainer,
    config: FinetuneConfig,
    source: tuple[Dataset, Dataset],
    *,
    folder: Path,
    planned: int,
    say: Callable[[str], None],
) -> None:
    """Let the trainer watch over the source: Fisher information in `folder` (read if it is there), penalties,
    replay, measurements."""
    from ..transfer.forgetting import ForgettingGuard, Replay
    from ..transfer.forgetting.guard import unprotected

    tokenizer = trainer.processing_class
    kept, held_out = (_Rows(trainer, _windows(config, rows, tokenizer)) for rows in source)
    measured = held_out.spread(max(_LEAST_WINDOWS, config.eval_tokens // config.seq_length))
    target = _Rows(trainer, next(iter(trainer.eval_dataset.values())))
    reason = unprotected(trainer.model)
    if reason and needs_factors(config):
        raise InputError(
            f"--forget-budget, --ewc and --l2-sp cannot hold this adapter: {reason}; use --replay"
        )
    fisher = None if reason else _fisher(trainer, config, kept, folder, say)
    every = config.source_steps or config.save_steps
    guard = ForgettingGuard(
        trainer.model,
        source=measured,
        target=target,
        planned=planned,
        fisher=fisher,
        ewc=config.ewc or 0.0,
        l2_sp=config.l2_sp or 0.0,
        budget=config.forget_budget,
        every=every,
        folder=folder,
    )
    replay = None
    if config.replay:
        slots = config.batch_size * config.grad_accumulation
        replay = Replay(rows=len(kept), ratio=config.replay, slots=slots, seed=config.seed)
    trainer.guard_with(guard, replay=replay, replay_rows=kept)


def choose_adapter(trainer: RecipeTrainer, say: Callable[[str], None]) -> dict[str, Any] | None:
    """With a budget put the adapter of the best point within it into the model; what a result tells of
    forgetting."""
    guard = trainer.guard
    if guard is None or not guard.front.points:
        return None
    point, last = guard.front.points[-1], guard.front.points[-1]
    if guard.budget is not None:
        best = guard.best()
        if best is None:
            best = min(guard.front.front, key=lambda each: each.rise)
            say(
                f"No measured adapter forgets at most {guard.budget.nats:g} nats: the one that forgets least"
                f" is kept, of step {best.step}. Lower --lr or measure more often (--source-steps)."
            )
        point = best
        if point.step != last.step:
            trainer.load_adapter_of(guard.front.path(point.step))
    return {
        "step": point.step,
        "source_rise": point.rise,
        "source_rise_error": point.standard_error,
        "target_loss": point.target,
        "budget": guard.budget.nats if guard.budget else None,
        "stopped_early": guard.stopped,
    }


def forgetting_lines(found: dict[str, Any] | None) -> list[str]:
    """What the closing lines of a run say."""
    if found is None:
        return []
    budget = f" of {found['budget']:g} allowed" if found["budget"] is not None else ""
    early = "; training ended there, as more was forgotten than allowed" if found["stopped_early"] else ""
    return [
        f"Forgotten:  {found['source_rise']:+.4f} nats per token{budget} (standard error"
        f" {found['source_rise_error']:.4f}), adapter of step {found['step']}{early}"
    ]


def _fisher(
    trainer: RecipeTrainer, config: FinetuneConfig, kept: _Rows, folder: Path, say: Callable[[str], None]
) -> FisherFactors:
    from ..transfer.forgetting import FisherFactors, collect_fisher, lora_factors

    path = folder / "fisher.safetensors"
    if path.exists():
        try:
            fisher = FisherFactors.load(path)
            fisher.require_base(lora_factors(trainer.model))
            return fisher
        except ValueError as error:
            say(f"{error}.")
    say("Measuring what to keep ...")
    fisher = collect_fisher(
        trainer.model,
        kept.spread(_FISHER_WINDOWS),
        labels=config.fisher,
        seed=config.seed,
        progress=sys.stderr.isatty(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    fisher.save(path)
    return fisher


class _Rows(Sequence[Any]):
    """Rows of a tokenized dataset as batches of one, collated when they are asked for."""

    def __init__(self, trainer: RecipeTrainer, dataset: Dataset) -> None:
        self.trainer, self.dataset = trainer, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self.dataset):
            raise IndexError(index)
        return dict(self.trainer.data_collator([self.dataset[index]]))

    def spread(self, count: int) -> _Rows:
        """At most so many, at equal distances."""
        from .trainer import spread

        return _Rows(self.trainer, spread(self.dataset, count))


def _windows(config: FinetuneConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    from .inputs import prepare_evaluations

    prepared = prepare_evaluations(config, {"": rows}, tokenizer, option=OPTION)[""]
    if len(prepared) < 2:
        raise InputError(
            f"{OPTION}: {len(prepared)} window of --seq-length {config.seq_length} is too little: give more"
            " text"
        )
    return prepared


def _texts(rows: Dataset) -> list[str]:
    names = [name for name in rows.column_names if name != "place"]
    return [
        " ".join(str(value) for value in values)
        for values in zip(*(rows[name][:] for name in names), strict=True)
    ]


def _split(rows: Dataset, texts: list[str], seed: int) -> tuple[Dataset, Dataset]:
    """A quarter of the rows to measure on, and of the others those that share no passage with it."""
    import random

    from ..transfer.forgetting.overlap import overlapping

    order = list(range(len(rows)))
    random.Random(f"source {seed}").shuffle(order)
    count = min(len(rows) - 1, max(1, round(len(rows) * _HELD_OUT)))
    held_out, others = sorted(order[:count]), sorted(order[count:])
    shared = set(overlapping([texts[index] for index in others], [texts[index] for index in held_out]))
    kept = [index for place, index in enumerate(others) if place not in shared]
    if not kept:
        raise InputError(
            f"{OPTION}: its rows repeat each other, so that none is left beside those to measure on: give"
            " other text"
        )
    return rows.select(kept), rows.select(held_out)
