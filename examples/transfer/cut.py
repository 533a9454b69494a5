"""Where to cut, on real data: each part takes minutes on two cores and writes CSV and PNG into results/.

`layers`: MiniLM on the movie sentences: probe, LogME and CKA of every depth, the time and memory of a step cut
there, and LoRA trained from some layers on, which is what the scores are to forecast. `language`: SmolLM2 on the
King James Bible, LoRA trained from some layers on. Run as `python -m examples.transfer.cut layers` (or language,
or both without a name). Yosinski's four arms are in examples/transfer/cut_arms.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from peftkern.transfer.cut import CutReport, StepCost, step_cost, where_to_cut
from peftkern.transfer.features import pool_mean
from peftkern.transfer.intervals import over_runs
from peftkern.transfer.tasks import language_modelling
from peftkern.transfer.trained_cuts import trained_cuts

from .results_files import save_plot, save_rows
from .samples import kjv, minilm, sentences, smollm2

SEEDS = (0, 1, 2)
CUTS, STEPS, BATCH, LENGTH = (0, 2, 4, 5, 6), 100, 16, 48
TRAIN, TEST = 2000, 1000

Batch = dict[str, Tensor]


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
    where = {"target_modules": ["query", "key", "value", "dense"], "layers_pattern": "layer"}
    if layers:
        config = LoraConfig(r=8, lora_alpha=16, layers_to_transform=layers, **where)
        encoder = get_peft_model(encoder, config)
    else:
        encoder.requires_grad_(False)
    return Classifier(encoder, encoder.config.hidden_size, 2)


def _encoded(texts: list[str]) -> Batch:
    _, tokenizer = minilm()
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    return dict(tokenizer(texts, return_tensors="pt", **options))


def _rows(batch: Batch, index: np.ndarray) -> Batch:
    """These rows, without the columns that are padding in all of them."""
    mask = batch["attention_mask"][index]
    width = int(mask.sum(1).max())
    return {"input_ids": batch["input_ids"][index, :width], "attention_mask": mask[:, :width]}


def _trained(first: int, seed: int, batch: Batch, labels: Tensor, train: np.ndarray) -> Classifier:
    model = _adapted(first, seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        index = rng.choice(train, BATCH, replace=False)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10) * (1 - step / STEPS)
        loss = cross_entropy(model(**_rows(batch, index)), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _accuracy(model: Classifier, batch: Batch, labels: Tensor, test: np.ndarray) -> float:
    parts = np.array_split(test, 16)
    with torch.no_grad():
        right = [(model(**_rows(batch, part)).argmax(1) == labels[part]).sum() for part in parts]
    return float(sum(right)) / len(test)


def _cost(first: int, batch: Batch, labels: Tensor, index: np.ndarray) -> StepCost:
    def loss(logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels[index])

    cost = step_cost(_adapted(first, 0).train(), _rows(batch, index), 0, loss=loss, repeats=5)
    return replace(cost, first=first)


def layers() -> None:
    """Score MiniLM's depths on the movie sentences, train LoRA from some, and write both side by side."""
    data = sentences("movie")
    order = np.random.default_rng(0).permutation(len(data.texts))
    documents = list(dict.fromkeys(data.documents[order]))
    trained = set(documents[: int(len(documents) * TRAIN / len(data.texts))])
    train = np.array([row for row in order if data.documents[row] in trained])
    test = np.array([row for row in order if data.documents[row] not in trained])[:TEST]
    batch, labels = _encoded(data.texts), torch.tensor(data.labels)
    model, tokenizer = minilm()
    report = where_to_cut(
        model,
        [data.texts[row] for row in train],
        labels[train].tolist(),
        tokenizer=tokenizer,
        groups=[data.documents[row] for row in train],
        max_length=LENGTH,
        repeats=2,
        costs=[_cost(first, batch, labels, np.sort(train[:BATCH])) for first in CUTS],
        progress=True,
    )
    print(report.table())
    runs: dict[int, list[float]] = {first: [] for first in CUTS}
    for first in tqdm(CUTS, desc="LoRA from the cut on"):
        for seed in SEEDS:
            model = _trained(first, seed, batch, labels, train)
            runs[first].append(_accuracy(model, batch, labels, test))
    _write_layers(report, runs)


def _write_layers(report: CutReport, runs: dict[int, list[float]]) -> None:
    from scipy.stats import kendalltau

    rows = []
    for row in report.rows:
        lora = over_runs(runs[row.depth]) if row.depth in runs else None
        rows.append(
            {
                "depth": row.depth,
                "probe": row.accuracy.mean,
                "probe_se": row.accuracy.se,
                "random_twin": row.random.mean,
                "logme": row.logme,
                "cka_last": row.to_last.value,
                "cka_last_se": row.to_last.se,
                "lora_from_here": lora.mean if lora else "",
                "lora_se": lora.se if lora else "",
                "step_seconds": row.cost.seconds if row.cost else "",
                "saved_mib": row.cost.saved_bytes / 2**20 if row.cost else "",
                "step_computed": row.step,
            }
        )
        print(rows[-1])
    save_rows("cut_layers", rows)
    tau = kendalltau([row["probe"] for row in rows], [row["logme"] for row in rows]).statistic
    print(f"Kendall's tau of probe and LogME over the depths: {tau:.2f}")

    def lora_runs(axes: Any) -> None:
        means = [over_runs(runs[first]) for first in CUTS]
        spread = [mean.se for mean in means]
        axes.errorbar(CUTS, [mean.mean for mean in means], spread, marker="s", label="LoRA from here on")
        axes.legend()

    save_plot("cut_layers", report.draw, lora_runs)


def language() -> None:
    """SmolLM2 on the King James Bible: short LoRA runs from some layers on."""
    model, tokenizer = smollm2()
    chapters = kjv(held_out=False)
    chosen = np.random.default_rng(0).permutation(len(chapters))[:90]
    tokens = [tokenizer(chapters[index])["input_ids"][:256] for index in chosen]
    windows = torch.tensor([ids for ids in tokens if len(ids) == 256][:60])
    task = language_modelling(windows, groups=list(range(len(windows))), batch_size=2)
    options = {"firsts": (0, 10, 20, 26), "steps": 20, "seeds": SEEDS}
    report = trained_cuts(model, task, budget=1500, progress=True, **options)
    print(report.table())
    rows = [
        {
            "first": cut.first,
            "seed": seed,
            "loss": loss,
            "step_seconds": cut.cost.seconds,
            "saved_mib": cut.cost.saved_bytes / 2**20,
        }
        for cut in report.cuts
        for seed, loss in zip(SEEDS, cut.losses, strict=True)
    ]
    save_rows("cut_language", rows)
    save_plot("cut_language", report.draw)


def main() -> None:
    """Run the parts that are named, or both."""
    parts = {"layers": layers, "language": language}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
