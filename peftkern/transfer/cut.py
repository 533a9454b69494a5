"""Where to cut: what the features after each layer are worth for a task, beside what freezing the layers
below saves.

A cut at depth n freezes the first n layers and trains the others; no backward pass runs below it. Its
features are scored by a linear probe, by LogME and by CKA with the last layer's, and read against the same
probe on a random network of the same shape and on a bag of words. scikit-learn fits the probes; LogME and
debiased CKA are this package's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cka import Cka, cka
from .controls import matched_random
from .depth import below
from .features import Features, pooled_features
from .intervals import Interval
from .logme import logme
from .probes import Probe, bag_of_words, probe, splits

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CutReport", "CutRow", "StepCost", "scaled", "step_cost", "step_share", "where_to_cut"]

_MOST_DEPTHS = 13  # of a deep model, unless they are chosen


@dataclass(frozen=True)
class StepCost:
    """One training step with the layers below a cut frozen: seconds (the least of the repetitions) and bytes
    saved for backward.
    """

    first: int
    seconds: float
    saved_bytes: int


@dataclass(frozen=True)
class CutRow:
    """What is known of one depth.

    `behind`: the paired difference of the best depth's accuracy and this one's. `gain`: that of this depth
    and the random network's at the same depth. `step`: a cut's step time as a share of an uncut one's,
    computed from the number of layers (`step_share`); `activations`: the share of the layers' activations
    that stay.
    """

    depth: int
    accuracy: Interval
    behind: Interval
    logme: float
    to_last: Cka
    random: Interval | None
    gain: Interval | None
    step: float
    activations: float
    cost: StepCost | None = None


@dataclass(frozen=True)
class CutReport:
    """The rows by depth, the controls, and the cut they speak for: `recommended` is None where they speak for
    none.
    """

    rows: tuple[CutRow, ...]
    layers: int
    texts: int
    majority: float
    words: Interval | None
    words_behind: Interval | None
    recommended: int | None
    verdict: str

    @property
    def best(self) -> CutRow:
        """The depth whose probe is most accurate."""
        return max(self.rows, key=lambda row: row.accuracy.mean)

    def table(self) -> str:
        """The report as a table of Markdown."""
        head = (
            "| depth | probe accuracy | s.e. | random twin | LogME | CKA with the last | step | activations |"
        )
        lines = [head, "|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for row in self.rows:
            random = f"{row.random.mean:.3f}" if row.random else "-"
            step = f"x{row.step:.2f}" + (f" ({row.cost.seconds:.3f} s)" if row.cost else "")
            kept = f"x{row.activations:.2f}" + (
                f" ({row.cost.saved_bytes / 2**20:.0f} MiB)" if row.cost else ""
            )
            lines.append(
                f"| {row.depth} | {row.accuracy.mean:.3f} | {row.accuracy.se:.3f} | {random} |"
                f" {row.logme:.4f} | {row.to_last.value:.2f} ± {row.to_last.se:.2f} | {step} | {kept} |"
            )
        words = f"; a bag of words {self.words.mean:.3f}" if self.words else ""
        return "\n".join([*lines, "", f"The majority's share is {self.majority:.3f}{words}. {self.verdict}"])

    def draw(self, axes: Any) -> None:
        """Probe accuracy by depth with its standard errors, beside the controls; the cut is marked."""
        depths = [row.depth for row in self.rows]
        axes.errorbar(
            depths,
            [r.accuracy.mean for r in self.rows],
            [r.accuracy.se for r in self.rows],
            marker="o",
            label="pretrained",
        )
        if all(row.random for row in self.rows):
            spread = [row.random.se for row in self.rows]
            axes.errorbar(
                depths,
                [row.random.mean for row in self.rows],
                spread,
                marker=".",
                color="gray",
                label="random twin",
            )
        if self.words:
            axes.axhline(self.words.mean, color="tab:green", linestyle="--", label="bag of words")
        axes.axhline(self.majority, color="black", linestyle=":", label="majority")
        if self.recommended:
            axes.axvline(self.recommended, color="tab:red", alpha=0.5, label=f"cut at {self.recommended}")
        axes.set(
            xlabel="layers below the cut",
            ylabel="accuracy of a linear probe (± s.e.)",
            title=self._title(),
        )
        axes.legend()

    def _title(self) -> str:
        if self.recommended is None:
            return "No depth can be told from a random network's"
        if self.recommended == 0:
            return "No depth is measurably better than the embeddings"
        share = next(row.step for row in self.rows if row.depth == self.recommended)
        return f"From layer {self.recommended} on no depth is better: a step takes ×{share:.2f}"


def step_share(first: int, layers: int, *, trained: str = "adapters", recompute: bool = False) -> float:
    """The time of a step cut at `first` of `layers` equal layers, as a share of the uncut step's; embeddings
    and head left out.

    In forward passes of a layer: 1 forward, 1 for the gradient of the input, 1 more for the weights' where
    all are trained (`trained="all"`), 1 more where activations are recomputed; below the cut only the first.
    """
    if trained not in ("adapters", "all"):
        raise ValueError(f"trained: got {trained!r}, expected 'adapters' or 'all'")
    above = (2 if trained == "all" else 1) + (1 if recompute else 0)
    return (layers + above * (layers - first)) / (layers * (1 + above))


def step_cost(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    first: int,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    repeats: int = 3,
) -> StepCost:
    """Time forward and backward of one batch with the layers below `first` frozen, and count the bytes saved
    for backward.

    Every storage is counted once; parameters, which are there anyway, are not. The model's flags and
    gradients are put back.

    Args:
        batch: what the model's forward takes.
        loss: of the model's output; default: its `loss`, for which the batch must hold labels.
    """
    frozen = {name for name, parameter in below(model, first) if parameter.requires_grad}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> None:
        output = model(**batch)
        value = output.loss if loss is None else loss(output)
        if value.requires_grad:  # not where all that is trainable lies below the cut
            value.backward()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step()
        seconds = min(_timed(step, next(model.parameters()).device) for _ in range(repeats))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in frozen)
            parameter.grad = kept[name]
    return StepCost(first, seconds, sum(saved.values()))


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def scaled(features: np.ndarray) -> np.ndarray:
    """[n, D] in fp64 with each dimension divided by its standard deviation: some in Llama-like models are a
    thousand times the others.

    (Sun et al., 2024, Massive Activations.) Without it they alone decide CKA, LogME and every distance.
    """
    import numpy as np

    features = np.asarray(features, dtype=np.float64)
    spread = features.std(0)
    return features / np.where(spread > 1e-12 * np.abs(features).max(initial=1e-300), spread, np.inf)


def where_to_cut(
    model: nn.Module,
    inputs: Sequence[str] | Sequence[Mapping[str, Tensor]],
    labels: Sequence[Any],
    *,
    tokenizer: Any = None,
    groups: Sequence[Any] | None = None,
    depths: Sequence[int] | None = None,
    pool: str = "mean",
    kind: str = "ridge",
    folds: int = 5,
    repeats: int = 5,
    random_twin: bool = True,
    seed: int = 0,
    costs: Sequence[StepCost] = (),
    share: Callable[[int, int], float] = step_share,
    progress: bool = False,
    **options: Any,
) -> CutReport:
    """Score every depth of a model for a labelled task, and say where to cut.

    The recommended cut is the smallest depth whose probe cannot be told from the best one's: the layers below
    build what the task uses, those above add nothing to it that a linear classifier sees, and are the ones to
    train. There is none where the best depth cannot be told from a random network's. The best of many depths
    is chosen on the same folds, hence slightly flattered.

    Args:
        inputs, tokenizer, `options`: as `pooled_features`; texts get a bag of words as a control.
        labels: a class each.
        groups: the document of each text, so that none is on both sides of a split.
        depths: default: all, or 13 evenly spaced ones.
        pool, kind: "mean" or "last"; "ridge" or "logistic".
        random_twin: probe `matched_random(model)` too (one more pass over the data).
        costs: of `step_cost`, shown beside the computed shares.
        share: of a step, by first trained layer and number of layers; `functools.partial(step_share,
            recompute=True)` with recomputation.
    Raises: InputError for missing labels, one class, fewer documents or rows of a class than folds.
    """
    where = splits(labels, groups=groups, folds=folds, repeats=repeats, seed=seed)
    options |= {"tokenizer": tokenizer, "pools": (pool,), "progress": progress}
    features = pooled_features(model, inputs, **options)
    layers = features.depths[-1]
    chosen = tuple(depths) if depths is not None else _spaced(layers)

    def probed(values: Features) -> dict[int, Probe]:
        return {
            depth: probe(
                values.at(depth, pool),
                labels,
                where,
                kind=kind,
            )
            for depth in _shown(chosen, progress)
        }

    probes, randoms = probed(features), {}
    if random_twin:
        randoms = probed(pooled_features(matched_random(model, seed=seed), inputs, depths=chosen, **options))
    words = probe(bag_of_words(list(inputs)), labels, where) if isinstance(inputs[0], str) else None
    scored = _Scored(features, pool, labels, probes, randoms)
    rows = [scored.row(depth, share(depth, layers), costs) for depth in chosen]
    return _report(rows, layers, labels, probes, words)


def _spaced(layers: int) -> tuple[int, ...]:
    count = min(layers + 1, _MOST_DEPTHS)
    return (
        tuple(
            dict.fromkeys(round(index * layers / (count - 1)) for index in range(count)),
        )
        if layers
        else (0,)
    )


def _shown(depths: Sequence[int], progress: bool) -> Any:
    if not progress:
        return depths
    from tqdm import tqdm

    return tqdm(depths, desc="probes", unit="depth")


@dataclass(frozen=True)
class _Scored:
    """What the rows are made of."""

    features: Features
    pool: str
    labels: Sequence[Any]
    probes: Mapping[int, Probe]
    randoms: Mapping[int, Probe]

    def row(self, depth: int, step: float, costs: Sequence[StepCost]) -> CutRow:
        import numpy as np

        layers, probes = self.features.depths[-1], self.probes
        here, last = (scaled(self.features.at(d, self.pool)) for d in (depth, layers))
        best = max(probes.values(), key=lambda item: item.accuracy.mean)
        random = self.randoms.get(depth)
        return CutRow(
            depth=depth,
            accuracy=probes[depth].accuracy,
            behind=best.minus(probes[depth]),
            logme=logme(here, np.unique(np.asarray(self.labels), return_inverse=True)[1]),
            to_last=cka(here, last),
            random=random.accuracy if random else None,
            gain=probes[depth].minus(random) if random else None,
            step=step,
            activations=(layers - depth) / layers if layers else 1.0,
            cost=next((cost for cost in costs if cost.first == depth), None),
        )


def _report(
    rows: list[CutRow],
    layers: int,
    labels: Sequence[Any],
    probes: Mapping[int, Probe],
    words: Probe | None,
) -> CutReport:
    import numpy as np

    best = max(rows, key=lambda row: row.accuracy.mean)
    behind = probes[best.depth].minus(words) if words else None
    majority = float(np.unique(np.asarray(labels), return_counts=True)[1].max() / len(labels))
    recommended: int | None = next(row.depth for row in rows if row.behind.sign != 1)
    if best.gain is not None and best.gain.sign != 1:
        recommended = None
        verdict = (
            f"Cut nowhere: at the best depth ({best.depth}) the features cannot be told from a random"
            f" network's ({best.gain})."
        )
    elif recommended == 0:
        verdict = "Cut nowhere: no depth is measurably better than the embeddings."
    else:
        row = next(row for row in rows if row.depth == recommended)
        verdict = (
            f"Cut at {recommended} of {layers}: {_against(best, row)}. A step then takes ×{row.step:.2f} of"
            f" the time, and the layers keep ×{row.activations:.2f} of their activations."
        )
    if behind is not None and behind.sign != 1:
        verdict += f" Beware: a bag of words cannot be told from the best depth (which is ahead by {behind})."
    return CutReport(
        tuple(rows),
        layers,
        len(labels),
        majority,
        words.accuracy if words else None,
        behind,
        recommended,
        verdict,
    )


def _against(best: CutRow, row: CutRow) -> str:
    if best.depth == row.depth:
        return "its probe is the best"
    return f"no depth's probe is measurably better (the best, {best.depth}, by {row.behind})"
