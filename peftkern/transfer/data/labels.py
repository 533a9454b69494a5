"""Wrong labels, found by confident learning on probabilities of models that have not seen the row's label.

cleanlab does the confident learning; here are the out-of-fold probabilities that it must be given, from a
linear probe on frozen features, and the uncertainty of the rate. With in-sample probabilities a model that
has learnt a wrong label is confident of it, and nothing is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..probes import check_labels, splits
from .extras import require_data

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LabelNoise", "label_noise", "out_of_fold"]

_CS = (1e-3, 1e-2, 1e-1, 1.0)
_DRAWS = 200  # of the bootstrap
_LEAST_SHARE = 0.005  # of wrong labels, below which a set is called clean


@dataclass(frozen=True)
class LabelNoise:
    """What confident learning says about n labels of c classes.

    classes      [c], in sorted order
    suspects     rows whose label is probably wrong, the worst first
    suggested    [n], the class that the other folds' probes give each row
    confidence   [n], the out-of-fold probability of the given label
    thresholds   [c], t_j: the mean probability of class j over the rows that are labelled j
    joint        [c, c], estimated joint distribution of given (rows) and true label (columns); sums to 1
    rate         the share of wrong labels, 1 - trace(joint): an upper bound where the features do not
    foretell the
                 true label, as rows that are hard for them count as wrong; low and high: its 95 % bootstrap
                 interval over rows, which leaves out the error of the probes themselves
    accuracy     of the out-of-fold probes on the given labels
    majority     the share of the largest class among them
    """

    classes: tuple[Any, ...]
    suspects: tuple[int, ...]
    suggested: np.ndarray
    confidence: np.ndarray
    thresholds: np.ndarray
    joint: np.ndarray
    rate: float
    low: float
    high: float
    accuracy: float
    majority: float

    @property
    def accuracy_se(self) -> float:
        """The standard error of `accuracy`."""
        return (self.accuracy * (1 - self.accuracy) / len(self.confidence)) ** 0.5

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        interval = f"estimated share {self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"
        if self.high < _LEAST_SHARE:
            return f"the labels are clean as far as these features tell ({interval})"
        if self.accuracy < self.majority + 2 * self.accuracy_se:
            return (
                "cannot tell: probes of these features foretell the labels no better than the largest class"
                " does"
            )
        said = f"{len(self.suspects)} of {len(self.confidence)} labels are suspected ({interval})"
        if 1 - self.accuracy < 2 * self.rate:
            # The probes err on hardly more rows than are called wrong: nothing tells a wrong label from a
            # hard row.
            said += (
                f"; the probes agree with {self.accuracy:.0%} of the labels, so hard rows are among them:"
                " look first"
            )
        return said

    def draw(self, axes: Any) -> None:
        """How sure the probes are of the given labels, suspects apart."""
        import numpy as np

        bins = np.linspace(0, 1, 41)
        suspect = np.zeros(len(self.confidence), dtype=bool)
        suspect[list(self.suspects)] = True
        axes.hist(self.confidence[~suspect], bins=bins, label="not suspected")
        axes.hist(self.confidence[suspect], bins=bins, label="suspected")
        axes.set(xlabel="out-of-fold probability of the given label", ylabel="rows", title=self.verdict)
        axes.legend()


def out_of_fold(
    features: Any,
    labels: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """[n, c]: for each row the class probabilities of logistic probes trained on folds without it, averaged
    over repeats.

    Features are standardized on the training folds; the L2 penalty is the one with the best held-out log-loss
    on an inner split of them.

    Args:
        features: [n, D], dense or sparse.
        labels: [n], two classes or more; groups: [n], rows of one group (a document) are never on both sides.
    Raises: InputError for missing labels, one class, fewer documents or rows of a class than folds, features
        that are not finite or not one a label.
    """
    require_data("sklearn")
    import numpy as np
    from tqdm import tqdm

    check_labels(list(labels), groups, folds)
    _check_features(features, labels)
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    where = splits(list(labels), groups=groups, folds=folds, repeats=repeats, seed=seed)
    probabilities = np.zeros((len(y), len(classes)))
    for train, test in tqdm(where.rows, desc="out-of-fold probes", unit="fold", disable=not progress):
        named = None if where.groups is None else where.groups[train]
        model = _fitted(features[train], y[train], named, seed)
        probabilities[np.ix_(test, model.classes_)] += model.predict_proba(features[test]) / repeats
    return probabilities


def label_noise(
    labels: Sequence[Any],
    probabilities: np.ndarray,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> LabelNoise:
    """Confident learning by cleanlab: which labels are probably wrong, and how many.

    A row labelled i counts as a confident j where p(j) is at least t_j and the largest of those; the joint of
    given and true labels is made of these counts, and so many rows a class as its off-diagonal says are
    suspected, by margin. Suspects are ranked by self-confidence, the smallest probability of the given label
    first.

    Args:
        labels: [n]; probabilities: [n, c] in the sorted order of the classes, from models that have not seen
            the row's label (`out_of_fold`).
    Raises: InputError as `out_of_fold`; ValueError for probabilities that are none.
    Source: Northcutt et al., 2021, Confident Learning, arXiv:1911.00068.
    """
    require_data("cleanlab")
    import numpy as np
    from cleanlab.count import estimate_joint, get_confident_thresholds
    from cleanlab.filter import find_label_issues

    check_labels(list(labels), None, 2)
    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    _check_probabilities(probabilities, len(y), len(classes))
    suspects = find_label_issues(y, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    joint = np.asarray(estimate_joint(y, probabilities))
    low, high = _bootstrap(y, probabilities, draws, seed)
    return LabelNoise(
        classes=tuple(classes.tolist()),
        suspects=tuple(int(row) for row in suspects),
        suggested=classes[probabilities.argmax(1)],
        confidence=probabilities[np.arange(len(y)), y],
        thresholds=np.asarray(get_confident_thresholds(y, probabilities)),
        joint=joint,
        rate=float(1 - np.trace(joint)),
        low=low,
        high=high,
        accuracy=float((probabilities.argmax(1) == y).mean()),
        majority=float(np.bincount(y).max() / len(y)),
    )


def _check_features(features: Any, labels: Sequence[Any]) -> None:
    import numpy as np

    shape = getattr(features, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(labels):
        raise InputError(f"features: got shape {shape} for {len(labels)} labels, expected one row a label")
    values = getattr(features, "data", features) if hasattr(features, "tocsr") else features
    if not np.isfinite(np.asarray(values)).all():
        raise InputError("features: some are NaN or infinite: take them in fp32")


def _check_probabilities(probabilities: Any, rows: int, classes: int) -> None:
    import numpy as np

    shape = np.shape(probabilities)
    if shape != (rows, classes):
        raise ValueError(f"probabilities: got shape {shape}, expected ({rows}, {classes}): rows and classes")
    sums = np.asarray(probabilities).sum(1)
    if not np.isfinite(sums).all() or np.min(probabilities) < 0 or np.abs(sums - 1).max() > 1e-3:
        raise ValueError("probabilities: expected rows of numbers from 0 to 1 that add up to 1")


def _fitted(features: Any, labels: np.ndarray, groups: np.ndarray | None, seed: int) -> Any:
    """A probe on all rows with the penalty that an inner split of them favours."""
    from scipy.sparse import issparse
    from sklearn.metrics import log_loss

    (train, test), sparse = _inner_split(labels, groups, seed), issparse(features)
    losses = {}
    for c in _CS:
        model = _probe(c, sparse).fit(features[train], labels[train])
        losses[c] = log_loss(labels[test], model.predict_proba(features[test]), labels=model.classes_)
    return _probe(min(losses, key=losses.get), sparse).fit(features, labels)


def _probe(c: float, sparse: bool) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(with_mean=not sparse), LogisticRegression(C=c, max_iter=300))


def _inner_split(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A fifth of the rows held out, with every class on both sides."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    count = min(5, int(np.bincount(labels)[np.unique(labels)].min()))
    if groups is not None:
        count = min(count, len(np.unique(groups)))
    if count < 2:
        raise InputError(
            "a fold leaves one row (or document) of a class to train on: give more rows, or fewer folds",
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(n_splits=count, shuffle=True, random_state=seed)
    split = splitter.split(np.zeros(len(labels)), labels, groups)
    return max(split, key=lambda pair: len(np.unique(labels[pair[0]])))


def _bootstrap(y: np.ndarray, probabilities: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % points of the rate over resampled rows; draws that lose a class are left out."""
    import numpy as np
    from cleanlab.count import estimate_joint

    generator, rates = np.random.default_rng(seed), []
    for _ in range(draws):
        rows = generator.integers(0, len(y), len(y))
        if len(np.unique(y[rows])) == probabilities.shape[1]:
            rates.append(1 - np.trace(estimate_joint(y[rows], probabilities[rows])))
    if not rates:
        return 0.0, 1.0
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)
