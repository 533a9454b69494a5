"""Domain-adversarial training: features from which a discriminator cannot tell the source domain from the
target.

The discriminator learns to tell them apart; what reaches the features is its gradient reversed and scaled by
a weight that rises from 0 to 1 (Ganin et al., 2016). The weight scales only that, not what the discriminator
itself learns by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .extras import require_transfer

if TYPE_CHECKING:
    import numpy as np

    from .probes import Probe

__all__ = [
    "DANNLoss",
    "Discriminator",
    "DomainProbe",
    "annealed_rate",
    "domain_probe",
    "reversal_weight",
    "reverse_gradient",
]


def reversal_weight(progress: float, *, steepness: float = 10.0) -> float:
    """2 / (1 + exp(-steepness * progress)) - 1: from 0 at the start to 0.9999 at the end of training.

    Args:
        progress: step / steps of the whole run, in [0, 1]: a pure function of the step, so that a resumed run
            goes on rightly.
    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17 (2016), section 5.2.

    >>> [round(reversal_weight(progress), 3) for progress in (0, 0.1, 0.5, 1)]
    [0.0, 0.462, 0.987, 1.0]
    """
    _check_progress(progress)
    return 2 / (1 + math.exp(-steepness * progress)) - 1


def annealed_rate(progress: float, *, alpha: float = 10.0, beta: float = 0.75) -> float:
    """(1 + alpha * progress)^-beta: what the learning rates are multiplied by, from 1 to 0.17 (ibid.)."""
    _check_progress(progress)
    return (1 + alpha * progress) ** -beta


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: got {progress}, expected the part of training that is done, from 0 to 1")


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * dy, None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """x itself, whose gradient is that of the output times -`weight`; of any shape and dtype."""
    return _Reverse.apply(x, float(weight))


class Discriminator(nn.Module):
    """Tells domains apart by one logit [rows] (above 0: source) of features [rows, D], in fp32 whatever they
    are in.

    Two hidden layers with ReLU (Ganin et al.). It sees the features shifted by the batch's mean [D] and
    divided by the batch's
    root mean square about it, one number, both without a gradient: hidden states may be hundreds in size, and
    grow in training, which would saturate it. The weights are drawn by `seed` alone.
    """

    def __init__(self, width: int, *, hidden: int = 256, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if width < 1 or hidden < 1:
            raise ValueError(f"width, hidden: got {width} and {hidden}, expected at least 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            layers += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)]
            self.layers = nn.Sequential(*layers).float()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [rows] in fp32; of rows of both domains, or their means are taken for one."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float() - features.detach().float().mean(0)
            size = centred.detach().square().mean().sqrt().clamp(min=1e-12)
            return self.layers(centred / size)[:, 0]


class DANNLoss(nn.Module):
    """The discriminator's loss, through which its reversed gradient reaches the features.

    loss = (mean over source of softplus(-logit) + mean over target of softplus(logit)) / 2

    Each domain has one half of the loss, however many rows it has. Add it to the task's loss as it is; give
    `parameters()`, the discriminator's, to the optimizer with a rate of their own.

    >>> dann = DANNLoss(8)
    >>> loss = dann(torch.randn(16, 8), torch.randn(16, 8), progress=0.5)
    >>> sorted(dann.metrics)
    ['discriminator_accuracy', 'domain_loss', 'reversal_weight']
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 256,
        dropout: float = 0.0,
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < strength < math.inf:
            raise ValueError(f"strength: got {strength}, expected above 0 and finite")
        self.width = width
        self.discriminator = Discriminator(width, hidden=hidden, dropout=dropout, seed=seed)
        self.strength = strength
        self.metrics: dict[str, float | Tensor] = {}

    def forward(self, source: Tensor, target: Tensor, *, progress: float) -> Tensor:
        """A scalar in fp32, log 2 where the discriminator is blind; `metrics` then says how well it did.

        Args:
            source, target: features [m, D] and [n, D], pooled without padding (`features.pool_mean` with its
                mask).
            progress: step / steps, in [0, 1].
        Raises: ValueError for a domain without rows, other widths, NaN or infinite features.
        """
        _check_features(source, target, self.width)
        weight = self.strength * reversal_weight(progress)
        features = torch.cat([source.float(), target.float()])
        logits = self.discriminator(reverse_gradient(features, weight))
        of_source, of_target = logits[: len(source)], logits[len(source) :]
        loss = (F.softplus(-of_source).mean() + F.softplus(of_target).mean()) / 2
        with torch.no_grad():
            accuracy = ((of_source > 0).float().mean() + (of_target <= 0).float().mean()) / 2
        self.metrics = {
            "domain_loss": loss.detach(),
            "discriminator_accuracy": accuracy,
            "reversal_weight": weight,
        }
        return loss


def _check_features(source: Tensor, target: Tensor, width: int) -> None:
    for name, features in (("source", source), ("target", target)):
        if features.dim() != 2 or features.shape[1] != width or not len(features):
            shape = tuple(features.shape)
            raise ValueError(f"{name}: got features of shape {shape}, expected [rows, {width}]")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: got features that are NaN or infinite: look at the model")


@dataclass(frozen=True)
class DomainProbe:
    """How well fresh classifiers, trained after the fact on frozen features, tell the domains apart on
    held-out rows.
    """

    linear: Probe
    kernel: Probe
    rows: int

    @property
    def verdict(self) -> str:
        """In words; 0.5 is what a coin has."""
        linear, kernel = self.linear.accuracy, self.kernel.accuracy
        measured = f"linear {linear.mean:.2f} [{linear.low:.2f}, {linear.high:.2f}], "
        measured += f"RBF {kernel.mean:.2f} [{kernel.low:.2f}, {kernel.high:.2f}]"
        if max(linear.low, kernel.low) > 0.5:
            return f"a fresh classifier still tells the domains apart (held-out accuracy: {measured})"
        return f"fresh classifiers cannot tell the domains apart (held-out accuracy: {measured})"


def domain_probe(
    source: np.ndarray,
    target: np.ndarray,
    *,
    most_rows: int = 500,
    folds: int = 5,
    seed: int = 0,
) -> DomainProbe:
    """Train a linear and an RBF classifier to tell source from target features; a discriminator at 0.5 may
    just be weak.

    Args:
        source, target: features [m, D] and [n, D] of the adapted model, without gradients.
        most_rows: of each domain, as many of both.
    Raises: InputError for fewer rows than folds; ModuleNotFoundError without scikit-learn.
    """
    require_transfer()
    import numpy as np
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    from .probes import Probe, probe, splits

    source, target = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise InputError("the features are NaN or infinite: look at the model and its dtype")
    rows = min(len(source), len(target), most_rows)
    draw = np.random.default_rng(seed)
    features = np.concatenate([part[draw.permutation(len(part))[:rows]] for part in (source, target)])
    domains = np.repeat([0, 1], rows)
    where = splits(domains, folds=folds, repeats=1, seed=seed)
    scores = []
    for train, test in where.rows:
        model = make_pipeline(StandardScaler(), SVC()).fit(features[train], domains[train])
        scores.append(float(model.score(features[test], domains[test])))
    return DomainProbe(probe(features, domains, where), Probe(tuple(scores), folds), rows)
