"""Yosinski's four arms on real digits: MNIST's 0-4 as task A, 5-9 as task B, six fully connected layers.

Minutes on two cores; CSV and PNG go into results/. Run as `python -m examples.transfer.cut_arms`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peftkern.transfer.arms import four_arms

from .results_files import save_plot, save_rows
from .samples import mnist

SEEDS, STEPS, BATCH, DEPTHS = (0, 1, 2, 3), 200, 64, (1, 3, 5, 6)


class SmallNet(nn.Module):
    """Six fully connected layers of width 128 with rectifiers, for images [B, 1, 8, 8], and a linear head."""

    def __init__(self, seed: int, *, classes: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        widths = [64] + [128] * 6
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))
        self.classifier = nn.Linear(128, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [B, classes]."""
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classifier(hidden)


def main() -> None:
    """Train the donors and the arms, and write what they reach on task B."""
    images = mnist()
    pixels, labels = torch.tensor(images.images)[:, None] / 8 - 1, torch.tensor(images.labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:2000], order[2000:]
    sets = {task: training[(labels[training] < 5) == (task == "A")] for task in "AB"}
    test = held_out[labels[held_out] >= 5]

    def train(model: nn.Module, task: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
        model.train()
        for _ in range(STEPS):
            index = sets[task][torch.randint(len(sets[task]), (BATCH,), generator=generator)]
            loss = cross_entropy(model(pixel_values=pixels[index]), labels[index] % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model.eval()(pixel_values=pixels[test])
        return float((logits.argmax(1) == labels[test] % 5).float().mean())

    def make(seed: int) -> nn.Module:
        return SmallNet(seed, classes=5)

    report = four_arms(make, train, score, depths=DEPTHS, seeds=SEEDS, progress=True)
    print(report.table())
    scores = {("base", 0): report.base}
    scores |= {(arm, n): values for arm, by in report.scores.items() for n, values in by.items()}
    rows = [
        {"arm": arm, "n": n, "seed": seed, "accuracy": value}
        for (arm, n), values in scores.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]
    save_rows("cut_arms", rows)
    save_plot("cut_arms", report.draw)


if __name__ == "__main__":
    main()
