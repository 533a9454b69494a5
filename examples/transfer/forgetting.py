"""What SmolLM2 forgets of Python's reference prose while a LoRA adapter learns the King James Bible: EWC,
L2-SP, replay and nothing.

Run as `python -m examples.transfer.forgetting` (again to go on: finished runs are read from the CSV;
`--minutes 5` stops in time). `--base bytes` does the same with a small model of bytes, which is at a minimum
of the source loss. The weights of EWC and L2-SP are such that the penalty of the unregularized run's last
adapter would be so many nats (the strength), so that the two are compared at equal size; replay's strength is
source rows a row, and a budget's the share of the unregularized run's rise that is allowed. Writes
results/forgetting_BASE.csv and its two plots, _frontier and _forecast.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkern
from peftkern.files import cache_dir
from peftkern.finetune.loss import install_model_loss
from peftkern.transfer.forgetting import (
    DeltaPenalty,
    FisherFactors,
    ForgettingGuard,
    Replay,
    collect_fisher,
    expansion_terms,
)
from peftkern.transfer.forgetting.overlap import overlapping

from .byte_model import byte_model, byte_windows
from .forgetting_plots import Row, arms, mean_error, plot, read, write
from .samples import kjv, pydoc_prose, smollm2

RESULTS = Path(__file__).parent / "results"
ARMS = [
    ("nothing", 0.0),
    ("EWC", 0.3),
    ("L2-SP", 0.3),
    ("EWC", 3.0),
    ("L2-SP", 3.0),
    ("replay", 0.25),
    ("budget", 0.5),
]
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """A base and how long and on how much it is trained and measured; windows are counted."""

    name: str
    length: int
    steps: int
    batch: int
    rate: float
    fisher: int
    terms: int
    target: int
    source: int


SETTINGS = {
    "smollm2": Setting("smollm2", 128, 20, 1, 2e-3, fisher=20, terms=4, target=12, source=20),
    "bytes": Setting("bytes", 64, 40, 8, 1.5e-3, fisher=128, terms=64, target=64, source=96),
}


@dataclass(frozen=True)
class Task:
    """Windows [n, length]: to learn, to measure the target and the source on, to measure the Fisher on and to
    replay."""

    learned: Tensor
    target: Tensor
    source: Tensor
    kept: Tensor


def spaced(rows: Tensor, most: int) -> Tensor:
    """At most so many rows at equal distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


def load(setting: Setting) -> tuple[nn.Module, Task]:
    """The base, and the task; source topics that share passages with the held-out ones are left out."""
    held_out, others = pydoc_prose(held_out=True), pydoc_prose(held_out=False)
    shared = set(overlapping(others, held_out))
    kept = [text for index, text in enumerate(others) if index not in shared]
    texts = (kjv(held_out=False)[::8], kjv(held_out=True), held_out, kept)
    if setting.name == "bytes":
        learned, target, source, kept_rows = (byte_windows(each, setting.length) for each in texts)
        model = byte_model(kept_rows)
    else:
        model, tokenizer = smollm2(torch.bfloat16)
        learned, target, source, kept_rows = (windows(tokenizer, each, setting.length) for each in texts)
    return model, Task(learned, spaced(target, setting.target), spaced(source, setting.source), kept_rows)


def windows(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """The texts' tokens one after the other, in windows [n, length]."""
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row[None], "labels": row[None]} for row in rows]


def adapted(base: nn.Module, seed: int) -> nn.Module:
    """The base with a fresh adapter of rank 8 on every linear layer, patched."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    peftkern.patch(model)
    install_model_loss(model)
    return model


def fisher_of(model: nn.Module, task: Task, setting: Setting) -> FisherFactors:
    """Measured once, then read from the cache."""
    path = cache_dir() / f"forgetting-example-{setting.name}.safetensors"
    if path.exists():
        return FisherFactors.load(path)
    fisher = collect_fisher(model, batches(spaced(task.kept, setting.fisher)), progress=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    fisher.save(path)
    return fisher


def weight_of(method: str, strength: float, rows: Sequence[Row]) -> float:
    """The weight of a penalty, or the nats of a budget, from the first unregularized run."""
    free = next((row for row in rows if row.method == "nothing"), None)
    if free is None or method in ("nothing", "replay"):
        return 0.0
    if method == "budget":
        return max(1e-4, strength * free.source_rise)
    return strength / (free.forecast if method == "EWC" else free.distance)


def train(
    model: nn.Module,
    task: Task,
    fisher: FisherFactors,
    arm: tuple[str, float, float, int],
    before: dict[str, Any],
    setting: Setting,
) -> Row:
    """The measurements after one run."""
    method, strength, weight, seed = arm
    begin = time.perf_counter()
    guard = ForgettingGuard(
        model,
        source=batches(task.source),
        target=batches(task.target),
        fisher=fisher,
        ewc=weight if method == "EWC" else 0.0,
        l2_sp=weight if method == "L2-SP" else 0.0,
        budget=weight if method == "budget" else None,
        every=setting.steps // 4 if method == "budget" else setting.steps,
        planned=setting.steps,
    )
    replay = (
        Replay(rows=len(task.kept), ratio=strength, slots=setting.batch, seed=seed)
        if method == "replay"
        else None
    )
    distance = DeltaPenalty(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting.rate, weight_decay=0.0)
    order = torch.randperm(len(task.learned), generator=torch.Generator().manual_seed(seed))
    guard.before = before.get("losses")
    guard.start()
    before["losses"] = guard.before
    for step in range(1, setting.steps + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * min(1.0, step / 3)
        rows = task.learned[order[(step - 1) * setting.batch : step * setting.batch]]
        model(input_ids=rows, labels=rows).loss.backward()
        for index in replay.rows_of(step - 1) if replay else ():
            row = task.kept[index][None]
            (model(input_ids=row, labels=row).loss / setting.batch).backward()
        guard.add_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if guard.end_of_step(step):
            break
    point = guard.best() or guard.front.points[-1]
    dissected = method == "nothing" and seed == SEEDS[0]
    terms = expansion_terms(model, batches(spaced(task.kept, setting.terms))) if dissected else None
    values = (terms.linear, terms.fisher, terms.blocks, terms.diagonal) if terms else (float("nan"),) * 4
    measured = (point.target, point.rise, point.standard_error, point.forecast, distance.value().item())
    return Row(method, strength, weight, seed, *measured, *values, time.perf_counter() - begin)


def missing(rows: Sequence[Row]) -> Iterator[tuple[str, float, int]]:
    """The runs that are still to do, seed by seed."""
    done = {(row.method, row.strength, row.seed) for row in rows}
    yield from ((*arm, seed) for seed in SEEDS for arm in ARMS if (*arm, seed) not in done)


def run(path: Path, minutes: float, setting: Setting) -> list[Row]:
    """Do the missing runs as long as there is time for one more."""
    rows, begin, longest = read(path), time.perf_counter(), 0.0
    base, task, before = None, None, {}
    for method, strength, seed in list(missing(rows)):
        if time.perf_counter() - begin + longest > 60 * minutes:
            break
        if base is None:
            base, task = load(setting)
        start = time.perf_counter()
        model = adapted(base, seed)
        arm = (method, strength, weight_of(method, strength, rows), seed)
        rows.append(train(model, task, fisher_of(model, task, setting), arm, before, setting))
        peftkern.unpatch(model)
        base = model.unload()
        longest = max(longest, time.perf_counter() - start)
        write(path, rows)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=SETTINGS, default="smollm2", help="bytes: a small model of bytes")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run beyond this time")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name = f"forgetting_{args.base}"
    rows = run(RESULTS / f"{name}.csv", args.minutes, SETTINGS[args.base])
    for (method, strength), runs in arms(rows).items():
        target, rise = (
            mean_error([getattr(row, name) for row in runs]) for name in ("target_loss", "source_rise")
        )
        print(
            f"{method:8s} {strength:4g}: target {target[0]:.4f} ({target[1]:.4f}), source {rise[0]:+.4f}"
            f" ({rise[1]:.4f}), {len(runs)} seeds"
        )
    plot(rows, RESULTS, name)


if __name__ == "__main__":
    main()
