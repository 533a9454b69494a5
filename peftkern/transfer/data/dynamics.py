"""Loss dynamics: how the loss and the margin of each row go from epoch to epoch, and what that says of its
label.

A row that is learnt late or never, while rows like it are learnt early, is often labelled wrongly. Nothing
extra is
computed: the logits of a classifier, or the losses that a step makes anyway, are noted as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AumSuspects", "Cartography", "LossDynamics", "aum_suspects", "probe_dynamics", "with_fake_class"]

_PERCENTILE = 99.0  # of the fake class, Pleiss et al. 2020


@dataclass(frozen=True)
class Cartography:
    """Each row's place on the map of Swayamdipta et al. (2020), over the epochs in which it was seen.

    confidence   [n], mean probability of its label (of a token of it, for generation data)
    variability  [n], standard deviation of that over the epochs
    correct      [n], share of the epochs in which its label had the largest logit; NaN where no logits were
    noted
    """

    confidence: np.ndarray
    variability: np.ndarray
    correct: np.ndarray

    @property
    def hard(self) -> np.ndarray:
        """Rows by rising confidence: hard to learn, ambiguous only if the variability is large as well."""
        return self.confidence.argsort(kind="stable")

    def draw(self, axes: Any) -> None:
        """The map: confidence over variability."""
        axes.scatter(self.variability, self.confidence, s=4, alpha=0.4)
        axes.set(
            xlabel="standard deviation of the label's probability over epochs",
            ylabel="its mean",
            title="Rows at the lower left are never learnt: look at their labels",
        )


class LossDynamics:
    """What was noted of `rows` rows in each of `epochs` epochs; NaN where a row was not seen.

    >>> dynamics = LossDynamics(rows=2, epochs=1)
    >>> dynamics.note(0, [1], logits=torch.tensor([[2.0, 0.5]]), labels=torch.tensor([0]))
    >>> dynamics.aum()[1]
    1.5
    """

    def __init__(self, rows: int, epochs: int) -> None:
        import numpy as np

        if rows < 1 or epochs < 1:
            raise ValueError(f"rows, epochs: got {rows} and {epochs}, expected 1 or more")
        self.probability = np.full((epochs, rows), np.nan)
        self.margin = np.full((epochs, rows), np.nan)

    def note(
        self,
        epoch: int,
        rows: Sequence[int] | Tensor,
        *,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        losses: Tensor | None = None,
    ) -> None:
        """What a batch gave: either a classifier's logits [B, c] with labels [B], or losses [B] in nats (a
        token).

        Losses make confidence and variability; the margin, and so AUM, needs logits. Call it where the
        batch's loss is computed anyway, with the rows' numbers in the data, which a collator can hand on.
        """
        if (logits is None) == (losses is None) or (logits is None) != (labels is None):
            raise ValueError("logits, labels, losses: give logits and labels, or losses")
        where = torch.as_tensor(rows, device="cpu").long().numpy()
        if losses is None:
            scores, labels = logits.detach().float(), labels.to(logits.device)
            self.margin[epoch, where] = _margins(scores, labels).cpu().double().numpy()
            losses = F.cross_entropy(scores, labels, reduction="none")
        self.probability[epoch, where] = (-losses.detach().float()).exp().cpu().double().numpy()

    def aum(self) -> np.ndarray:
        """[n]: the area under the margin, the mean over epochs of the label's logit minus the largest other
        one."""
        return _mean(self.margin, "margins: note logits and labels")

    def cartography(self) -> Cartography:
        """Confidence, variability and correctness of every row."""
        import numpy as np

        confidence = _mean(self.probability, "losses")
        with np.errstate(invalid="ignore"):
            correct = np.where(np.isnan(self.margin), np.nan, self.margin > 0)
        shares = np.full(correct.shape[1], np.nan)
        noted = ~np.isnan(correct).all(0)
        shares[noted] = np.nanmean(correct[:, noted], axis=0)
        return Cartography(confidence, np.nanstd(self.probability, axis=0), shares)


@dataclass(frozen=True)
class AumSuspects:
    """Rows whose area under the margin is not above what a class of wrong labels by construction reaches.

    rows        suspects, the smallest area first
    aum         [n]
    threshold   the 99th percentile of the rows of the fake class
    """

    rows: tuple[int, ...]
    aum: np.ndarray
    threshold: float

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        share = len(self.rows) / len(self.aum)
        return (
            f"{len(self.rows)} of {len(self.aum)} rows ({share:.1%}) are learnt no better than wrong"
            " labels are"
        )

    def draw(self, axes: Any) -> None:
        """The areas, and the threshold."""
        axes.hist(self.aum, bins=60)
        axes.axvline(self.threshold, linestyle="--", color="black", label="99 % of the wrong labels")
        axes.set(xlabel="area under the margin (logits)", ylabel="rows", title=self.verdict)
        axes.legend()


def with_fake_class(
    labels: np.ndarray,
    *,
    classes: int,
    seed: int = 0,
    part: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] with n / (classes + 1) rows moved to a class of its own, number `classes`, and those rows.

    Training with them shows how rows with a wrong label behave. Parts 0, 1, ... move other rows each: AUM
    needs two trainings, so that each row is once not among the moved ones.
    """
    import numpy as np

    count = max(1, len(labels) // (classes + 1))
    order = np.random.default_rng(seed).permutation(len(labels))
    moved = np.sort(np.take(order, np.arange(part * count, (part + 1) * count), mode="wrap"))
    changed = np.asarray(labels).copy()
    changed[moved] = classes
    return changed, moved


def aum_suspects(aum: np.ndarray, fake: Sequence[int], *, percentile: float = _PERCENTILE) -> AumSuspects:
    """The rows with an area at or below the `percentile` of the fake class's rows, which are no suspects
    themselves.

    Source: Pleiss et al., 2020, Identifying Mislabeled Data using the Area Under the Margin Ranking, section
        3.2.
    """
    import numpy as np

    if not len(fake):
        raise ValueError("fake: got no rows, expected those of `with_fake_class`")
    threshold = float(np.percentile(aum[np.asarray(fake)], percentile))
    candidates = np.setdiff1d(np.flatnonzero(aum <= threshold), np.asarray(fake))
    ranked = candidates[aum[candidates].argsort(kind="stable")]
    return AumSuspects(tuple(int(row) for row in ranked), aum, threshold)


def probe_dynamics(
    features: np.ndarray | Tensor,
    labels: Sequence[int],
    *,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 0.1,
    seed: int = 0,
) -> LossDynamics:
    """The dynamics of a linear softmax classifier on features that are standardized, by SGD with momentum.

    Cheap where a network is not to be trained; a linear head on few features hardly learns wrong labels by
    heart, so that many epochs do no harm.

    Args:
        features: [n, D]; labels: [n], from 0.
    Raises: InputError for fewer than two classes, or features of other length.
    """
    x, y = torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(labels).long()
    if len(x) != len(y) or len(y.unique()) < 2:
        raise InputError(
            f"features of {len(x)} rows and labels of {len(y)}, expected as many, of two classes or more",
        )
    generator = torch.Generator().manual_seed(seed)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr / x.shape[1] ** 0.5, momentum=0.9)
    dynamics = LossDynamics(len(x), epochs)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            logits = head(x[rows])
            dynamics.note(epoch, rows, logits=logits, labels=y[rows])
            optimizer.zero_grad()
            F.cross_entropy(logits, y[rows]).backward()
            optimizer.step()
    return dynamics


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """[B]: the label's logit minus the largest of the others'."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.amax(1)


def _mean(values: np.ndarray, what: str) -> np.ndarray:
    """[n], over the epochs in which a row was seen."""
    import numpy as np

    unseen = np.isnan(values).all(0)
    if unseen.any():
        raise ValueError(f"row {int(unseen.argmax())} and {int(unseen.sum()) - 1} more have no {what}")
    return np.nanmean(values, axis=0)
