"""Cross-entropy of a frozen output head without the [tokens, vocabulary] logits.

TRL's fused head recomputes the logits in backward and sums statistics for its logs: right on a GPU, where a kernel does it, but on a
CPU that was 2.6 s of a 5.7 s step (SmolLM2-135M, 512 tokens, 2 AVX2 cores). As the head is frozen, the gradient of the hidden states
can be taken in forward, block by block, with two matrix products instead of three: `functional.linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..functional import linear_cross_entropy

__all__ = ["frozen_head_loss", "has_plain_head"]

# Options by which architectures change the logits after the head.
_LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def has_plain_head(model: Any) -> bool:
    """Whether the logits of this causal LM are exactly its frozen linear head applied to the last hidden state."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and not head.weight.requires_grad
        and all(getattr(config, name, None) in (None, 1, 1.0) for name in _LOGIT_OPTIONS)
        and not getattr(config, "output_router_logits", False)
    )


def frozen_head_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token negative log-likelihood.

    `hidden` is [batch, length, H], `weight` [vocabulary, H] (takes no gradient), `labels` int64 [batch, length], -100 where there is
    nothing to predict. Returns a float32 scalar.
    """
    return linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], reduction="sum")
