"""Adapting to a domain without labels, on real data: DANN and MMD against training on the source alone.

`images`: a small convolutional network trained on 5,000 labelled MNIST digits, for scikit-learn's digits of
other writers. `movie-amazon`, `movie-nyt`, `movie-tweets`: MiniLM with LoRA trained on labelled sentences of
film reviews, for those of another domain. Of the target's labels none is used in training or for a choice;
one part of the target (by document) is adapted to, the other is scored. `strengths`: what weight of the
alignment a validator chooses that sees no target label; the other tasks use it. Run as `python -m
examples.transfer.domain_adaptation images` (or another name, or all without one): a few minutes each on two
cores, CSV and PNG into examples/transfer/results. Runs that a CSV has are not repeated: remove it to begin
anew.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from peftkern.transfer.alignment import Alignment, FeatureTap, MMDAlignment, rows_of_step
from peftkern.transfer.dann import DANNLoss, annealed_rate, domain_probe
from peftkern.transfer.features import pool_mean
from peftkern.transfer.intervals import over_runs, paired_runs
from peftkern.transfer.validators import information_maximization, label_shift, soft_neighborhood_density

from .samples import minilm, mnist, scikit_digits, sentences

RESULTS = Path(__file__).parent / "results"
METHODS = ("source only", "DANN", "MMD")
SEEDS = (0, 1, 2)
STEPS = {"images": 800, "sentences": 80}
BATCH = {"images": 64, "sentences": 16}
RATE = {"images": 1e-3, "sentences": 1e-3}
# What `strengths` chose: the highest mutual information of the target's predictions, on the images, with a
# seed of its own.
STRENGTHS = {"source only": 0.0, "DANN": 1.0, "MMD": 4.0}
TRIED = {"DANN": (0.3, 1.0, 3.0), "MMD": (1.0, 4.0, 16.0)}
CHOOSING_SEED = 100
# The sentences' first layers stay as they are: of MiniLM's six, LoRA adapts the last three.
LENGTH, TRAIN, TEST, FROZEN = 32, 3000, 1000, 3


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
    """Inputs by row and labels: to train on, and to score."""

    inputs: Callable[[Sequence[int]], dict[str, Tensor]]
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
        self.features = nn.Sequential(*convolutions, nn.Linear(32 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        return self.head(self.features(images))


class Sentiment(nn.Module):
    """MiniLM with LoRA in its last layers, the mean of its tokens, two classes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        encoder, _ = minilm()
        layers = list(range(FROZEN, encoder.config.num_hidden_layers))
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["query", "key", "value", "dense"],
            layers_to_transform=layers,
            layers_pattern="layer",
        )
        torch.manual_seed(seed)
        self.features = get_peft_model(encoder, config)
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2]."""
        hidden = self.features(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.head(_mean(hidden, attention_mask))


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """MiniLM's own pooling: all tokens, [CLS] too."""
    return pool_mean(hidden, mask, skip_first=False)


def _alignment(method: str, width: int, strength: float, seed: int) -> Alignment | None:
    if method == "DANN":
        return DANNLoss(width, hidden=128, strength=strength, seed=seed)
    return MMDAlignment(strength=strength) if method == "MMD" else None


def trained(
    model: nn.Module,
    tap: FeatureTap,
    alignment: Alignment | None,
    source: Split,
    target: Split,
    *,
    kind: str,
    seed: int,
) -> float:
    """Train on the source's labels, align with the target's inputs; the alignment's last own accuracy, NaN
    without one.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    own = [] if alignment is None else list(alignment.parameters())
    optimizer = torch.optim.AdamW(trainable + own, lr=RATE[kind])
    steps, size, accuracies = STEPS[kind], BATCH[kind], []
    model.train()
    name = f"{kind} {type(alignment).__name__} {seed}"
    for step in tqdm(range(steps), desc=name, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = RATE[kind] * annealed_rate(step / steps)
        rows = source.train[rows_of_step(len(source.train), size, step, seed=seed)]
        batch = source.inputs(rows)
        with tap:
            loss = cross_entropy(model(**batch), source.labels[rows])
            if alignment is not None:
                of_source = tap.features(batch.get("attention_mask"))
                drawn = rows_of_step(len(target.train), size, step, seed=seed + 1000)
                others = target.inputs(target.train[drawn])
                model(**others)
                of_target = tap.features(others.get("attention_mask"))
                loss = loss + alignment(of_source, of_target, progress=step / steps)
                accuracies.append(float(alignment.metrics.get("discriminator_accuracy", float("nan"))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(np.mean(accuracies[-50:])) if accuracies else float("nan")


@torch.no_grad()
def outputs(model: nn.Module, tap: FeatureTap, data: Split, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Logits and features of these rows, in evaluation mode."""
    model.eval()
    logits, features = [], []
    with tap:
        for start in range(0, len(rows), 256):
            batch = data.inputs(rows[start : start + 256])
            logits.append(model(**batch))
            features.append(tap.features(batch.get("attention_mask")))
    return torch.cat(logits), torch.cat(features).numpy()


def measured(
    task: str,
    method: str,
    seed: int,
    source: Split,
    target: Split,
    *,
    strength: float,
) -> Run:
    """One run."""
    kind = _kind(task)
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = Digits() if kind == "images" else Sentiment(seed)
    width = 64 if kind == "images" else 384
    tap = FeatureTap(model.features, pool=_mean)
    alignment = _alignment(method, width, strength, seed)
    accuracy = trained(model, tap, alignment, source, target, kind=kind, seed=seed)
    seconds = time.perf_counter() - begin
    source_logits, of_source = outputs(model, tap, source, source.test)
    target_logits, of_target = outputs(model, tap, target, target.test)
    probe = domain_probe(of_source, of_target)
    if seed == 0:
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
    images = torch.from_numpy(data.images)[:, None] / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    held_out = 1000 if name == "mnist" else len(images) // 2
    labels = torch.from_numpy(data.labels)
    return Split(lambda rows: {"images": images[rows]}, labels, order[held_out:], order[:held_out])


def _sentences(domain: str) -> Split:
    """Whole documents are on one side or the other."""
    data = sentences(domain)
    _, tokenizer = minilm()
    tokens = tokenizer(data.texts, truncation=True, max_length=LENGTH)["input_ids"]
    documents = np.random.default_rng(0).permutation(np.unique(data.documents))
    testing = np.isin(data.documents, documents[: len(documents) // 3])
    order = np.random.default_rng(1).permutation(len(tokens))

    def inputs(rows: Sequence[int]) -> dict[str, Tensor]:
        padded = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    train, test = order[~testing[order]][:TRAIN], order[testing[order]][:TEST]
    return Split(inputs, torch.from_numpy(data.labels), train, test)


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
    wanted = [(method, seed, STRENGTHS[method]) for seed in SEEDS for method in METHODS]
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
            values = asdict(run).items()
            writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in values})


def chosen(runs: Sequence[Run]) -> str:
    """The strength of each method with the highest mutual information on the target, and what its labels say."""
    lines = []
    for method in TRIED:
        own = [run for run in runs if run.method == method]
        best, truly = (max(own, key=lambda run: getattr(run, name)) for name in ("information", "target_accuracy"))
        lines.append(f"{method}: strength {best.strength:g} by the validator, {truly.strength:g} by the target's labels")
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
    labels = [names.get(task, task.replace("-", " → ") + "\n(MiniLM, LoRA)") for task in results]
    axes.set_xticks(range(len(results)), labels)
    axes.set(ylabel="accuracy on the target's other half (%)", ylim=(50, 100), title=_title(results))
    axes.legend(ncols=3)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(RESULTS / "domain_adaptation.png", dpi=110)


def _title(results: dict[str, list[Run]]) -> str:
    """What came out, by the paired intervals."""
    words = []
    for task, runs in results.items():
        gains = {method: paired_runs(_of(runs, method), _of(runs, "source only")) for method in METHODS[1:]}
        named = [f"{method} {100 * gain.mean:+.1f}" for method, gain in gains.items()]
        words.append(f"{task}: {', '.join(named)}")
    return "Gain over the source alone, in points\n" + "; ".join(words)


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
