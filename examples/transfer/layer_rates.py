"""Layer-wise rates, gradual unfreezing, the slanted triangle and LoRA+ on 500 real sentences, paired over
seeds.

MiniLM on the movie sentences: 500 to train on, 1,500 of other reviews to test on. Every arm trains the same
rows in the same order, so that differences are paired. Rates are not tuned: the layer-wise ones have the
geometric mean of the one rate that they are compared with (top rate times sqrt(17.6)).
Finished runs are kept in the CSV, and a second call goes on with the rest:
`python -m examples.transfer.layer_rates [MINUTES]`.
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from peftkern.transfer.depth import parameter_depths
from peftkern.transfer.features import pool_mean
from peftkern.transfer.intervals import over_runs, paired_runs
from peftkern.transfer.rates import Rates
from peftkern.transfer.schedules import schedule
from peftkern.transfer.unfreezing import GradualUnfreezing, UnfreezingPlan

from .samples import minilm, sentences

RESULTS = Path(__file__).parent / "results"
TRAIN, TEST = 500, 1500
EPOCHS, BATCH, LENGTH, CHUNK = 2, 16, 48, 64
SEEDS = (0, 1, 2)
FIELDS = ("arm", "lr", "seed", "error", "loss", "seconds")


@dataclass(frozen=True)
class Arm:
    """How one arm trains: its rate at the top, LoRA or every weight, its rates, whether it thaws, and its
    schedule."""

    name: str
    lr: float
    lora: bool = False
    rates: Rates = Rates()
    unfreeze: bool = False
    schedule: str = "linear"


ARMS = (
    Arm("full", 1e-4),
    Arm("full, layer rates 17.6", 4.2e-4, rates=Rates(layer_ratio=17.6)),
    Arm(
        "full, layer rates, thawed, slanted",
        4.2e-4,
        rates=Rates(layer_ratio=17.6),
        unfreeze=True,
        schedule="slanted",
    ),
    Arm("LoRA", 1e-3, lora=True),
    Arm("LoRA+ 16", 2e-4, lora=True, rates=Rates(lora_plus=16)),
)


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.head(pool_mean(hidden, attention_mask).float())


@dataclass(frozen=True)
class Data:
    """Token ids (lists), labels, the rows to draw training rows from, and those of the test."""

    ids: list[list[int]]
    labels: Tensor
    pool: np.ndarray
    test: np.ndarray


def _data() -> Data:
    """Documents are drawn once: those of the test, and the rest to draw training rows from."""
    movie = sentences("movie")
    _, tokenizer = minilm()
    ids = tokenizer(movie.texts, truncation=True, max_length=LENGTH)["input_ids"]
    documents = np.random.default_rng(99).permutation(np.unique(movie.documents))
    order = np.concatenate([np.flatnonzero(movie.documents == document) for document in documents])
    end = TEST
    while movie.documents[order[end]] == movie.documents[order[end - 1]]:
        end += 1  # to where a document ends
    return Data(ids, torch.tensor(movie.labels), order[end:], order[:end])


def _batch(data: Data, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(data.ids[row]) for row in rows)
    ids = torch.tensor([data.ids[row] + [0] * (width - len(data.ids[row])) for row in rows])
    mask = torch.tensor([[1] * len(data.ids[row]) + [0] * (width - len(data.ids[row])) for row in rows])
    return ids, mask, data.labels[rows]


def _batches(data: Data, order: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
    """Batches of rows of like length, which costs less padding: sorted within chunks, then shuffled."""
    batches = []
    for start in range(0, len(order), CHUNK):
        chunk = sorted(order[start : start + CHUNK], key=lambda row: len(data.ids[row]))
        batches += [np.array(chunk[first : first + BATCH]) for first in range(0, len(chunk), BATCH)]
    return [batches[index] for index in generator.permutation(len(batches))]


def _model(arm: Arm, seed: int) -> Classifier:
    torch.manual_seed(seed)
    encoder, _ = minilm()
    width = encoder.config.hidden_size
    if arm.lora:
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(
            encoder,
            LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]),
        )
    else:
        encoder.pooler.requires_grad_(False)  # the mean of the tokens does not read it
    return Classifier(encoder, width)


def _train(arm: Arm, seed: int, data: Data) -> Classifier:
    """EPOCHS over TRAIN rows that the seed draws, in an order that it draws."""
    generator = np.random.default_rng(seed)
    rows = generator.choice(data.pool, TRAIN, replace=False)
    model = _model(arm, seed).train()
    optimizer = torch.optim.AdamW(arm.rates.groups(model, lr=arm.lr), weight_decay=0.01)
    batches = [
        batch for _ in range(EPOCHS) for batch in _batches(data, generator.permutation(rows), generator)
    ]
    scheduler = LambdaLR(optimizer, schedule(arm.schedule, len(batches), warmup=0.1))
    depths = parameter_depths(model)
    trained = sorted(
        {depths[name] for name, parameter in model.named_parameters() if parameter.requires_grad},
    )
    plan = (
        UnfreezingPlan.every(max(1, len(batches) // (2 * len(trained))), trained)
        if arm.unfreeze
        else UnfreezingPlan(
            ((0, 0),),
        )
    )
    unfreezing = GradualUnfreezing(model, plan)
    for step, chosen in enumerate(batches):
        unfreezing.apply(step)
        ids, mask, labels = _batch(data, chosen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, mask)
        cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def _evaluate(model: Classifier, data: Data, rows: np.ndarray) -> tuple[float, float]:
    """The error in percent and the loss in nats of these rows."""
    model.eval()
    ordered, wrong, loss = sorted(rows, key=lambda row: len(data.ids[row])), 0, 0.0
    for start in range(0, len(ordered), 64):
        ids, mask, labels = _batch(data, np.array(ordered[start : start + 64]))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, mask).float()
        wrong += int((logits.argmax(1) != labels).sum())
        loss += cross_entropy(logits, labels, reduction="sum").item()
    return 100 * wrong / len(rows), loss / len(rows)


def _runs(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def _run(path: Path, arm: Arm, seed: int, data: Data) -> None:
    """One run, added to the CSV, unless it is there."""
    if any((row["arm"], int(row["seed"])) == (arm.name, seed) for row in _runs(path)):
        return
    start = time.perf_counter()
    model = _train(arm, seed, data)
    seconds = time.perf_counter() - start
    error, loss = _evaluate(model, data, data.test)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow([arm.name, arm.lr, seed, f"{error:.3f}", f"{loss:.5f}", f"{seconds:.1f}"])


def _values(path: Path, arm: Arm, column: str) -> list[float]:
    rows = sorted(_runs(path), key=lambda row: int(row["seed"]))
    return [float(row[column]) for row in rows if row["arm"] == arm.name]


def _report(path: Path) -> None:
    """The table on stdout, and the plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    print(
        "| arm | rate at the top | test error, % | against the first of its kind, points | test loss, nats |"
    )
    print("|---|---|---|---|---|")
    means = []
    for arm in (arm for arm in ARMS if len(_values(path, arm, "error")) == len(SEEDS)):
        first = next(other for other in ARMS if other.lora == arm.lora)
        errors = _values(path, arm, "error")
        mean, loss = over_runs(errors), over_runs(_values(path, arm, "loss"))
        difference = paired_runs(errors, _values(path, first, "error"))
        against = (
            "" if arm is first else f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
        )
        scores = f"{mean.mean:.2f} ± {mean.se:.2f} | {against} | {loss.mean:.3f} ± {loss.se:.3f}"
        print(f"| {arm.name} | {arm.lr:g} | {scores} |")
        means.append((arm.name, mean))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(means), 0, -1)
    axes.errorbar([m.mean for _, m in means], places, xerr=[m.se for _, m in means], fmt="o", capsize=3)
    axes.set_yticks(list(places), [name for name, _ in means])
    best = min(means, key=lambda item: item[1].mean)
    label = f"test error (%), mean and standard error over {len(SEEDS)} seeds"
    axes.set(xlabel=label, title=f"Least error: {best[0]} ({best[1].mean:.1f} %)")
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "layer-rates.png", dpi=110)


def _order() -> list[tuple[Arm, int]]:
    """Every arm of every seed: full fine-tuning first, seed by seed."""
    return [(arm, seed) for lora in (False, True) for seed in SEEDS for arm in ARMS if arm.lora == lora]


def main() -> None:
    """Every arm of every seed; ends after the given minutes, with the rest for the next call."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")
    RESULTS.mkdir(exist_ok=True)
    path, data, end = RESULTS / "layer-rates.csv", _data(), time.monotonic() + 60 * minutes
    for arm, seed in tqdm(_order(), unit="run"):
        if time.monotonic() > end:
            print("Not done: call it again to go on. The arms that are complete:")
            break
        _run(path, arm, seed, data)
    _report(path)


if __name__ == "__main__":
    main()
