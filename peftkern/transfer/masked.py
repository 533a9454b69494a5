"""Masked language modelling on a target's text: masks that change with every step, documents kept apart in a
window.

transformers' collator draws its masks from the process's generator, or with `seed` from one of its own whose
state is in no checkpoint (data_collator.py at 5.24, read): a resumed run masks other tokens. Here they are a
pure function of seed, step and row. Its 15 % / 80 / 10 / 10 are BERT's (Devlin et al., 2019,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .alignment import divides_loss, step_seed
from .windows import windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DocumentCollator", "MaskedPretrainingMixin", "Masking", "pack_documents", "packed_as_alone"]

IGNORED = -100
# How far a document's logits in a window may be from those alone, in 16 bits: MiniLM in bf16 rounds to 0.009,
# a RoBERTa whose positions are off is at 0.75.
_HALF = 0.05
EVALUATION = -1  # stands for the step where nothing is trained: held-out rows have the same masks each time


@dataclass(frozen=True)
class Masking:
    """Which tokens are to be predicted, and what stands in their place."""

    mask_id: int
    vocabulary: int
    special: tuple[int, ...]
    rate: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise InputError(f"the part of the tokens to mask must be between 0 and 1, got {self.rate}")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, rate: float = 0.15, seed: int = 0) -> Masking:
        """By a tokenizer, which needs a mask token."""
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token: masked pretraining needs an encoder")
        return cls(tokenizer.mask_token_id, len(tokenizer), tuple(tokenizer.all_special_ids), rate, seed)

    def __call__(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Masked ids and labels (-100 where nothing is predicted), of ids [B, S], for this step.

        Each token but the special ones is chosen with probability `rate`, of each row at least one; of the
        chosen 80 % become the mask, 10 % any token, 10 % stay. A row's draws depend on seed, step and its
        tokens alone, not on its place.
        """
        draws = torch.stack([self._draws(row, step) for row in ids.cpu()]).to(ids.device)  # [B, 3, S]
        usable = ~torch.isin(ids, torch.tensor(self.special, device=ids.device))
        choice = draws[:, 0].masked_fill(~usable, 2.0)
        chosen = choice < self.rate
        least = choice.argmin(1, keepdim=True)
        chosen = (chosen | torch.zeros_like(chosen).scatter(1, least, True)) & usable
        labels = ids.masked_fill(~chosen, IGNORED)
        masked = torch.where(chosen & (draws[:, 1] < 0.8), self.mask_id, ids)
        other = (draws[:, 2] * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        return torch.where(chosen & (draws[:, 1] >= 0.8) & (draws[:, 1] < 0.9), other, masked), labels

    def _draws(self, row: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, *row.tolist()))
        return torch.rand(3, len(row), generator=generator, dtype=torch.float64)


def pack_documents(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    packed: bool = True,
) -> Any:
    """Texts as windows of at most `length` tokens: columns input_ids and seq_lengths, the lengths of the
    documents within.

    A text longer than a window is cut into pieces, each with the tokens that begin and end a text. With
    `packed` several share a window (best fit decreasing, by TRL), else each has one of its own.
    """
    from datasets import Dataset

    if not texts:
        raise InputError("there are no texts to train on: give at least one")
    pieces = [ids for _, ids, _ in windows(tokenizer, texts, length)]
    if not pieces:
        raise InputError(f"all {len(texts)} texts are empty: give texts with words")
    if packed:
        from trl import pack_dataset

        return pack_dataset(Dataset.from_dict({"input_ids": pieces}), length, "bfd")
    return Dataset.from_dict({"input_ids": pieces, "seq_lengths": [[len(piece)] for piece in pieces]})


@dataclass(frozen=True)
class DocumentCollator:
    """Windows as a batch: input_ids [B, S]; where one holds several documents, also their positions and
    attention mask.

    positions [B, S] begin at 0 with each document, attention_mask [B, 1, S, S] is block-diagonal: bool for
    SDPA, additive in `dtype` for eager attention. Padding attends to itself alone, so that no row of the
    softmax is empty.
    """

    pad_id: int
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.attention not in ("sdpa", "eager"):
            name = self.attention
            raise InputError(f"attention {name!r} takes no mask of documents: load the model with sdpa")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        size = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), size), self.pad_id)
        documents, positions = (
            torch.zeros(len(rows), size, dtype=torch.long),
            torch.zeros(len(rows), size, dtype=torch.long),
        )
        for index, row in enumerate(rows):
            ids[index, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
            start = 0
            for number, length in enumerate(row["seq_lengths"]):
                documents[index, start : start + length] = number + 1
                positions[index, start : start + length] = torch.arange(length)
                start += length
        if max(len(row["seq_lengths"]) for row in rows) == 1:
            return {"input_ids": ids, "attention_mask": (documents > 0).long()}
        same = (documents[:, :, None] == documents[:, None, :]) & (documents > 0)[:, None, :]
        same |= torch.eye(size, dtype=torch.bool)
        mask = same[:, None]
        if self.attention == "eager":
            mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def packed_as_alone(model: nn.Module, collator: DocumentCollator, length: int, *, seed: int = 0) -> bool:
    """Whether a document in a window gives the logits that it gives alone: position by position, attention by
    attention.

    False for models with position offsets (RoBERTa), with attention of bounded reach where the window is
    longer, or that
    mix positions otherwise: train those with `pack_documents(..., packed=False)`.
    """
    size, device = max(2, length // 2), next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second = (torch.randint(5, vocabulary, (size,), generator=generator).tolist() for _ in range(2))
    together = collator([{"input_ids": first + second, "seq_lengths": [size, size]}])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            placed = {name: value.to(device) for name, value in together.items()}
            packed = model(**placed).logits[0, size:].float()
            alone = model(input_ids=torch.tensor([second], device=device)).logits[0].float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    tolerance = 1e-3 if next(model.parameters()).dtype is torch.float32 else _HALF
    return bool((packed - alone).norm() <= tolerance * alone.norm())


class MaskedPretrainingMixin:
    """For a Trainer's class, before it: `class MyTrainer(MaskedPretrainingMixin, Trainer)`, then set
    `masking` on the trainer.

    The rows have no labels: they are made of each batch, in training for its step, in evaluation the same
    ones each time.
    """

    masking: Masking | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean cross-entropy, in nats, of the tokens that are masked for this step."""
        if self.masking is None:
            raise InputError("masking: set it on the trainer: trainer.masking = Masking.of(tokenizer)")
        step = self.state.global_step if model.training else EVALUATION
        ids, labels = self.masking(inputs["input_ids"], step)
        # The batch's mean: how many tokens a step predicts is not known when its batches are counted.
        outputs = model(**(inputs | {"input_ids": ids, "labels": labels}))
        loss = outputs.loss
        if model.training and not divides_loss(self, num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        """The loss alone: there are no labels before the masks are drawn."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None
