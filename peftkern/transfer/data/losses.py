"""The loss of each row of generation data under a model: rows that stay unlikely are often broken, or of
another language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from ...finetune.inference import LoadedModel

__all__ = ["RowLosses", "row_losses"]


@dataclass(frozen=True)
class RowLosses:
    """Mean negative log-likelihood of the tokens that each row is to teach.

    nats    [n], a token; NaN for rows without a token to learn
    tokens  [n], how many those are
    worst   [n], the largest loss of a single token
    """

    nats: np.ndarray
    tokens: np.ndarray
    worst: np.ndarray

    def above(self, percentile: float) -> tuple[int, ...]:
        """Rows above that percentile of the losses, the largest first."""
        import numpy as np

        if not 0 <= percentile <= 100:
            raise InputError(f"the percentile of losses must be from 0 to 100, got {percentile}")
        bound = np.nanpercentile(self.nats, percentile)
        rows = np.flatnonzero(self.nats > bound)
        return tuple(int(row) for row in rows[(-self.nats[rows]).argsort(kind="stable")])

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        import numpy as np

        low, middle, high = np.nanpercentile(self.nats, [5, 50, 95])
        return f"median loss {middle:.2f} nats a token, 90 % of the rows from {low:.2f} to {high:.2f}"

    def draw(self, axes: Any) -> None:
        """How the losses are spread."""
        import numpy as np

        axes.hist(self.nats[np.isfinite(self.nats)], bins=60)
        axes.set(xlabel="mean loss of a row (nats per token)", ylabel="rows", title=self.verdict)


def row_losses(loaded: LoadedModel, rows: Dataset, *, count: int, progress: bool = False) -> RowLosses:
    """One forward pass over tokenized rows (`finetune.tokens.tokenize`: input_ids, labels, row), without
    logits.

    `count` rows there were before those without a token to learn were left out.

    A row counts with the tokens that training would learn of it: of a prompt row its completion. A fair judge
    has not seen the rows: a base, or an adapter that was trained on the other half.

    Raises: InputError where no row has a token to learn.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from ...finetune.loss import token_nll

    base = loaded.model.get_base_model() if loaded.has_adapter else loaded.model
    nats, tokens, worst = np.full(count, np.nan), np.zeros(count, np.int64), np.full(count, np.nan)
    for example in tqdm(rows, desc="losses", unit="row", disable=not progress):
        ids, labels = (torch.tensor([example[key]], device=base.device) for key in ("input_ids", "labels"))
        with torch.no_grad(), loaded.autocast():
            losses = token_nll(base, {"input_ids": ids, "labels": labels})[0]
        learnt = losses[labels[0, 1:].to(losses.device) != -100].double()
        if len(learnt):
            row = example["row"]
            nats[row], tokens[row], worst[row] = learnt.mean().item(), len(learnt), learnt.max().item()
    if not tokens.sum():
        raise InputError("no row has a token to learn within --seq-length: raise it, or give other rows")
    return RowLosses(nats, tokens, worst)
