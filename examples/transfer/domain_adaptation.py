"""Adapting to a domain without labels, on real data: DANN and MMD against training on the source alone.

`images`: a small convolutional network trained on 5,000 labelled MNIST digits, for scikit-learn's digits of
other writers. `movie-amazon`, `movie-nyt`, `movie-tweets`: labelled sentences of film reviews, for those of
another domain; MiniLM is frozen, its pooled features (made once, and kept in the cache) go through a
trainable layer that the alignment acts on. Of the target's labels none is used in training; one part of the
target (by document) is adapted to, the other is scored. The strengths of MMD, the ramp and the sizes were set
after trial runs whose target accuracy was seen. `strengths`: what weight of the alignment a validator chooses
that sees no target label. Run as `python -m examples.transfer.domain_adaptation
images` (or another name, or all without one): a few minutes each on two cores, CSV and PNG into
examples/transfer/results. Runs that a CSV has are not repeated: remove it to begin anew.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from peftkern.files import cache_dir
from peftkern.transfer.alignment import Alignment, FeatureTap, MMDAlignment, rows_of_step
from peftkern.transfer.dann import DANNLoss, annealed_rate, domain_probe
from peftkern.transfer.features import pooled_features
from peftkern.transfer.intervals import over_runs, paired_runs
from peftkern.transfer.validators import information_maximization, label_shift, soft_neighborhood_density

from .samples import minilm, mnist, scikit_digits, sentences

RESULTS = Path(__file__).parent / "results"
METHODS = ("source only", "DANN", "MMD")
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE, WIDTH = 800, 64, 1e-3, 64
# DANN's is what `strengths` chose: the highest mutual information of the target's predictions, on the images,
# with a seed of its own. MMD's, on the images, moves nothing; the sentences take four times as much.
STRENGTHS = {
    "images": {"source only": 0.0, "DANN": 1.0, "MMD": 4.0},
    "sentences": {"source only": 0.0, "DANN": 1.0, "MMD": 16.0},
}
TRIED = {"DANN": (0.3, 1.0), "MMD": (4.0, 16.0)}
CHOOSING_SEED = 100
LENGTH, TRAIN, TEST = 48, 4000, 1000


@dataclass(frozen=True)
class Run:
    """One training: accuracies on held-out source and target rows, and what was known of it without the
    target's labels.
    """

    task: str
    method: str
    seed: int
    strength: float
    source_accuracy: float
    target_accuracy: float
    information: float
    density: float
    domain_accuracy: float
    probe_linear: float
    probe_kernel: float
    seconds: float


@dataclass(frozen=True)
class Split:
    """Inputs [n, ...] and labels [n], and which rows are to train on and to score."""

    inputs: Tensor
    labels: Tensor
    train: np.ndarray
    test: np.ndarray


class Digits(nn.Module):
    """Three convolutions on 8 x 8 pixels, features of 64, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        convolutions: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
        convolutions += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        convolutions += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
        self.features = nn.Sequential(*convolutions, nn.Linear(32 * 16, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        return self.head(self.features(images))


class Sentiment(nn.Module):
    """A layer on frozen sentence vectors of MiniLM, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(384, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits [B, 2] of vectors [B, 384]."""
        return self.head(self.features(vectors))


def _alignment(method: str, strength: float, seed: int) -> Alignment | None:
    if method == "DANN":
        return DANNLoss(WIDTH, hidden=128, strength=strength, seed=seed)
    return MMDAlignment(strength=strength) if method == "MMD" else None


def trained(model: nn.Module, alignment: Alignment | None, source: Split, target: Split, seed: int) -> float:
    """Train on the source's labels, align with the target's inputs; the discriminator's last accuracy, if
    any.
    """
    own = [] if alignment is None else list(alignment.parameters())
    optimizer = torch.optim.AdamW([*model.parameters(), *own], lr=RATE)
    tap, accuracies = FeatureTap(model.features), []
    model.train()
    name = f"{type(alignment).__name__}, seed {seed}"
    for step in tqdm(range(STEPS), desc=name, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = RATE * annealed_rate(step / STEPS)
        rows = source.train[rows_of_step(len(source.train), BATCH, step, seed=seed)]
        with tap:
            loss = cross_entropy(model(source.inputs[rows]), source.labels[rows])
            if alignment is not None:
                of_source = tap.features()
                drawn = rows_of_step(len(target.train), BATCH, step, seed=seed + 1000)
                model(target.inputs[target.train[drawn]])
                loss = loss + alignment(of_source, tap.features(), progress=step / STEPS)
                accuracies.append(float(alignment.metrics.get("discriminator_accuracy", float("nan"))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(np.mean(accuracies[-50:])) if accuracies else float("nan")


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, np.ndarray]:
    """Logits and features, in evaluation mode."""
    model.eval()
    with FeatureTap(model.features) as tap:
        logits = model(inputs)
        return logits, tap.features().numpy()


def measured(task: str, method: str, seed: int, source: Split, target: Split, *, strength: float) -> Run:
    """One run."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = Digits() if _kind(task) == "images" else Sentiment()
    accuracy = trained(model, _alignment(method, strength, seed), source, target, seed)
    seconds = time.perf_counter() - begin
    source_logits, of_source = outputs(model, source.inputs[source.test])
    target_logits, of_target = outputs(model, target.inputs[target.test])
    probe = domain_probe(of_source, of_target)
    if seed == SEEDS[0]:
        shift = label_shift(source_logits, source.labels[source.test].tolist(), target_logits, warn=False)
        print(f"{task}, {method}: {shift.verdict}; {probe.verdict}")
    return Run(
        task,
        method,
        seed,
        strength,
        _accuracy(source_logits, source),
        _accuracy(target_logits, target),
        information_maximization(target_logits),
        soft_neighborhood_density(target_logits),
        accuracy,
        probe.linear.accuracy.mean,
        probe.kernel.accuracy.mean,
        seconds,
    )


def _accuracy(logits: Tensor, data: Split) -> float:
    return float((logits.argmax(1) == data.labels[data.test]).float().mean())


def _digits(name: str) -> Split:
    data = mnist() if name == "mnist" else scikit_digits()
    order = np.random.default_rng(0).permutation(len(data.labels))
    held_out = TEST if name == "mnist" else len(order) // 2
    images = torch.from_numpy(data.images)[:, None] / 8 - 1
    return Split(images, torch.from_numpy(data.labels), order[held_out:], order[:held_out])


def _sentences(domain: str) -> Split:
    """Whole documents are on one side or the other."""
    data = sentences(domain)
    documents = np.random.default_rng(0).permutation(np.unique(data.documents))
    testing = np.isin(data.documents, documents[: len(documents) // 3])
    order = np.random.default_rng(1).permutation(len(data.texts))
    train, test = order[~testing[order]][:TRAIN], order[testing[order]][:TEST]
    rows = np.concatenate([train, test])
    vectors = torch.from_numpy(_vectors(domain, [data.texts[row] for row in rows]))
    labels = torch.from_numpy(data.labels)[rows]
    return Split(vectors, labels, np.arange(len(train)), np.arange(len(train), len(rows)))


def _vectors(domain: str, texts: Sequence[str]) -> np.ndarray:
    """MiniLM's sentence vectors [n, 384], divided by their size; from the cache where they have been made."""
    path = cache_dir() / "examples" / f"minilm-{domain}-{len(texts)}.npy"
    if not path.exists():
        model, tokenizer = minilm()
        options = {"pools": ("mean",), "depths": (-1,), "skip_first": False, "max_length": LENGTH}
        found = pooled_features(model, texts, tokenizer=tokenizer, progress=sys.stderr.isatty(), **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found.at(-1, "mean"))
    vectors = np.load(path)
    return vectors / np.sqrt((vectors**2).mean())


def _kind(task: str) -> str:
    return "sentences" if "-" in task else "images"


def _domains(task: str) -> tuple[Split, Split]:
    if _kind(task) == "images":
        return _digits("mnist"), _digits("digits")
    source, target = task.split("-")
    return _sentences(source), _sentences(target)


def run(task: str, most: int | None = None) -> list[Run]:
    """All methods and seeds of one task, or all strengths; of those that its CSV lacks at most `most` are run
    now.
    """
    strengths = STRENGTHS[_kind(task)]
    wanted = [(method, seed, strengths[method]) for seed in SEEDS for method in METHODS]
    if task == "strengths":
        wanted = [(method, CHOOSING_SEED, strength) for method in TRIED for strength in TRIED[method]]
    runs = _read(task)
    done = {(run.method, run.seed, run.strength) for run in runs}
    missing = [one for one in wanted if one not in done][:most]
    if missing:
        source, target = _domains(task)
    for method, seed, strength in missing:
        runs.append(measured(task, method, seed, source, target, strength=strength))
        _write(task, runs)
    return runs


def _write(task: str, runs: Sequence[Run]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"domain_adaptation_{task}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)])
        writer.writeheader()
        for run in runs:
            values = asdict(run)
            short = {name: f"{value:.5g}" for name, value in values.items() if isinstance(value, float)}
            writer.writerow(values | short)


def chosen(runs: Sequence[Run]) -> str:
    """The strength of each method with the highest information on the target, and the best by labels."""
    lines = []
    for method in TRIED:
        own = [run for run in runs if run.method == method]
        best = max(own, key=lambda run: run.information).strength
        truly = max(own, key=lambda run: run.target_accuracy).strength
        lines.append(f"{method}: strength {best:g} by the validator, {truly:g} by the target's labels")
    return "\n".join(lines)


def _of(runs: Sequence[Run], method: str, name: str = "target_accuracy") -> list[float]:
    return [getattr(run, name) for run in runs if run.method == method]


def summary(runs: Sequence[Run]) -> str:
    """One line a method: accuracies with standard errors over seeds, and the paired gain over source only."""
    lines = []
    for method in METHODS:
        target, source = over_runs(_of(runs, method)), over_runs(_of(runs, method, "source_accuracy"))
        line = f"{runs[0].task:13s} {method:12s} target {100 * target.mean:.1f} ± {100 * target.se:.1f} %"
        line += f", source {100 * source.mean:.1f} ± {100 * source.se:.1f} %"
        if method != "source only":
            gain = paired_runs(_of(runs, method), _of(runs, "source only"))
            line += f", gain {100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points"
        for name in ("information", "density", "domain_accuracy", "probe_linear", "probe_kernel"):
            line += f", {name} {over_runs(_of(runs, method, name)).mean:.3f}"
        lines.append(line)
    return "\n".join(lines)


def _read(task: str) -> list[Run]:
    path = RESULTS / f"domain_adaptation_{task}.csv"
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in fields(Run)}
    read = {"str": str, "int": int, "float": float}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [Run(**{name: read[kinds[name]](value) for name, value in row.items()}) for row in rows]


def plot() -> None:
    """Target accuracy of every task that was run, by method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    read = {task: _read(task) for task in TASKS[1:]}
    results = {task: runs for task, runs in read.items() if len(runs) == len(METHODS) * len(SEEDS)}
    if not results:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, method in enumerate(METHODS):
        means = [over_runs(_of(runs, method)) for runs in results.values()]
        places = [place + 0.25 * (number - 1) for place in range(len(means))]
        heights, errors = [100 * mean.mean for mean in means], [100 * mean.se for mean in means]
        axes.bar(places, heights, width=0.23, yerr=errors, capsize=3, label=method)
    names = {"images": "MNIST → digits\n(CNN)"}
    labels = [names.get(task, task.replace("-", " → ") + "\n(MiniLM, frozen)") for task in results]
    axes.set_xticks(range(len(results)), labels)
    axes.set(ylabel="accuracy on the target's other half (%)", ylim=(50, 100), title=_title(results))
    axes.legend(ncols=3)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(RESULTS / "domain_adaptation.png", dpi=110)


def _title(results: dict[str, list[Run]]) -> str:
    """For how many tasks the paired interval of a method's gain over the source alone lies above 0, or
    below."""
    words = []
    for method in METHODS[1:]:
        gains = [paired_runs(_of(runs, method), _of(runs, "source only")) for runs in results.values()]
        up, down = (sum(gain.sign == sign for gain in gains) for sign in (1, -1))
        words.append(
            f"{method} helps in {up} and hurts in {down} of {len(gains)} tasks, else one cannot tell"
        )
    return "\n".join(words)


TASKS = ("strengths", "images", "movie-amazon", "movie-nyt", "movie-tweets")


def main(arguments: Sequence[str]) -> int:
    """Run these tasks, or all; with --next only the first run of each that is missing."""
    names, most = [name for name in arguments if name != "--next"], 1 if "--next" in arguments else None
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        print(f"there is no task {unknown[0]!r}: choose among {', '.join(TASKS)}", file=sys.stderr)
        return 2
    for task in names or TASKS:
        runs = run(task, most)
        if most is None:
            print(chosen(runs) if task == "strengths" else summary(runs))
    plot()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
