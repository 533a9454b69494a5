"""Does pretraining help, or poison? Six arms on one budget, on real digits; CSV and PNG go into results/.

A network of six fully connected layers learns scikit-learn's digits from MNIST weights, from weights that
memorised MNIST with random labels, from shuffled MNIST weights, from MNIST's first layers alone, and from
random weights. It takes minutes on two cores. Run as `python -m examples.transfer.negative_transfer`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftkern.transfer.negative import NegativeReport, arms_of, compare_arms
from peftkern.transfer.tasks import classification

from .cut_arms import SmallNet
from .results_files import save_plot, save_rows
from .samples import mnist, scikit_digits

SEEDS = (0, 1, 2, 3)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.tensor(images)[:, None] / 8 - 1


def _pretrained(*, random_labels: bool, steps: int = 600) -> nn.Module:
    """The small network trained on MNIST, or on MNIST with labels drawn at random."""
    images = mnist()
    pixels, labels = _pixels(images.images), torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(0)
    if random_labels:
        labels = labels[torch.randperm(len(labels), generator=generator)]
    model = SmallNet(0, classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(labels), (64,), generator=generator)
        loss = cross_entropy(model(pixel_values=pixels[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def main() -> None:
    """MNIST to scikit-learn's digits."""
    target = scikit_digits()
    inputs = {"pixel_values": _pixels(target.images)}
    task = classification(inputs, torch.tensor(target.labels), batch_size=32, held_out=0.8)
    source, memorised = _pretrained(random_labels=False), _pretrained(random_labels=True)
    head = ("classifier",)
    arms = arms_of(source, head=head, depths=(1, 3))
    arms["random labels"] = arms_of(memorised, head=head)["pretrained"]
    report = compare_arms(
        arms,
        task,
        steps=80,
        seeds=SEEDS,
        rates=(1e-3, 3e-3, 1e-2),
        evaluations=8,
        budget=3600,
        progress=True,
    )
    print(report.table())
    print(f"{report.seconds:.0f} s")
    save_rows("negative_digits", rows_of(report))
    save_plot("negative_digits", report.draw)


def rows_of(report: NegativeReport) -> list[dict[str, object]]:
    """A line for each evaluation of each run, for a table; measures that a language model lacks are empty."""
    return [
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


if __name__ == "__main__":
    main()
