"""Linear probes under grouped, repeated cross-validation, and the controls they are read against.
scikit-learn does the fitting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .extras import require_transfer
from .grouped_ridge import choose_penalty
from .intervals import Interval, cross_validated

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PROBES", "Probe", "Splits", "bag_of_words", "probe", "splits"]

PROBES = ("ridge", "logistic")
_ALPHAS = tuple(10.0**power for power in range(5))  # of standardized features
_INNER = 3  # folds of the inner cross-validation
_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_SPARSE_CS = (0.1, 1.0)


@dataclass(frozen=True)
class Probe:
    """Held-out accuracies of a probe, one a fold of each repetition, in the order of the splits, and their
    mean with its interval.
    """

    scores: tuple[float, ...]
    folds: int

    @property
    def accuracy(self) -> Interval:
        """Mean accuracy; the standard error allows for training sets that overlap
        (`intervals.cross_validated`).
        """
        return cross_validated(self.scores, folds=self.folds)

    def minus(self, other: Probe) -> Interval:
        """The paired difference of two probes on the same splits."""
        if len(self.scores) != len(other.scores):
            raise ValueError(
                f"other: got {len(other.scores)} scores, expected {len(self.scores)}: probes on the same"
                " splits"
            )
        return cross_validated(
            [a - b for a, b in zip(self.scores, other.scores, strict=True)],
            folds=self.folds,
        )


@dataclass(frozen=True)
class Splits:
    """(train, test) rows of each fold of each repetition, with the groups that stay together."""

    rows: tuple[tuple[np.ndarray, np.ndarray], ...]
    folds: int
    groups: np.ndarray | None


def splits(
    labels: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    folds: int = 5,
    repeats: int = 5,
    seed: int = 0,
) -> Splits:
    """Stratified folds, `repeats` times shuffled anew; rows of one group (a document) are never on both
    sides.

    Raises InputError for labels that are missing, for one class, and for fewer documents or rows of a class
    than folds.
    """
    require_transfer()
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels, groups = _plain(labels), None if groups is None else _plain(groups)
    check_labels(labels, groups, folds)
    y, named = (
        np.asarray(labels),
        None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1],
    )
    kind = StratifiedKFold if named is None else StratifiedGroupKFold
    rows: list[tuple[Any, Any]] = []
    for repeat in range(repeats):
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed + repeat)
        rows += list(splitter.split(np.zeros(len(y)), y, named))
    for train, _ in rows:
        if len(np.unique(y[train])) < 2:
            raise InputError(
                "a fold's training rows are of one class, as its documents are: give more documents, or fewer"
                " folds"
            )
    return Splits(tuple(rows), folds, named)


def _plain(values: Any) -> Sequence[Any]:
    """A list of Python's own values for an array or a tensor, whose elements would not compare as keys."""
    return values.tolist() if hasattr(values, "tolist") else values


def check_labels(labels: Sequence[Any], groups: Sequence[Any] | None, folds: int) -> None:
    """Raise InputError where these labels cannot be cross-validated, naming the remedy."""
    missing = [index for index, label in enumerate(labels) if label is None or label != label]
    if not len(labels) or missing:
        where = f"row {missing[0]} and {len(missing) - 1} more have none" if missing else "there are none"
        raise InputError(
            f"labels are needed here, and {where}: give labelled data, or measure what needs no labels"
        )
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(
            f"all {len(labels)} labels are {next(iter(counts))!r}: a probe needs at least two classes"
        )
    if folds < 2:
        raise InputError(f"folds must be at least 2, got {folds}")
    rarest, rows = min(counts.items(), key=lambda item: item[1])
    if rows < folds:
        raise InputError(
            f"class {rarest!r} has {rows} rows, fewer than {folds} folds: give more of them, fewer folds, or"
            " leave it out"
        )
    if groups is not None:
        if len(groups) != len(labels):
            raise InputError(f"there are {len(groups)} groups for {len(labels)} labels, expected one each")
        documents = len(set(groups))
        if documents < folds:
            raise InputError(
                f"there are {documents} documents, fewer than {folds} folds: give more documents, or fewer"
                " folds"
            )


def probe(
    features: Any,
    labels: Sequence[Any],
    where: Splits,
    *,
    kind: str = "ridge",
    seed: int = 0,
    components: int | None = None,
    balanced: bool = False,
) -> Probe:
    """Standardize on the training rows, fit a linear classifier whose L2 penalty an inner cross-validation
    picks, score the rest.

    Args:
        features: [n, D]; sparse ones are left unscaled, and a linear support vector machine is fitted to
            them, whatever `kind`.
        kind: "ridge" (RidgeClassifierCV: with leave-one-out in closed form for rows without groups, seconds)
            or "logistic" (LogisticRegressionCV: multinomial, slower).
        components: keep so many principal components (of dense features), fitted on the training rows.
        balanced: score the mean of the classes' accuracies instead of the accuracy.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    if kind not in PROBES:
        raise ValueError(f"kind: got {kind!r}, expected one of {PROBES}")
    y = np.unique(np.asarray(_plain(labels)), return_inverse=True)[1]
    score = balanced_accuracy_score if balanced else accuracy_score
    scores = []
    for train, test in where.rows:
        inner = _inner(y[train], None if where.groups is None else where.groups[train], seed)
        before = _preprocessing(features, components)
        x, other = features[train], features[test]
        if before is not None:
            with np.errstate(invalid="ignore"):  # components of features that do not vary
                x, other = before.fit_transform(x), before.transform(other)
        model = _classifier(kind, x, y[train], inner, where.groups is None).fit(x, y[train])
        scores.append(float(score(y[test], model.predict(other))))
    return Probe(tuple(scores), where.folds)


def _preprocessing(features: Any, components: int | None) -> Any:
    """Standardize, and keep so many principal components; nothing for sparse features."""
    from scipy.sparse import issparse
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if issparse(features):
        return None
    fewer = components is not None and components < features.shape[1]
    return make_pipeline(StandardScaler(), *([PCA(components, random_state=0)] if fewer else []))


def _classifier(kind: str, x: Any, y: np.ndarray, inner: list[tuple[Any, Any]], independent: bool) -> Any:
    """A linear classifier, not fitted, that chooses its penalty by the inner splits, or has it."""
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegressionCV, RidgeClassifier, RidgeClassifierCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    if issparse(x):
        machine = LinearSVC(dual=True, max_iter=2000, random_state=0)
        return GridSearchCV(machine, {"C": _SPARSE_CS}, cv=inner)
    if kind == "logistic":
        return LogisticRegressionCV(Cs=_CS, cv=inner, max_iter=1000, **_logistic_options())
    if independent:
        return RidgeClassifierCV(alphas=_ALPHAS)
    return RidgeClassifier(alpha=choose_penalty(x, y, inner, _ALPHAS))


def _logistic_options() -> dict[str, Any]:
    """What newer releases of scikit-learn want said, and older ones do not know."""
    import inspect

    from sklearn.linear_model import LogisticRegressionCV

    known = inspect.signature(LogisticRegressionCV).parameters
    options: dict[str, Any] = {"scoring": "accuracy"}
    if "use_legacy_attributes" in known:
        options |= {"use_legacy_attributes": False, "l1_ratios": (0.0,)}
    return options


def _inner(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> list[tuple[Any, Any]]:
    """Inner splits, grouped as the outer ones; fewer where a class or the documents are fewer."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    most = min(
        _INNER,
        int(np.bincount(labels)[np.unique(labels)].min()),
        len(labels) if groups is None else len(np.unique(groups)),
    )
    if most < 2:
        raise InputError(
            "a fold's training rows leave a class or document alone: give more documents, or fewer folds"
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    return list(
        kind(n_splits=most, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels, groups),
    )


def bag_of_words(texts: Sequence[str], *, characters: bool = False) -> Any:
    """A sparse [n, V] matrix of tf-idf weights of words (or of character 1- to 3-grams): what a probe sees
    without any model.

    The vocabulary and the document frequencies are those of all texts; they use no labels.
    """
    require_transfer()
    from sklearn.feature_extraction.text import TfidfVectorizer

    options: dict[str, Any] = (
        {
            "analyzer": "char",
            "ngram_range": (1, 3),
        }
        if characters
        else {"token_pattern": r"(?u)\b\w+\b"}
    )
    fewest = 2 if len(texts) >= 100 else 1
    try:
        return TfidfVectorizer(min_df=fewest, max_features=20000, sublinear_tf=True, **options).fit_transform(
            texts,
        )
    except ValueError as error:
        raise InputError(f"the texts hold no words to count ({error}): give texts of words") from None
