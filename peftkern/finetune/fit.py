"""Whether the tokens of a run fit the tables of its model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..adapters.prefix import position_shift
from .errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from .config import FinetuneConfig
    from .inputs import Inputs

__all__ = ["require_fit"]

# Tables of learned positions may have a few rows more than positions (OPT: 2).
_SPARE_POSITIONS = 8


def require_fit(config: FinetuneConfig, model: PeftModel, inputs: Inputs) -> None:
    """Raise InputError for token ids or positions that the model has no row for; say where positions go
    beyond its training."""
    base = model.get_base_model()
    table = base.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    largest = max(map(_largest, (inputs.train, *inputs.evaluations.values())))
    if rows is not None and largest >= rows:
        raise InputError(
            f"--model {config.model}: its tokenizer gives the token id {largest}, but the model has"
            f" embeddings for {rows} tokens only: give the tokenizer that belongs to the model, or enlarge"
            " the model (resize_token_embeddings) and save it"
        )
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    length = config.seq_length + position_shift(model)
    if not positions or length <= positions:
        return
    asked = f"--seq-length {config.seq_length}" + (
        f" after a prefix of {position_shift(model)}" if position_shift(model) else ""
    )
    learned = any(
        isinstance(module, torch.nn.Embedding)
        and module is not table
        and 0 <= module.num_embeddings - positions <= _SPARE_POSITIONS
        for module in base.modules()
    )
    if learned:
        raise InputError(f"{asked} is more than the {positions} positions that {config.model} has: lower it")
    print(
        f"{asked} is more than the {positions} positions that {config.model} was trained on.", file=sys.stderr
    )


def _largest(dataset: Dataset) -> int:
    """The largest token id, read from the mapped table batch by batch."""
    from pyarrow import compute

    return max(
        (compute.max(chunk.flatten()).as_py() or 0 for chunk in dataset.data.column("input_ids").chunks),
        default=0,
    )
