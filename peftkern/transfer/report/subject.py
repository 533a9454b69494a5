"""What a report is about: the model with a fresh adapter, the texts of target and source, and windows of
both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import InputError
from ...finetune.config import FinetuneConfig
from ...finetune.rows import decode_row

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["Subject", "load_subject"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """model: with a fresh LoRA adapter, patched. train, held_out, source: the texts of the rows. The windows
    hold token ids and labels [1, length]; `batches` those to train on, [B, length] each.
    """

    config: FinetuneConfig
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    source: tuple[str, ...]
    batches: tuple[dict[str, Tensor], ...]
    target_windows: tuple[dict[str, Tensor], ...]
    source_windows: tuple[dict[str, Tensor], ...]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision that the recipe trains in."""
        dtype = next(
            p.dtype for p in self.model.parameters() if p.is_floating_point() and not p.requires_grad
        )
        with torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield

    def nll(self, window: dict[str, Tensor]) -> Tensor:
        """The negative log-likelihood summed over a window's labels after the first, adapters as they are."""
        from ...finetune.loss import summed_nll

        with self.autocast():
            return summed_nll(self.model.get_base_model(), window)


def load_subject(config: FinetuneConfig, source_data: Sequence[str], *, windows: int, steps: int) -> Subject:
    """Read the rows and load the model; `config` must be resolved.

    Raises: InputError for a source without rows, or one whose rows are among the held-out ones of the target.
    """
    from ...finetune.data import load_data
    from ...finetune.inputs import load_rows, prepare, prepare_evaluations
    from ...finetune.loss import install_model_loss
    from ...finetune.model import load_model, load_tokenizer, resolve_model

    rows, named = load_rows(config)
    source_rows = load_data(tuple(source_data), option="--source-data")
    path = resolve_model(config.model)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    if not named:
        rows, held = _held_out(rows, config)
        named = {"held-out": held}
    inputs = prepare(config, rows, named, tokenizer)
    source_tokens = prepare_evaluations(config, {"source": source_rows}, tokenizer)["source"]
    model = load_model(path, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    install_model_loss(model)
    device = model.device
    held_tokens = next(iter(inputs.evaluations.values()))
    return Subject(
        config=config,
        model=model,
        tokenizer=tokenizer,
        train=_texts(rows),
        held_out=_texts(next(iter(named.values()))),
        source=_texts(source_rows),
        batches=tuple(
            _batches(_packed(inputs.train, inputs.kind, config), config.batch_size, steps, tokenizer, device)
        ),
        target_windows=tuple(_batches(held_tokens, 1, windows, tokenizer, device)),
        source_windows=tuple(_batches(source_tokens, 1, windows, tokenizer, device)),
    )


def _held_out(rows: Dataset, config: FinetuneConfig) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise InputError("the data has one row only, so none can be held out: give more rows, or --eval-data")
    count = min(len(rows) - 1, max(1, round(len(rows) * config.eval_fraction)))
    parts = rows.train_test_split(test_size=count, seed=config.seed)
    return parts["train"], parts["test"]


def _packed(tokens: Dataset, kind: str, config: FinetuneConfig) -> Dataset:
    from trl import pack_dataset

    return (
        pack_dataset(tokens, config.seq_length, "wrapped")
        if kind == "text" and config.packing is not False
        else tokens
    )


def _batches(
    tokens: Dataset, size: int, count: int, tokenizer: Any, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """`count` batches of `size` rows at equal distances; rows with fewer than two tokens are passed over."""
    usable = [i for i, labels in enumerate(tokens["labels"]) if sum(label != -100 for label in labels[1:])]
    if not usable:
        raise InputError(
            "no row has a token to predict within --seq-length: raise --seq-length, or give other rows"
        )
    wanted = min(count * size, len(usable))
    chosen = [usable[i * len(usable) // wanted] for i in range(wanted)]
    for start in range(0, len(chosen), size):
        yield _padded([tokens[i] for i in chosen[start : start + size]], tokenizer.pad_token_id or 0, device)


def _padded(rows: list[dict[str, Any]], padding: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), padding)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        labels[index, :length] = torch.tensor(row["labels"])
        mask[index, :length] = 1
    return {
        name: value.to(device)
        for name, value in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }


def _texts(rows: Dataset) -> tuple[str, ...]:
    from ..data.rows import row_text

    return tuple(row_text(decode_row(row)) for row in rows)
