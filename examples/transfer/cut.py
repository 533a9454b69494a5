"""Where to cut, on real data: each part takes minutes on two cores and writes CSV and PNG into results/.

`layers`: MiniLM on the movie sentences: probe, LogME and CKA of every depth with their controls, and the time
and memory of a step cut there. `train`: LoRA trained from some of the layers on, which is what the scores are
to forecast. Run as `python -m examples.transfer.cut layers` (or train, or both without a name). Yosinski's
four arms are in examples/transfer/cut_arms.py.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftkern.transfer.cut import StepCost, step_cost, where_to_cut
from peftkern.transfer.features import pool_mean
from peftkern.transfer.intervals import over_runs
from peftkern.transfer.tasks import classification
from peftkern.transfer.trained_cuts import trained_cuts

from .results_files import save_plot, save_rows
from .samples import minilm, sentences

SEEDS = (0, 1, 2)
ROWS, LENGTH, BATCH, STEPS = 1200, 32, 16, 30
TARGETS = ["query", "key", "value", "dense"]


def _movie() -> tuple[list[str], Tensor, list[int]]:
    """Sentences drawn at random, their labels and documents."""
    data = sentences("movie")
    rows = np.sort(np.random.default_rng(0).permutation(len(data.texts))[:ROWS])
    return [data.texts[row] for row in rows], torch.tensor(data.labels[rows]), data.documents[rows].tolist()


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.head(pool_mean(hidden, attention_mask))


def _encoded(texts: list[str]) -> dict[str, Tensor]:
    _, tokenizer = minilm()
    options = {"padding": True, "truncation": True, "max_length": LENGTH}
    batch = tokenizer(texts, return_tensors="pt", **options)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _classifier(encoder: nn.Module) -> Classifier:
    torch.manual_seed(0)
    return Classifier(encoder, encoder.config.hidden_size, 2)


def layers() -> None:
    """Score MiniLM's depths on the movie sentences, and time a LoRA step that is cut at each."""
    texts, labels, documents = _movie()
    model, tokenizer = minilm()
    report = where_to_cut(
        model,
        texts,
        labels.tolist(),
        tokenizer=tokenizer,
        groups=documents,
        max_length=LENGTH,
        repeats=2,
        costs=_costs(texts, labels),
        progress=True,
    )
    print(report.table())
    rows = [
        {
            "depth": row.depth,
            "probe": row.accuracy.mean,
            "probe_se": row.accuracy.se,
            "behind_best": row.behind.mean,
            "random_twin": row.random.mean,
            "random_twin_se": row.random.se,
            "logme": row.logme,
            "cka_last": row.to_last.value,
            "cka_last_se": row.to_last.se,
            "step_seconds": row.cost.seconds,
            "saved_mib": row.cost.saved_bytes / 2**20,
            "step_computed": row.step,
        }
        for row in report.rows
    ]
    save_rows("cut_layers", rows)
    save_plot("cut_layers", report.draw)
    tau = kendalltau([row["probe"] for row in rows], [row["logme"] for row in rows])
    print(f"Kendall's tau of probe and LogME over the depths: {tau.statistic:.2f}, p = {tau.pvalue:.2f}")


def _costs(texts: list[str], labels: Tensor) -> list[StepCost]:
    """Of a step of 16 sentences that trains LoRA adapters of the layers above each cut, and a head."""
    from peft import LoraConfig, get_peft_model

    encoder, _ = minilm()
    adapted = get_peft_model(encoder, LoraConfig(r=8, target_modules=TARGETS))
    model = Classifier(adapted, encoder.config.hidden_size, 2).train()
    batch, some = _encoded(texts[:BATCH]), labels[:BATCH]

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, some)

    return [step_cost(model, batch, first, loss=loss, repeats=5) for first in range(7)]


def train() -> None:
    """LoRA trained from some layers on, which is what the scores of `layers` are to forecast."""
    texts, labels, documents = _movie()
    encoder, _ = minilm()
    task = classification(_encoded(texts), labels, groups=documents, batch_size=BATCH)
    report = trained_cuts(
        _classifier(encoder),
        task,
        firsts=(0, 2, 4, 6),
        steps=STEPS,
        seeds=SEEDS,
        rate=2e-3,
        targets=TARGETS,
        head=("head",),
        budget=3600,
        progress=True,
    )
    print(report.table())
    rows = [
        {
            "first": cut.first,
            "seed": seed,
            "loss": loss,
            "accuracy": accuracy,
            "step_seconds": cut.cost.seconds,
            "saved_mib": cut.cost.saved_bytes / 2**20,
        }
        for cut in report.cuts
        for seed, loss, accuracy in zip(SEEDS, cut.losses, cut.accuracies, strict=True)
    ]
    for cut in report.cuts:
        mean = over_runs(cut.accuracies)
        print(f"from layer {cut.first}: accuracy {mean.mean:.4f} ± {mean.se:.4f}")
    save_rows("cut_train", rows)
    save_plot("cut_train", report.draw)


def main() -> None:
    """Run the parts that are named, or both."""
    parts = {"layers": layers, "train": train}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
