"""LoRA, bottleneck, parallel and prefix adapters of equal parameters: SmolLM2 in 4 bit learns the King
James Bible.

Each kind is trained on 20 sequences of 128 tokens with two learning rates (seed 0), and with the better of
them on two further seeds, which draw other weights and other sequences. Written to
examples/transfer/results: a line of adapter_kinds.csv for every run, as soon as it is done (a run that is
there is not made again), and adapter_kinds.png. Run as `python -m examples.transfer.adapter_kinds` or with
the names of some kinds.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import peftkern
from peftkern.adapters.prefix import outside_attention
from peftkern.finetune import FinetuneConfig
from peftkern.finetune.adapters import add_adapter
from peftkern.finetune.errors import InputError
from peftkern.finetune.model import compute_dtype, load_base, load_tokenizer, resolve_model

from .samples import kjv, pydoc_prose

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

RESULTS = Path(__file__).parent / "results"
TABLE, PLOT = RESULTS / "adapter_kinds.csv", RESULTS / "adapter_kinds.png"
# --adapter and --r of each kind: 2.4 million parameters.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": "lora", "r": 8},
    "Houlsby": {"adapter": "double_seq_bn[size=35]"},
    "Pfeiffer": {"adapter": "seq_bn[size=70]"},
    "parallel": {"adapter": "par_bn[size=70]"},
    "prefix, from text": {"adapter": "prefix[tokens=212]"},
    "prefix, random": {"adapter": "prefix[tokens=212,init=random]"},
}
RATES = {name: (1e-3, 3e-3) for name in KINDS}
SEEDS, STEPS, BATCH, LENGTH, HELD_OUT, POOL = (0, 1, 2), 20, 1, 128, 1024, 200
FIELDS = ("kind", "lr", "seed", "parameters", "kjv_nats", "pydoc_nats", "seconds_a_step")


@functools.cache
def windows(name: str, count: int) -> Tensor:
    """[count, LENGTH] token ids of the texts of that name one after the other, each ended by the
    end-of-sequence token."""
    texts = {"train": kjv(held_out=False), "kjv": kjv(held_out=True), "pydoc": pydoc_prose(held_out=True)}[
        name
    ]
    if name == "train":
        texts = random.Random(0).sample(texts, len(texts))  # chapters of all books
    tokenizer, ids = load_tokenizer(resolve_model("sample")), []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    raise InputError(f"the text {name!r} has {len(ids)} tokens, fewer than {count * LENGTH}: ask for fewer")


@contextlib.contextmanager
def precision(config: FinetuneConfig) -> Iterator[None]:
    """Autocast to the dtype that the machine computes in."""
    dtype = compute_dtype(config.dtype)
    with torch.autocast(
        "cuda" if torch.cuda.is_available() else "cpu", dtype=dtype, enabled=dtype is not torch.float32
    ):
        yield


def held_out(model: nn.Module, config: FinetuneConfig) -> list[float]:
    """The loss on the held-out books and on the held-out topics of Python's reference, rounded for the
    table."""
    return [round(nats(model, windows(name, HELD_OUT // LENGTH), config), 4) for name in ("kjv", "pydoc")]


@torch.no_grad()
def nats(model: nn.Module, rows: Tensor, config: FinetuneConfig) -> float:
    """Mean negative log-likelihood of a token."""
    model.eval()
    with precision(config):
        losses = [
            model(input_ids=row[None].to(model.device), labels=row[None].to(model.device)).loss.item()
            for row in rows
        ]
    return statistics.fmean(losses)


def train(model: nn.Module, rows: Tensor, config: FinetuneConfig, rate: float, seed: int) -> float:
    """STEPS steps of AdamW, the rate rising over 5 and falling to 0; returns the median seconds of a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * (1 - step / STEPS)
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    seconds = []
    model.train()
    for step in tqdm(range(STEPS), desc=f"lr {rate:g}, seed {seed}", leave=False):
        start = time.perf_counter()
        batch = rows[order[step * BATCH : (step + 1) * BATCH]].to(model.device)
        with precision(config):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@functools.cache
def base_model() -> PreTrainedModel:
    """SmolLM2 in 4 bit, loaded once: every adapter is taken off it again."""
    return load_base(resolve_model("sample"), FinetuneConfig().resolved())


def run(kind: str, rate: float, seed: int) -> dict[str, Any]:
    """One line of the table."""
    config = FinetuneConfig(**KINDS[kind], seed=seed).resolved()
    model = add_adapter(base_model(), config)
    peftkern.patch(model, fused_loss=True)
    seconds = train(model, windows("train", POOL), config, rate, seed)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    values = (kind, rate, seed, count, *held_out(model, config), round(seconds, 3))
    take_off(model)
    return dict(zip(FIELDS, values, strict=True))


def take_off(model: PeftModel) -> None:
    """Leave the base as it was."""
    peftkern.unpatch(model)
    if model.active_peft_config.is_prompt_learning:
        outside_attention(model)
    else:
        model.unload()


def base() -> dict[str, Any]:
    """The line of the base without an adapter."""
    model = base_model()
    peftkern.patch(model, fused_loss=True)
    values = held_out(model, FinetuneConfig().resolved())
    peftkern.unpatch(model)
    return dict(zip(FIELDS, ("base", 0, 0, 0, *values, 0), strict=True))


def table() -> list[dict[str, Any]]:
    """The runs that are done."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key == "kind" else float(value) for key, value in row.items()} for row in rows]


def add(row: dict[str, Any]) -> None:
    """Append a run to the table."""
    RESULTS.mkdir(exist_ok=True)
    new = not TABLE.exists()
    with TABLE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def best_rate(kind: str) -> float:
    """Of the rates tried with seed 0, the one with the lowest loss on the held-out books."""
    tried = [row for row in table() if row["kind"] == kind and row["seed"] == 0]
    return min(tried, key=lambda row: row["kjv_nats"])["lr"]


def measure(kinds: list[str]) -> None:
    """Every run of these kinds that is not yet in the table."""
    done = {(row["kind"], row["lr"], row["seed"]) for row in table()}
    if not any(kind == "base" for kind, *_ in done):
        add(base())
    for kind in kinds:
        for rate in RATES[kind]:
            if (kind, rate, 0) not in done:
                add(run(kind, rate, 0))
        for seed in SEEDS[1:]:
            if (kind, best_rate(kind), seed) not in done:
                add(run(kind, best_rate(kind), seed))


def summary() -> list[tuple[str, float, float, float, float]]:
    """Kind, mean and standard error of the held-out loss at the best rate over the seeds, and of the loss
    on the reference prose."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in table()):
        if kind != "base":
            rows = [row for row in table() if row["kind"] == kind and row["lr"] == best_rate(kind)]
            if len(rows) < len(SEEDS):
                continue  # not complete yet
            pairs = [[row[key] for row in rows] for key in ("kjv_nats", "pydoc_nats")]
            found.append(
                (kind, *(value for values in pairs for value in (statistics.fmean(values), _error(values))))
            )
    return found


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def verdict() -> str:
    """Which kind learns most, and which are within two standard errors of the difference to it."""
    best, *others = sorted(summary(), key=lambda row: row[1])
    near = [
        row[0].replace(",", "")
        for row in others
        if row[1] - best[1] <= 2 * (best[2] ** 2 + row[2] ** 2) ** 0.5
    ]
    behind = [name for row in others if (name := row[0].replace(",", "")) not in near]
    first = (
        f"{', '.join([best[0], *near[:-1]])} and {near[-1]} cannot be told apart"
        if near
        else f"{best[0]} learns most"
    )
    return f"At equal parameters {first}" + (
        f"; {', '.join(behind)} learn{'s' * (len(behind) == 1)} less" if behind else ""
    )


def plot() -> None:
    """Loss on the held-out books by kind, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = sorted(summary(), key=lambda row: row[1])
    before = next(row for row in table() if row["kind"] == "base")["kjv_nats"]
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    gains, most = [before - row[1] for row in kinds], max(before - row[1] for row in kinds)
    names = [row[0].replace(", ", ",\n") for row in kinds]
    axes.bar(names, gains, yerr=[row[2] for row in kinds], capsize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    # A kind that is far worse than the base would hide the others: its bar is cut and says how long it is.
    floor = max(-most, min(0.0, *gains))
    axes.set_ylim(1.1 * floor, 1.15 * most)
    for place, gain in enumerate(gains):
        if gain < floor:
            axes.annotate(f"{gain:.1f}", (place, floor), ha="center", va="bottom", color="white")
    axes.set_ylabel("nats a token below the base's\n(held-out books, more is better)")
    axes.set_title(verdict().replace("; ", ";\n"), fontsize=11)
    axes.set_xlabel(
        f"SmolLM2-135M in 4 bit, 2.4 M parameters, {STEPS} steps of {BATCH * LENGTH} tokens, better of 2"
        " rates, 3 seeds",
        fontsize=8,
    )
    figure.savefig(PLOT, dpi=150)


def main(names: list[str]) -> int:
    """Measure the kinds named, or all, and draw what is in the table."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        print(
            f"adapter_kinds: there is no kind {unknown[0]!r}: choose of {', '.join(KINDS)}", file=sys.stderr
        )
        return 2
    try:
        measure(names or list(KINDS))
    except InputError as error:
        print(f"adapter_kinds: error: {error}", file=sys.stderr)
        return 2
    for kind, kjv_mean, kjv_error, pydoc_mean, pydoc_error in summary():
        print(
            f"{kind:18} KJV {kjv_mean:.3f} +- {kjv_error:.3f}   reference prose {pydoc_mean:.3f} +-"
            f" {pydoc_error:.3f}"
        )
    plot()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
