"""Whether a model predicts each token from those before it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import InputError

if TYPE_CHECKING:
    from .trainer import RecipeTrainer

__all__ = ["require_causal"]

_TOKENS = 16
# Relative change of the logits when later tokens change. In a causal model it is 0, or the rounding of
# experts whose batches change.
_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 0.02


def require_causal(trainer: RecipeTrainer, name: str) -> None:
    """Raise InputError where the logits of a token change with the tokens after it: the next token is then
    there to be copied."""
    ids = (trainer.train_dataset[0]["input_ids"] * _TOKENS)[:_TOKENS]
    middle = _TOKENS // 2
    words = trainer.model.get_input_embeddings().weight.shape[0]
    changed = ids[:middle] + [(token + 1) % words for token in ids[middle:]]
    one, other = (_logits(trainer, tokens)[:middle] for tokens in (ids, changed))
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        raise InputError(
            f"--model {name}: its logits are NaN or infinite before training: choose another --dtype, "
            "or check its weights"
        )
    difference = ((one - other).norm() / one.norm().clamp(min=1e-30)).item()
    if not difference <= (_TOLERANCE_16_BIT if trainer.args.bf16 or trainer.args.fp16 else _TOLERANCE):
        kind = type(trainer.model.get_base_model()).__name__
        raise InputError(
            f"--model {name}: {kind} is no causal language model: its prediction of a token changes by "
            f"{difference:.1%} with the "
            "tokens after it, as in a bidirectional encoder, and what training would teach it is to "
            "copy: give a decoder"
        )


def _logits(trainer: RecipeTrainer, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=trainer.args.device)
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
