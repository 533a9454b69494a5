"""Where to cut, on real data: each part is a few minutes on two cores, and writes CSV and PNG into
examples/transfer/results.

`layers`: MiniLM on the movie sentences: probe, LogME and CKA of every depth, and the time and memory of a
step cut there; then LoRA trained from that layer on, which is what the scores are to forecast. `arms`:
Yosinski's four arms on MNIST, a small vision transformer, digits 0-4 as task A and 5-9 as task B. `language`:
SmolLM2 on the King James Bible, LoRA trained from each of some layers on. Run as `python -m
examples.transfer.cut layers` (or arms, language, or all without a name).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from peftkern.transfer.arms import four_arms
from peftkern.transfer.cut import CutReport, step_cost, where_to_cut
from peftkern.transfer.features import pool_mean
from peftkern.transfer.intervals import over_runs
from peftkern.transfer.tasks import language_modelling
from peftkern.transfer.trained_cuts import trained_cuts

from .samples import kjv, minilm, mnist, sentences, smollm2

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
CUTS, STEPS, BATCH, LENGTH = (0, 1, 2, 3, 4, 5, 6), 100, 16, 48
TRAIN, TEST = 2000, 1500


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.head(pool_mean(hidden, attention_mask))


def _adapted(first: int, seed: int) -> Classifier:
    """MiniLM with LoRA (r = 8, all linear layers) from layer `first` on, and a new head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    encoder, _ = minilm()
    layers = list(range(first, encoder.config.num_hidden_layers))
    targets = ["query", "key", "value", "dense"]
    if layers:
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=targets,
            layers_to_transform=layers,
            layers_pattern="layer",
        )
        encoder = get_peft_model(encoder, config)
    else:
        encoder.requires_grad_(False)
    return Classifier(encoder, encoder.config.hidden_size, 2)


def _encoded(texts: list[str]) -> dict[str, Tensor]:
    _, tokenizer = minilm()
    return dict(
        tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"),
    )


def _rows(batch: dict[str, Tensor], index: np.ndarray) -> dict[str, Tensor]:
    """These rows, without the columns that are padding in all of them."""
    mask = batch["attention_mask"][index]
    width = int(mask.sum(1).max())
    return {"input_ids": batch["input_ids"][index, :width], "attention_mask": mask[:, :width]}


def _lora_accuracy(
    first: int,
    seed: int,
    batch: dict[str, Tensor],
    labels: Tensor,
    train: np.ndarray,
    test: np.ndarray,
) -> float:
    model = _adapted(first, seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 10) * (1 - step / STEPS),
    )
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        index = rng.choice(train, BATCH, replace=False)
        loss = cross_entropy(model(**_rows(batch, index)), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = [
            (
                model(
                    **_rows(batch, part),
                ).argmax(1)
                == labels[part]
            )
            .float()
            .sum()
            for part in np.array_split(test, 24)
        ]
    return float(sum(right)) / len(test)


def layers() -> None:
    """Score MiniLM's depths on the movie sentences, train LoRA from each, and write both side by side."""
    data = sentences("movie")
    order = np.random.default_rng(0).permutation(len(data.texts))
    documents = list(dict.fromkeys(data.documents[order]))
    cut_off = int(len(documents) * TRAIN / len(data.texts))
    train_documents = set(documents[:cut_off])
    train = np.array([i for i in order if data.documents[i] in train_documents])
    test = np.array([i for i in order if data.documents[i] not in train_documents])[:TEST]
    batch, labels = _encoded(data.texts), torch.tensor(data.labels)
    costs = []
    for first in CUTS:
        few = np.sort(train[:BATCH])
        model = _adapted(first, 0).train()
        wrapped = {**_rows(batch, few)}
        costs.append(
            step_cost(
                model,
                wrapped,
                0,
                loss=lambda logits, y=labels[few]: cross_entropy(logits, y),
                repeats=5,
            ),
        )
    costs = [
        type(cost)(
            first,
            cost.seconds,
            cost.saved_bytes,
        )
        for first, cost in zip(CUTS, costs, strict=True)
    ]
    model, tokenizer = minilm()
    texts, own = [data.texts[i] for i in train], [data.documents[i] for i in train]
    report = where_to_cut(
        model,
        texts,
        labels[train].tolist(),
        tokenizer=tokenizer,
        groups=own,
        max_length=LENGTH,
        repeats=2,
        costs=costs,
        progress=True,
    )
    print(report.table())
    runs = {first: [] for first in CUTS}
    for first in tqdm(CUTS, desc="LoRA from the cut on"):
        for seed in SEEDS:
            runs[first].append(_lora_accuracy(first, seed, batch, labels, train, test))
    _write_layers(report, runs)


def _write_layers(report: CutReport, runs: dict[int, list[float]]) -> None:
    from scipy.stats import kendalltau

    rows = []
    for row in report.rows:
        lora = over_runs(runs[row.depth])
        rows.append(
            {
                "depth": row.depth,
                "probe": round(row.accuracy.mean, 4),
                "probe_se": round(row.accuracy.se, 4),
                "random_twin": round(row.random.mean, 4),
                "logme": round(row.logme, 5),
                "cka_last": round(row.to_last.value, 4),
                "cka_last_se": round(row.to_last.se, 4),
                "lora_from_here": round(lora.mean, 4),
                "lora_se": round(lora.se, 4),
                "step_seconds": round(row.cost.seconds, 4),
                "saved_mib": round(row.cost.saved_bytes / 2**20, 2),
                "step_computed": round(row.step, 3),
            }
        )
    _save("cut_layers.csv", rows)
    tau = kendalltau([r["probe"] for r in rows], [r["logme"] for r in rows]).statistic
    print(f"Kendall's tau of probe and LogME over the depths: {tau:.2f}")
    figure, axes = _figure()
    report.draw(axes)
    means = [over_runs(runs[row.depth]) for row in report.rows]
    axes.errorbar(
        [r.depth for r in report.rows],
        [m.mean for m in means],
        [m.se for m in means],
        marker="s",
        label="LoRA from here on",
    )
    axes.legend()
    figure.savefig(RESULTS / "cut_layers.png", dpi=110)


def small_vit(seed: int, *, classes: int) -> nn.Module:
    """A vision transformer of 6 layers of width 64 for images [B, 1, 8, 8], with weights of this seed."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = dict(image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128)
    return ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=6, num_attention_heads=4, num_labels=classes),
    )


def arms() -> None:
    """Yosinski's four arms on MNIST's halves."""
    images = mnist()
    pixels = torch.tensor(images.images)[:, None] / 8 - 1
    labels = torch.tensor(images.labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:2000], order[2000:]
    sets = {task: training[(labels[training] < 5) == (task == "A")] for task in "AB"}
    test = held_out[labels[held_out] >= 5]

    def train(model: nn.Module, task: str, seed: int) -> None:
        steps, generator = 250, torch.Generator().manual_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        model.train()
        for _ in range(steps):
            index = sets[task][torch.randint(len(sets[task]), (64,), generator=generator)]
            loss = cross_entropy(model(pixel_values=pixels[index]).logits, labels[index] % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return float(
                (model.eval()(pixel_values=pixels[test]).logits.argmax(1) == labels[test] % 5).float().mean(),
            )

    report = four_arms(
        lambda seed: small_vit(seed, classes=5),
        train,
        score,
        depths=(1, 2, 4, 6),
        seeds=SEEDS,
        progress=True,
    )
    print(report.table())
    rows = [
        {"arm": arm, "n": n, "seed": seed, "accuracy": round(value, 4)}
        for arm, by in report.scores.items()
        for n, values in by.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]
    base = [
        {
            "arm": "base",
            "n": 0,
            "seed": seed,
            "accuracy": round(v, 4),
        }
        for seed, v in zip(SEEDS, report.base, strict=True)
    ]
    _save("cut_arms.csv", base + rows)
    figure, axes = _figure()
    report.draw(axes)
    figure.savefig(RESULTS / "cut_arms.png", dpi=110)


def language() -> None:
    """SmolLM2 on the King James Bible: short LoRA runs from some layers on."""
    model, tokenizer = smollm2()
    chapters = kjv(held_out=False)
    chosen = np.random.default_rng(0).permutation(len(chapters))[:90]
    tokens = [tokenizer(chapters[index])["input_ids"][:256] for index in chosen]
    windows = torch.tensor([ids for ids in tokens if len(ids) == 256][:64])
    task = language_modelling(windows, groups=list(range(len(windows))), batch_size=2)
    report = trained_cuts(
        model,
        task,
        firsts=(0, 10, 20, 26),
        steps=20,
        seeds=SEEDS,
        budget=1500,
        progress=True,
    )
    print(report.table())
    rows = [
        {
            "first": cut.first,
            "seed": seed,
            "loss": round(loss, 4),
            "step_seconds": round(cut.cost.seconds, 3),
            "saved_bytes": cut.cost.saved_bytes,
        }
        for cut in report.cuts
        for seed, loss in zip(SEEDS, cut.losses, strict=True)
    ]
    _save("cut_language.csv", rows)
    figure, axes = _figure()
    report.draw(axes)
    figure.savefig(RESULTS / "cut_language.png", dpi=110)


def _figure() -> tuple:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, 4.5), layout="constrained")


def _save(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {"layers": layers, "arms": arms, "language": language}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
