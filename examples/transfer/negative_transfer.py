"""Does pretraining help, or poison? Arms on one budget, on real data; CSV and PNG go into
examples/transfer/results.

`digits`: a small vision transformer on scikit-learn's digits, from MNIST weights, from MNIST weights whose
labels were random, from shuffled MNIST weights, from the first layers alone, and from random weights.
`sentences`: MiniLM, all weights trained, on the movie sentences, against its shuffled and its random twin.
Run as `python -m examples.transfer.negative_transfer digits` (or sentences, or both without a name).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftkern.transfer.negative import NegativeReport, arms_of, compare_arms
from peftkern.transfer.tasks import classification

from .cut import Classifier
from .cut_arms import small_vit
from .results_files import save_plot, save_rows
from .samples import minilm, mnist, scikit_digits, sentences

SEEDS = (0, 1, 2)
LENGTH, ROWS = 48, 1600


def _pixels(images: np.ndarray) -> Tensor:
    return torch.tensor(images)[:, None] / 8 - 1


def _pretrained_vit(*, random_labels: bool, steps: int = 400) -> nn.Module:
    """The small ViT trained on MNIST, or on MNIST with labels drawn at random."""
    images = mnist()
    pixels, labels = _pixels(images.images), torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(0)
    if random_labels:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    model = small_vit(0, classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(labels), (64,), generator=generator)
        loss = cross_entropy(model(pixel_values=pixels[index]).logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def digits() -> None:
    """MNIST to scikit-learn's digits."""
    target = scikit_digits()
    inputs = {"pixel_values": _pixels(target.images)}
    task = classification(inputs, torch.tensor(target.labels), batch_size=32)
    source, memorised = _pretrained_vit(random_labels=False), _pretrained_vit(random_labels=True)
    head = ("classifier",)
    arms = arms_of(source, head=head, depths=(2, 4))
    arms["random labels"] = arms_of(memorised, head=head)["pretrained"]
    report = compare_arms(
        arms,
        task,
        steps=120,
        seeds=SEEDS,
        rates=(3e-4, 1e-3, 3e-3),
        evaluations=6,
        budget=1500,
        progress=True,
    )
    _written("negative_digits", report)


def sentiment() -> None:
    """MiniLM on the movie sentences."""
    data = sentences("movie")
    rows = np.sort(np.random.default_rng(0).permutation(len(data.texts))[:ROWS])
    encoder, tokenizer = minilm()
    texts = [data.texts[index] for index in rows]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    documents = [data.documents[index] for index in rows]
    task = classification(inputs, torch.tensor(data.labels[rows]), groups=documents, batch_size=16)
    model = Classifier(encoder, encoder.config.hidden_size, 2)
    arms = arms_of(model, head=("head",))
    report = compare_arms(
        arms,
        task,
        steps=72,
        seeds=SEEDS,
        rates=(5e-5, 2e-4, 5e-4),
        evaluations=4,
        budget=1500,
        progress=True,
    )
    _written("negative_sentences", report)


def _written(name: str, report: NegativeReport) -> None:
    print(report.table())
    print(f"{report.seconds:.0f} s")
    rows = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "learning_rate": f"{run.rate:g}",
            "examples": examples,
            "loss": score.loss,
            "accuracy": score.accuracy,
            "ece": score.ece,
            "brier": score.brier,
        }
        for run in report.runs
        for examples, score in zip(run.examples, run.scores, strict=True)
    ]
    save_rows(name, rows)
    save_plot(name, report.draw)


def main() -> None:
    """Run the parts that are named, or both."""
    parts = {"digits": digits, "sentences": sentiment}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
