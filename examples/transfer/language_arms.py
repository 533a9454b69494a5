"""The controls of transfer on real language: Yosinski's four arms, and whether pretraining helps or poisons.

Small Llamas of bytes, since SmolLM2 cannot be trained from scratch within minutes. `arms`: three layers,
Python's reference prose as task A, the King James Bible as task B, score the negative loss in nats a byte on
held-out books. `negative`: two layers that have learned the reference prose, or random bytes by heart, or
nothing, learn the Bible's other books from few windows. CSV and PNG go into results/. Run as `python -m
examples.transfer.language_arms arms` (or negative, or both without a name); minutes on a core.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.transfer.arms import ArmsReport, four_arms
from peftkern.transfer.negative import arms_of, compare_arms
from peftkern.transfer.tasks import language_modelling

from .byte_model import LENGTH, VOCABULARY, byte_model, byte_windows, new_byte_model
from .negative_transfer import rows_of
from .results_files import save_plot, save_rows
from .samples import kjv, pydoc_prose

SEEDS, DEPTHS, LAYERS, STEPS, BATCH, RATE = (0, 1, 2), (1, 2, 3), 3, 200, 8, 4e-3
TEST = 192  # windows of the held-out books
FEW, FEW_STEPS, FEW_BATCH = 600, 100, 8  # windows of the target, and how long it is learned
NOISE, NOISE_STEPS = 64, 400  # windows of random bytes that are learned by heart


def arms() -> None:
    """Train the donors and the arms, and write what they reach on the Bible."""
    sets = {"A": byte_windows(pydoc_prose(held_out=False)), "B": byte_windows(kjv(held_out=False))}
    held_out = byte_windows(kjv(held_out=True))
    test = held_out[:: len(held_out) // TEST][:TEST]

    def train(model: nn.Module, task: str, seed: int) -> None:
        fit(model, sets[task], seed, STEPS)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(model.eval()(input_ids=test, labels=test).loss)

    def make(seed: int) -> nn.Module:
        return new_byte_model(seed, layers=LAYERS, tied=False)

    report = four_arms(make, train, score, depths=DEPTHS, seeds=SEEDS, progress=True)
    print(report.table())
    scores = {("base", 0): report.base}
    scores |= {(arm, n): values for arm, by in report.scores.items() for n, values in by.items()}
    rows = [
        {"arm": arm, "n": n, "seed": seed, "nats_a_byte": -value}
        for (arm, n), values in scores.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]
    save_rows("language_arms", rows)
    save_plot("language_arms", report.draw, lambda axes: _title(axes, report))


def _title(axes: Any, report: ArmsReport) -> None:
    lost = -report.specificity(DEPTHS[-1]).mean
    title = f"{DEPTHS[-1]} frozen layers of Python's prose lose {lost:.2f} nats to the Bible's own"
    axes.set(ylabel="negative loss on held-out Bible, nats a byte (± s.e.)", title=title)


def fit(model: nn.Module, windows: Tensor, seed: int, steps: int) -> None:
    """Train what is trainable on windows that the seed draws, with a rate that rises and falls."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def negative() -> None:
    """From Python's reference prose, or from random bytes, to the Bible."""
    source = byte_model(byte_windows(pydoc_prose(held_out=False)))
    poisoned = new_byte_model(0)
    bytes_of_text = torch.arange(32, VOCABULARY - 1)
    generator = torch.Generator().manual_seed(0)
    noise = bytes_of_text[torch.randint(len(bytes_of_text), (NOISE, LENGTH), generator=generator)]
    fit(poisoned, noise, 0, NOISE_STEPS)
    chapters = [byte_windows([text])[:6] for text in kjv(held_out=False)[:: 1189 * 6 // FEW]]
    groups = [chapter for chapter, windows in enumerate(chapters) for _ in windows]
    task = language_modelling(torch.cat(chapters), groups=groups, batch_size=FEW_BATCH, held_out=0.6)
    compared = arms_of(source, depths=(1,))
    compared["random bytes"] = arms_of(poisoned)["pretrained"]
    report = compare_arms(
        compared,
        task,
        steps=FEW_STEPS,
        seeds=(*SEEDS, 3),
        rates=(1e-3, 3e-3, 1e-2),
        evaluations=6,
        budget=1200,
        progress=True,
    )
    print(report.table())
    for arm in ("shuffled", "first 1", "random bytes"):
        print(report.describe(arm))
    print(
        f"{report.seconds:.0f} s; {len(task.train[1])} windows to learn from, {len(task.test[1])} to test on"
    )
    save_rows("language_negative", rows_of(report))
    save_plot("language_negative", report.draw)


def main() -> None:
    """Run the parts that are named, or both."""
    parts = {"arms": arms, "negative": negative}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
