"""Layer-wise rates, gradual unfreezing, the slanted triangle and LoRA+ on 500 real sentences, paired over five seeds.

MiniLM on the movie sentences: 500 to train on, 500 others (of other reviews) to choose each arm's learning rate by, 2,000 more to
test on. Every arm trains the same rows in the same order, so that differences are paired. Finished runs are kept in the CSV, and a
second call goes on with the rest: `python -m examples.transfer.layer_rates [MINUTES]`.
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
TRAIN, CHOICE, TEST = 500, 500, 2000
EPOCHS, BATCH, LENGTH, CHUNK = 3, 16, 48, 64
SEEDS = (0, 1, 2, 3, 4)
CHOICE_SEED = 100  # of the runs that choose the learning rates
FULL_RATES, LORA_RATES = (1e-4, 2e-4), (1e-3, 2e-3)
FIELDS = ("arm", "lr", "seed", "rows", "error", "loss", "seconds")


@dataclass(frozen=True)
class Arm:
    """How one arm trains: LoRA or every weight, its rates, whether it thaws from the top, and its schedule."""

    name: str
    lora: bool = False
    rates: Rates = Rates()
    unfreeze: bool = False
    schedule: str = "linear"

    @property
    def choices(self) -> tuple[float, ...]:
        """The learning rates to choose from, at the top."""
        return LORA_RATES if self.lora else FULL_RATES


ARMS = (
    Arm("full"),
    Arm("full, layer rates 17.6", rates=Rates(layer_ratio=17.6)),
    Arm("full, layer rates, thawed, slanted", rates=Rates(layer_ratio=17.6), unfreeze=True, schedule="slanted"),
    Arm("LoRA", lora=True),
    Arm("LoRA+ 16", lora=True, rates=Rates(lora_plus=16)),
    Arm("LoRA+ 16, layer rates 17.6", lora=True, rates=Rates(layer_ratio=17.6, lora_plus=16)),
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
    """Token ids (lists), labels, and the rows of each purpose."""

    ids: list[list[int]]
    labels: Tensor
    pool: np.ndarray
    choice: np.ndarray
    test: np.ndarray


def _data() -> Data:
    """Documents are drawn once: those of the test, those of the choice, and the rest to draw training rows from."""
    movie = sentences("movie")
    _, tokenizer = minilm()
    ids = tokenizer(movie.texts, truncation=True, max_length=LENGTH)["input_ids"]
    documents = np.random.default_rng(99).permutation(np.unique(movie.documents))
    order = np.concatenate([np.flatnonzero(movie.documents == document) for document in documents])
    ends = [_document_end(movie.documents, order, count) for count in (TEST, TEST + CHOICE)]
    test, choice, pool = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]
    return Data(ids, torch.tensor(movie.labels), pool, choice, test)


def _document_end(documents: np.ndarray, order: np.ndarray, count: int) -> int:
    """The first place from `count` on where a document ends."""
    while count < len(order) and documents[order[count]] == documents[order[count - 1]]:
        count += 1
    return count


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

        encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]))
    else:
        encoder.pooler.requires_grad_(False)  # the mean of the tokens does not read it
    return Classifier(encoder, width)


def _train(arm: Arm, lr: float, seed: int, data: Data) -> Classifier:
    """EPOCHS over TRAIN rows that the seed draws, in an order that it draws."""
    generator = np.random.default_rng(seed)
    rows = generator.choice(data.pool, TRAIN, replace=False)
    model = _model(arm, seed).train()
    optimizer = torch.optim.AdamW(arm.rates.groups(model, lr=lr), weight_decay=0.01)
    batches = [batch for _ in range(EPOCHS) for batch in _batches(data, generator.permutation(rows), generator)]
    scheduler = LambdaLR(optimizer, schedule(arm.schedule, len(batches), warmup=0.1))
    depths = parameter_depths(model)
    trained = sorted({depths[name] for name, parameter in model.named_parameters() if parameter.requires_grad})
    plan = UnfreezingPlan.every(max(1, len(batches) // (2 * len(trained))), trained) if arm.unfreeze else UnfreezingPlan(((0, 0),))
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


def _run(path: Path, arm: Arm, lr: float, seed: int, purpose: str, data: Data) -> None:
    """One run, added to the CSV, unless it is there."""
    if any((row["arm"], float(row["lr"]), int(row["seed"])) == (arm.name, lr, seed) for row in _runs(path)):
        return
    start = time.perf_counter()
    model = _train(arm, lr, seed, data)
    seconds = time.perf_counter() - start
    error, loss = _evaluate(model, data, data.choice if purpose == "choice" else data.test)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow([arm.name, lr, seed, purpose, f"{error:.3f}", f"{loss:.5f}", f"{seconds:.1f}"])


def _chosen(path: Path, arm: Arm) -> float:
    """The rate with the smallest error on the rows of the choice; of equal ones the smallest loss."""
    runs = [row for row in _runs(path) if row["arm"] == arm.name and row["rows"] == "choice"]
    return float(min(runs, key=lambda row: (float(row["error"]), float(row["loss"])))["lr"])


def _errors(path: Path, arm: Arm) -> list[float]:
    return [float(row["error"]) for row in sorted(_runs(path), key=lambda row: int(row["seed"])) if _is_test(row, arm)]


def _is_test(row: dict[str, str], arm: Arm) -> bool:
    return row["arm"] == arm.name and row["rows"] == "test"


def _report(path: Path) -> None:
    """The table on stdout, and the plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    print("| arm | rate at the top | test error, % | against one rate for all, points |\n|---|---|---|---|")
    means = []
    for arm in ARMS:
        errors, base = _errors(path, arm), _errors(path, ARMS[3] if arm.lora else ARMS[0])
        mean, difference = over_runs(errors), paired_runs(errors, base)
        against = "" if errors == base else f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
        print(f"| {arm.name} | {_chosen(path, arm):g} | {mean.mean:.2f} ± {mean.se:.2f} | {against} |")
        means.append((arm.name, mean))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(means), 0, -1)
    axes.errorbar([m.mean for _, m in means], places, xerr=[m.mean - m.low for _, m in means], fmt="o", capsize=3)
    axes.set_yticks(list(places), [name for name, _ in means])
    best = min(means, key=lambda item: item[1].mean)
    axes.set(xlabel="test error (%), mean and 95 % interval over 5 seeds", title=f"Least error: {best[0]} ({best[1].mean:.1f} %)")
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "layer-rates.png", dpi=110)


def main() -> None:
    """Choose the rates, then test; end after the given minutes, with the rest for the next call."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else float("inf")
    RESULTS.mkdir(exist_ok=True)
    path, data, end = RESULTS / "layer-rates.csv", _data(), time.monotonic() + 60 * minutes
    choices = [(arm, lr, CHOICE_SEED, "choice") for arm in ARMS for lr in arm.choices]
    with tqdm(total=len(choices) + len(SEEDS) * len(ARMS), unit="run") as bar:
        for arm, lr, seed, purpose in choices:
            if time.monotonic() > end:
                return print("Not done: call it again to go on.")
            _run(path, arm, lr, seed, purpose, data)
            bar.update()
        for arm, seed in ((arm, seed) for seed in SEEDS for arm in ARMS):
            if time.monotonic() > end:
                return print("Not done: call it again to go on.")
            _run(path, arm, _chosen(path, arm), seed, "test", data)
            bar.update()
    _report(path)


if __name__ == "__main__":
    main()
