"""What a run trains on, is evaluated on and is asked: from the sources named in its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import FinetuneConfig
from .data import data_kind, evaluation_names, load_data, split
from .generation import make_prompt
from .tokens import tokenize

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Inputs",
    "is_packed",
    "is_running_text",
    "load_rows",
    "packing_strategy",
    "prepare",
    "prepare_evaluations",
]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Token ids and labels to train on and, by name, to evaluate on; the kind of the training rows; the text
    to continue. `numbers`: of each training row the one it has in --data."""

    train: Dataset
    numbers: Sequence[int]
    kind: str
    evaluations: dict[str, Dataset]
    prompt: str


def is_packed(config: FinetuneConfig, kind: str) -> bool:
    """Whether rows of this kind are put together in windows: texts by default, separate examples on
    request."""
    return kind == "text" if config.packing is None else config.packing


def is_running_text(config: FinetuneConfig, kind: str) -> bool:
    """Whether windows are cut from the texts as one stream, whole sequences with a causal mask."""
    return kind == "text" and not config.document_boundaries


def packing_strategy(config: FinetuneConfig, kind: str) -> str:
    """TRL's name: a stream cut into windows; texts kept apart, long ones in pieces; or examples kept apart,
    long ones cut."""
    if is_running_text(config, kind):
        return "wrapped"
    return "bfd_split" if kind == "text" else "bfd"


def load_rows(config: FinetuneConfig) -> tuple[Dataset, dict[str, Dataset]]:
    """The rows to train on, without those that --filter-data leaves out, and, by name, those of each
    evaluation text."""
    names = evaluation_names(config.eval_data)
    train, named = (
        load_data(config.data),
        {name: load_data(source, option="--eval-data") for name, source in names.items()},
    )
    if config.filter_data:
        from ..transfer.data.filtering import filtered

        train = filtered(train, named, config.filter_data)
    return train, named


def prepare(
    config: FinetuneConfig,
    train: Dataset,
    evaluations: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
) -> Inputs:
    """Tokenize all rows; without evaluation texts hold out a part of the training rows. `config` must be
    resolved."""
    kind = data_kind(train)
    tokens = tokenize(
        train, tokenizer, length=config.seq_length, wrapped=is_packed(config, kind), loss_on=config.loss_on
    )
    if evaluations:
        prepared = prepare_evaluations(config, evaluations, tokenizer)
        asked = next(iter(evaluations.values()))
    else:
        tokens, held_out = split(tokens, fraction=config.eval_fraction, seed=config.seed)
        prepared, asked = {"held-out": _windows(held_out, kind, config)}, train.select(held_out["row"][:])
    return Inputs(
        train=tokens.select_columns(["input_ids", "labels"]),
        numbers=tokens["row"][:],
        kind=kind,
        evaluations=prepared,
        prompt=make_prompt(config.prompt, asked, tokenizer, length=config.seq_length),
    )


def prepare_evaluations(
    config: FinetuneConfig,
    evaluations: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    option: str = "--eval-data",
) -> dict[str, Dataset]:
    """Tokenize evaluation rows: texts as windows as in training, separate examples one by one however
    training packs them."""
    prepared = {}
    for name, rows in evaluations.items():
        kind = data_kind(rows)
        tokens = tokenize(
            rows,
            tokenizer,
            length=config.seq_length,
            wrapped=is_packed(config, kind),
            loss_on=None if kind == "text" else config.loss_on,
            option=f"{option} {name}".rstrip(),
        )
        prepared[name] = _windows(tokens, kind, config)
    return prepared


def _windows(tokens: Dataset, kind: str, config: FinetuneConfig) -> Dataset:
    tokens = tokens.select_columns(["input_ids", "labels"])
    if kind != "text" or not is_packed(config, kind):
        return tokens
    if not is_running_text(config, kind):
        return tokens.map(
            _pieces, batched=True, fn_kwargs={"length": config.seq_length}, load_from_cache_file=False
        )
    from trl import pack_dataset

    return pack_dataset(tokens, config.seq_length, "wrapped")


def _pieces(columns: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Each row in pieces of at most `length` tokens; one token alone, of which nothing is predicted, is left
    out."""
    cut = {
        name: [row[i : i + length] for row in rows for i in range(0, len(row), length)]
        for name, rows in columns.items()
    }
    return {name: [piece for piece in pieces if len(piece) > 1] for name, pieces in cut.items()}
