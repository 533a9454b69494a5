"""Choosing and doubting an adapted model without target labels: two scores, and an estimate of the label
shift.

Aligning domains whose classes are mixed in other proportions hurts: the joint error of any classifier is then
bounded from below (Zhao et al., 2019, On Learning Invariant Representations). The estimate of the target's
proportions says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .extras import require_transfer

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LabelShift", "information_maximization", "label_shift", "soft_neighborhood_density"]

_TILE = 1024  # rows of a similarity matrix at a time
_WORTH_A_WARNING = 0.1  # total variation distance between the domains' class proportions


def information_maximization(logits: Tensor) -> float:
    """H(mean of p) - mean of H(p) in nats, of target logits [n, classes]: the higher, the surer and the more
    diverse.

    It is the mutual information of input and prediction: 0 where all predictions are alike, log(classes) at
    most.
    Source: Krause et al., Discriminative Clustering by Regularized Information Maximization, NeurIPS 2010.
    """
    log_p = _log_probabilities(logits)
    p = log_p.exp()
    mean = p.mean(0)
    return float(-torch.special.xlogy(mean, mean).sum() + (p * log_p).sum(1).mean())


def soft_neighborhood_density(logits: Tensor, *, temperature: float = 0.05) -> float:
    """The mean entropy, in nats, of how similar a target row's prediction is to the others': the higher, the
    denser.

    Of target logits [n, classes]: s_ij = cosine(p_i, p_j) / temperature, j != i, softmax over j, entropy,
    mean over i. Tiled: memory O(n). It may also be high where all collapse into one class: read it beside
    `information_maximization`.
    Source: Saito et al., Tune it the Right Way, ICCV 2021.
    """
    rows = F.normalize(_log_probabilities(logits).exp(), dim=1)
    total = rows.new_zeros(())
    for start in range(0, len(rows), _TILE):
        part = rows[start : start + _TILE]
        scores = part @ rows.t() / temperature
        index = torch.arange(len(part), device=rows.device)
        scores[index, start + index] = -torch.inf
        log_q = F.log_softmax(scores, dim=1)
        total -= (log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0)).sum()
    return float(total / len(rows))


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or len(logits) < 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape)
        raise InputError(f"logits: got shape {shape}, expected at least 2 rows of at least 2 classes")
    if not torch.isfinite(logits).all():
        raise InputError("logits: some are NaN or infinite: look at the model and its dtype")
    return F.log_softmax(logits.double(), dim=1)


@dataclass(frozen=True)
class LabelShift:
    """The source's class proportions, the target's as estimated, and their total variation distance with its
    interval.
    """

    source: tuple[float, ...]
    target: tuple[float, ...]
    distance: float
    low: float
    high: float

    @property
    def shifted(self) -> bool:
        """Whether the distance is above 0.1 beyond the estimate's uncertainty."""
        return self.low > _WORTH_A_WARNING

    @property
    def verdict(self) -> str:
        """In words."""
        measured = f"total variation distance {self.distance:.2f} [{self.low:.2f}, {self.high:.2f}]"
        if self.shifted:
            return (
                f"the predictions speak for other class proportions in the target ({measured}): either they "
                "differ, and aligning the domains may hurt, or the model errs on some classes"
            )
        if self.high < _WORTH_A_WARNING:
            return f"the classes' proportions are alike ({measured})"
        return f"cannot tell whether the classes' proportions differ ({measured})"

    def draw(self, axes: Any) -> None:
        """Both proportions, class by class."""
        index = range(len(self.source))
        axes.bar([i - 0.2 for i in index], self.source, width=0.4, label="source")
        axes.bar([i + 0.2 for i in index], self.target, width=0.4, label="target, estimated")
        axes.set(xlabel="class", ylabel="proportion", title=self.verdict.split(" (")[0])
        axes.legend()


def label_shift(
    source_logits: Tensor,
    source_labels: Sequence[int],
    target_logits: Tensor,
    *,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
    warn: bool = True,
) -> LabelShift:
    """Estimate the target's class proportions from predictions alone, and warn where they differ from the
    source's.

    The q that solves C q = mean target prediction, where column j of C is the mean prediction on held-out
    source rows of class j (soft black-box shift estimation), q >= 0 and of sum 1. It holds as far as p(x |
    class) is that of the source: under another shift it is a hint. The interval is a bootstrap over source
    and target rows.

    Args:
        source_logits: [m, classes] of held-out source rows; on training rows C is too good.
        source_labels: [m].
        target_logits: [n, classes].
        warn: give a UserWarning where the proportions differ.
    Raises: InputError for fewer than two classes, or a class without a row.
    Source: Lipton et al., Detecting and Correcting for Label Shift with Black Box Predictors, ICML 2018.
    """
    require_transfer()
    import numpy as np

    source = _log_probabilities(source_logits).exp().cpu().numpy()
    target = _log_probabilities(target_logits).exp().cpu().numpy()
    labels, classes = np.asarray(source_labels), source.shape[1]
    if len(labels) != len(source) or target.shape[1] != classes:
        got = f"got {len(labels)} labels and {target.shape[1]} target classes"
        raise InputError(f"{got}, expected {len(source)} and {classes}")
    counts = np.bincount(labels, minlength=classes)
    if len(counts) > classes or (counts == 0).any():
        got = f"source_labels: got {counts.tolist()} rows of the classes 0, 1, ..."
        raise InputError(f"{got}, expected some of each of {classes}")
    of_class = [np.flatnonzero(labels == label) for label in range(classes)]
    proportions = counts / counts.sum()
    estimate = _solved(source, of_class, target)
    random = np.random.default_rng(seed)
    distances = []
    for _ in range(draws):
        drawn = [random.choice(rows, len(rows)) for rows in of_class]
        resampled = random.multinomial(len(labels), proportions) / len(labels)
        other = _solved(source, drawn, target[random.integers(len(target), size=len(target))])
        distances.append(_variation(other - estimate, resampled - proportions))
    distance = 0.5 * float(np.abs(estimate - proportions).sum())
    # The distance is at least 0, so its bootstrap is biased upwards: what the estimates scatter by is taken
    # off and added.
    margin = float(np.quantile(distances, level))
    found = LabelShift(
        tuple(map(float, proportions)),
        tuple(map(float, estimate)),
        distance,
        max(0.0, distance - margin),
        min(1.0, distance + margin),
    )
    if warn and found.shifted:
        warnings.warn(found.verdict, stacklevel=2)
    return found


def _variation(one: np.ndarray, other: np.ndarray) -> float:
    return 0.5 * float(abs(one - other).sum())


def _solved(source: np.ndarray, of_class: Sequence[Any], target: np.ndarray) -> np.ndarray:
    """q [classes] of least squares under q >= 0 and sum(q) = 1, the latter by a heavy row."""
    import numpy as np
    from scipy.optimize import nnls

    confusion = np.stack([source[rows].mean(0) for rows in of_class], axis=1)
    heavy = 1e3
    system = np.concatenate([confusion, np.full((1, len(of_class)), heavy)])
    q, _ = nnls(system, np.concatenate([target.mean(0), [heavy]]))
    return q / q.sum()
