"""How far a target domain lies from a source, measured before training: in features, on the surface, in
words, and for the model.

The proxy A-distance comes with what it is between halves of one domain (its null), and with the same distance
of surfaces (characters, lengths): domains that these tell apart as well may differ in form alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import InputError
from .extras import require_transfer
from .features import Features, pooled_features
from .intervals import Interval, cross_validated
from .lexical import Lexicon, TextRate, bits_per_byte, fertility, lexicon, surface
from .probes import Probe, Splits, bag_of_words, probe, splits

if TYPE_CHECKING:
    import numpy as np

    from .mmd import MMDTest

__all__ = [
    "DomainReport",
    "ProxyDistance",
    "distance_by_depth",
    "domain_similarity",
    "proxy_a_distance",
]


@dataclass(frozen=True)
class ProxyDistance:
    """A proxy A-distance: 0 where a linear classifier cannot tell two domains apart, 2 where it does without
    an error.

    `interval` is of 2 (1 - 2 error) unclamped, which lies around 0 (also below) for one domain; `null` holds
    those of halves of one.
    """

    interval: Interval
    null: tuple[float, ...]
    rows: int

    @property
    def value(self) -> float:
        """The distance, in [0, 2]."""
        return min(2.0, max(0.0, self.interval.mean))

    @property
    def null_high(self) -> float:
        """What 95 % of the halves of one domain stay below; infinite where there was nothing to halve."""
        import numpy as np

        return float(np.quantile(self.null, 0.95)) if self.null else float("inf")

    @property
    def differs(self) -> bool:
        """Whether the interval lies above 0 and above the null."""
        return self.interval.low > 0 and self.interval.low > self.null_high

    @property
    def verdict(self) -> str:
        """In words."""
        low, high = max(0.0, self.interval.low), min(2.0, max(0.0, self.interval.high))
        measured = (
            f"A-distance {self.value:.2f} [{low:.2f}, {high:.2f}] of at most 2, halves of one domain up to"
            f" {self.null_high:.2f}"
        )
        return (
            f"the domains differ ({measured})"
            if self.differs
            else f"cannot tell the domains apart ({measured})"
        )


def proxy_a_distance(
    source: Any,
    target: Any,
    *,
    source_documents: Sequence[Any] | None = None,
    target_documents: Sequence[Any] | None = None,
    folds: int = 5,
    repeats: int = 3,
    null_draws: int = 10,
    kind: str = "ridge",
    seed: int = 0,
) -> ProxyDistance:
    """2 (1 - 2 error), error: the balanced held-out error of a linear classifier that tells source rows from
    target rows.

    As many rows of both are used; rows of one document are never on both sides of a split. The features are
    standardized and reduced to a tenth as many principal components as there are training rows, as in more
    dimensions anything is separable by chance; the L2 penalty comes from an inner cross-validation. The null:
    each domain's documents are halved at random, `null_draws` times in all, and the halves told apart in the
    same manner. They have half as many rows, hence a wider spread than the distance itself.

    Args:
        source, target: [m, D] and [n, D], dense or both sparse.
        source_documents, target_documents: the document of each row; default: each row is its own.
    Raises: InputError for fewer than 2 * folds documents a domain, which have to be halved and split.
    Source: Ben-David et al., 2006, Analysis of Representations for Domain Adaptation, section 4.
    """
    require_transfer()
    import numpy as np

    documents = [
        np.unique(np.arange(x.shape[0]) if given is None else np.asarray(given), return_inverse=True)[1]
        for x, given in ((source, source_documents), (target, target_documents))
    ]
    for name, x, owners in zip(("source", "target"), (source, target), documents, strict=True):
        _check_domain(name, x, owners, folds)
    rng = np.random.default_rng(seed)
    size = min(source.shape[0], target.shape[0])
    rows = [np.sort(rng.permutation(x.shape[0])[:size]) for x in (source, target)]
    both = _stacked([x[index] for x, index in zip((source, target), rows, strict=True)])
    owners = [owner[index] for owner, index in zip(documents, rows, strict=True)]
    single = source_documents is None and target_documents is None
    told = _told_apart(both, size, owners, single, folds, repeats, kind, seed)
    scores = [2 * (1 - 2 * (1 - accuracy)) for accuracy in told.scores]
    null = _null((source, target), documents, single, folds, null_draws, kind, rng)
    return ProxyDistance(cross_validated(scores, folds=folds), tuple(null), size)


def _check_domain(name: str, x: Any, documents: np.ndarray, folds: int) -> None:
    if len(documents) != x.shape[0]:
        raise InputError(
            f"{name}: there are {len(documents)} documents for {x.shape[0]} rows, expected one each"
        )
    count = len(set(documents.tolist()))
    if count < 2 * folds:
        raise InputError(
            f"{name}: there are {count} documents, fewer than the {2 * folds} that halving and {folds} folds"
            " need: give more documents, or fewer folds"
        )


def _stacked(parts: Sequence[Any]) -> Any:
    import numpy as np
    from scipy.sparse import issparse, vstack

    return vstack(parts).tocsr() if issparse(parts[0]) else np.concatenate(parts)


def _told_apart(
    both: Any,
    size: int,
    documents: Sequence[np.ndarray],
    single: bool,
    folds: int,
    repeats: int,
    kind: str,
    seed: int,
) -> Probe:
    import numpy as np

    labels = np.repeat([0, 1], [size, both.shape[0] - size])
    owners = np.concatenate([documents[0], documents[0].max() + 1 + documents[1]])
    where = _usable(
        splits(labels, groups=None if single else owners, folds=folds, repeats=repeats, seed=seed),
        labels,
    )
    components = max(2, int(both.shape[0] * (1 - 1 / folds)) // 10)
    return probe(both, labels, where, kind=kind, seed=seed, components=components, balanced=True)


def _usable(where: Splits, labels: np.ndarray) -> Splits:
    """Without the folds whose test rows are of one domain, as happens where documents are few and long."""
    rows = tuple((train, test) for train, test in where.rows if len(set(labels[test].tolist())) == 2)
    if not rows:
        raise InputError(
            "no fold holds documents of both domains: give more, shorter documents, or fewer folds"
        )
    return Splits(rows, where.folds, where.groups)


def _null(
    domains: Sequence[Any],
    documents: Sequence[np.ndarray],
    single: bool,
    folds: int,
    draws: int,
    kind: str,
    rng: Any,
) -> list[float]:
    """Distances between random halves of a domain's documents, the domains in turn."""
    import numpy as np

    values = []
    for draw in range(draws):
        x, owners = domains[draw % 2], documents[draw % 2]
        names = rng.permutation(np.unique(owners))
        first = np.isin(owners, names[: len(names) // 2])
        halves = [np.flatnonzero(first), np.flatnonzero(~first)]
        size = min(map(len, halves))
        halves = [np.sort(rng.permutation(half)[:size]) for half in halves]
        both = _stacked([x[half] for half in halves])
        told = _told_apart(both, size, [owners[half] for half in halves], single, folds, 1, kind, draw)
        values.append(2 * (1 - 2 * (1 - sum(told.scores) / len(told.scores))))
    return values


def distance_by_depth(
    features: Features,
    rows: int,
    *,
    pool: str = "mean",
    **options: Any,
) -> dict[int, ProxyDistance]:
    """The distance after every depth of one pass over source and target: where in a model the domains part.

    Args:
        features: of the source's texts, `rows` of them, followed by the target's.
        options: of `proxy_a_distance`.
    """
    found = {depth: features.at(depth, pool) for depth in features.depths}
    return {depth: proxy_a_distance(x[:rows], x[rows:], **options) for depth, x in found.items()}


@dataclass(frozen=True)
class DomainReport:
    """The distances of two domains: of features, of characters, of lengths; MMD; words; and the base model's
    bits a byte, if it has.
    """

    features: ProxyDistance
    characters: ProxyDistance
    lengths: ProxyDistance
    mmd: MMDTest
    words: Lexicon
    source_bits: TextRate | None
    target_bits: TextRate | None
    source_fertility: TextRate
    target_fertility: TextRate

    @property
    def verdict(self) -> str:
        """In words, with what speaks against reading it as a difference of topic."""
        text = f"{self.features.verdict[0].upper()}{self.features.verdict[1:]}."
        if self.features.differs and self.lengths.value >= self.features.value - 0.2:
            text += (
                " Lengths and kinds of characters alone tell them apart as well: the distance may be one of"
                " form, not of topic."
            )
        elif self.features.differs and self.characters.value >= self.features.value:
            text += " Characters alone tell them apart as well as the model's features do."
        return text

    def table(self) -> str:
        """The report as a table of Markdown."""
        lines = ["| measure | value | 95 % interval | halves of one domain |", "|---|--:|--:|--:|"]
        for name, distance in (
            ("features", self.features),
            ("characters", self.characters),
            ("lengths", self.lengths),
        ):
            low, high = (min(2.0, max(0.0, x)) for x in (distance.interval.low, distance.interval.high))
            lines.append(
                f"| A-distance, {name} | {distance.value:.2f} | {low:.2f} - {high:.2f} | up to"
                f" {max(0, distance.null_high):.2f} |"
            )
        lines.append(f"| MMD² | {self.mmd.value:.3g} | p = {self.mmd.p_value:.3g} | |")
        lines.append(
            f"| words in common, of the most frequent | {self.words.overlap:.1%} | |"
            f" {self.words.within_overlap:.1%} |"
        )
        lines.append(
            f"| divergence of the words, bits | {self.words.divergence:.3f} | |"
            f" {self.words.within_divergence:.3f} |"
        )
        for name, source, target in (
            ("bits a byte of the base", self.source_bits, self.target_bits),
            ("tokens a word", self.source_fertility, self.target_fertility),
        ):
            if source is not None and target is not None:
                lines.append(
                    f"| {name} | {source.value:.3f} → {target.value:.3f} | ± {source.se:.3f}, ±"
                    f" {target.se:.3f} (s.e.) | |"
                )
        return "\n".join([*lines, "", self.verdict])

    def draw(self, axes: Any) -> None:
        """The A-distances with their intervals, each beside its null."""
        names = ("features", "characters", "lengths")
        for place, distance in enumerate((self.features, self.characters, self.lengths)):
            half = distance.interval.high - distance.interval.mean
            axes.errorbar(
                place,
                distance.value,
                min(half, 2.0),
                marker="o",
                color="tab:blue",
                label="source against target" * (place == 0),
            )
            axes.hlines(
                max(0.0, distance.null_high),
                place - 0.25,
                place + 0.25,
                color="gray",
                label="halves of one (95 %)" * (place == 0),
            )
        apart = "differ" if self.features.differs else "cannot be told apart"
        title = f"The domains {apart}: A-distance {self.features.value:.2f} of 2"
        axes.set(ylabel="proxy A-distance", ylim=(-0.1, 2.1), xticks=range(3), xticklabels=names, title=title)
        axes.legend()


def domain_similarity(
    model: nn.Module,
    source: Sequence[str],
    target: Sequence[str],
    *,
    tokenizer: Any,
    source_documents: Sequence[Any] | None = None,
    target_documents: Sequence[Any] | None = None,
    depth: int = -1,
    folds: int = 5,
    repeats: int = 3,
    null_draws: int = 10,
    bits: bool = True,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> DomainReport:
    """Measure how far the texts of a target domain lie from those of a source.

    Args:
        model: its features after `depth` layers (-1: all), pooled by the mean, are told apart; its bits a
            byte are measured where its forward pass gives logits over a vocabulary (`bits`).
        source_documents, target_documents, folds, repeats, null_draws: of `proxy_a_distance`.
        `options`: of `pooled_features`.
    """
    require_transfer()
    sides, n = [*source, *target], len(source)
    found = pooled_features(
        model,
        sides,
        tokenizer=tokenizer,
        pools=("mean",),
        depths=[depth],
        progress=progress,
        **options,
    )
    documents = (source_documents, target_documents)
    rates = [
        (
            bits_per_byte(
                model,
                texts,
                tokenizer,
                progress=progress,
            )
            if bits
            else None
        )
        for texts in (source, target)
    ]

    def distance(values: Any) -> ProxyDistance:
        return proxy_a_distance(
            values[:n],
            values[n:],
            source_documents=documents[0],
            target_documents=documents[1],
            folds=folds,
            repeats=repeats,
            null_draws=null_draws,
            seed=seed,
        )

    values = found.at(found.depths[-1])
    return DomainReport(
        features=distance(values),
        characters=distance(bag_of_words(sides, characters=True)),
        lengths=distance(surface(sides)),
        mmd=_mmd(values, n, documents, seed),
        words=lexicon(source, target, seed=seed),
        source_bits=rates[0],
        target_bits=rates[1],
        source_fertility=fertility(source, tokenizer),
        target_fertility=fertility(target, tokenizer),
    )


def _mmd(values: np.ndarray, n: int, documents: tuple[Any, Any], seed: int) -> MMDTest:
    """Of features scaled to unit spread; whole documents change sides where they are known."""
    import torch

    from .cut import scaled
    from .mmd import mmd_test

    pooled = torch.tensor(scaled(values), dtype=torch.float32)
    known = documents if all(side is not None for side in documents) else None
    return mmd_test(pooled[:n], pooled[n:], documents=known, seed=seed)
