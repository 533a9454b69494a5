"""Leaving rows out before training, by the checks that need no model: `peftkern finetune --filter-data`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...errors import InputError
from ...finetune.constants import FILTERS
from ...finetune.rows import decode_row
from .duplicates import near_duplicates
from .overlap import overlap
from .rows import row_text

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["filtered"]


def filtered(train: Dataset, evaluations: Mapping[str, Dataset], filters: Sequence[str]) -> Dataset:
    """The training rows without near duplicates of others, and without those that hold text of the
    evaluation.

    Which rows go depends on the rows alone, so that a resumed run trains on the same. Says how many went.

    Args:
        train, evaluations: rows as `finetune.data.load_data` gives them.
        filters: of FILTERS.
    Raises: InputError for another filter, for "overlap" without evaluation texts, or where no row is left.
    """
    unknown = [name for name in filters if name not in FILTERS]
    if unknown:
        raise InputError(f"--filter-data must be of {', '.join(FILTERS)}; got {unknown[0]!r}")
    if "overlap" in filters and not evaluations:
        raise InputError(
            "--filter-data overlap needs --eval-data; without it the evaluation is a part of --data",
        )
    texts, out = _texts(train), dict[str, set[int]]()
    if "overlap" in filters:
        shared = overlap(texts, [text for rows in evaluations.values() for text in _texts(rows)])
        out["hold text of --eval-data"] = set(shared.training)
    if "duplicates" in filters:
        repeated = near_duplicates(texts, progress=sys.stderr.isatty())
        out["are near duplicates of others"] = {duplicate.row for duplicate in repeated.dropped}
    gone = set().union(*out.values())
    said = ", ".join(f"{len(rows)} {what}" for what, rows in out.items())
    print(f"--filter-data: {len(gone)} of {len(texts)} rows are left out: {said}.", file=sys.stderr)
    if len(gone) == len(texts):
        raise InputError("--filter-data leaves no row to train on: give other data, or drop the filter")
    return train.select([index for index in range(len(texts)) if index not in gone]) if gone else train


def _texts(rows: Dataset) -> list[str]:
    return [row_text(decode_row(row)) for row in rows]
