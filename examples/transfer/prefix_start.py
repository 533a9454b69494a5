"""How a prefix begins decides what it learns: random, zero, a text's keys and values, or a gate of zero,
beside LoRA of as many weights.

SmolLM2 learns the King James Bible for a few steps from each start, inside attention, and is measured on
held-out books and, for what it forgets, on held-out prose of Python's reference. LoRA of rank 2 on all linear
layers has as many weights as a prefix of 53 tokens. The rate of each start is the best of a sweep on a seed
that is not reported. Writes prefix_start.csv, prefix_start_rates.csv and prefix_start.png into results/; rows
that a file has already are not made again, so that it can be run in parts.

    python -m examples.transfer.prefix_start
    python -m examples.transfer.prefix_start --time
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.transfer import samples

RESULTS = Path(__file__).parent / "results"
TABLE, RATES = RESULTS / "prefix_start.csv", RESULTS / "prefix_start_rates.csv"
LENGTH, BATCH, TOKENS, RANK = 128, 2, 53, 2
SWEEP = {
    "random": (1e-2, 5e-2),
    "zero": (1e-2, 3e-2),
    "text": (1e-2, 3e-2),
    "gate": (1e-2, 3e-2),
    "LoRA": (1e-3, 4e-3),
}
SWEEP_SEED, SWEEP_STEPS = 100, 10
CHAPTERS = 150  # of the training books: more than is trained on
COLUMNS = ("arm", "seed", "rate", "weights", "step", "target_nats", "source_nats", "seconds_a_step")


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep the rates, train every start with every seed, draw; or time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(SWEEP), choices=list(SWEEP))
    parser.add_argument("--steps", type=int, default=20, help="of 256 tokens")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so many")
    parser.add_argument("--time", action="store_true", help="only: seconds a step of LoRA, of PEFT's prefix and of ours")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    texts, start = Texts(), time.monotonic()
    if args.time:
        times(texts)
        return
    runs = [(RATES, arm, SWEEP_SEED, rate, SWEEP_STEPS) for i in range(2) for arm in args.arms for rate in SWEEP[arm][i : i + 1]]
    runs += [(TABLE, arm, seed, None, args.steps) for seed in args.seeds for arm in args.arms]
    for table, arm, seed, rate, steps in runs:
        if time.monotonic() - start < args.seconds:
            once(table, texts, arm, seed, best_rate(arm) if rate is None else rate, steps)
    if TABLE.exists():
        draw(read(TABLE))


class Texts:
    """Token ids [windows, 256]: the training books, and what is measured on."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.base = samples.smollm2(torch.bfloat16)[0].requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(samples.smollm2_folder())
        self.train = self._windows(samples.kjv(held_out=False)[:CHAPTERS])
        target, source = (self._windows(load(held_out=True)) for load in (samples.kjv, samples.pydoc_prose))
        self.target, self.source = (each[:: len(each) // 8][:8] for each in (target, source))

    def _windows(self, texts: Sequence[str]) -> Tensor:
        ids = [token for text in texts for token in [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]]
        count = len(ids) // LENGTH
        return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def adapted(arm: str, seed: int, texts: Texts) -> nn.Module:
    """SmolLM2 in bf16 with a fresh adapter in fp32, patched."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    import peftkern
    from peftkern.adapters.prefix import prefix_model

    base = copy.deepcopy(texts.base)
    torch.manual_seed(seed)
    if arm == "LoRA":
        model = get_peft_model(
            base,
            LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    else:
        config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
        model = prefix_model(base, config, init=arm, text=texts.train[first_window(seed, texts)])
    peftkern.patch(model, dense=True, fused_loss=True)
    return model


def first_window(seed: int, texts: Texts) -> int:
    """Of the training windows the one whose text a prefix begins with; no start is trained on it."""
    return seed * 37 % len(texts.train)


def once(table: Path, texts: Texts, arm: str, seed: int, rate: float, steps: int) -> None:
    """Train and measure one arm, unless the table has it, and add its rows to the table."""
    if any((row["arm"], row["seed"], row["rate"]) == (arm, seed, rate) for row in read(table)):
        return
    model = adapted(arm, seed, texts)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count, rows = sum(parameter.numel() for parameter in weights), []
    for step, seconds in training(model, weights, texts, seed, rate, steps):
        target, source = (measured(model, windows) for windows in (texts.target, texts.source))
        rows.append(dict(zip(COLUMNS, (arm, seed, rate, count, step, target, source, seconds), strict=True)))
        print(
            f"{arm} seed {seed} rate {rate:g} step {step}: target {target:.4f} source {source:.4f}, {seconds:.2f} s a step",
            flush=True,
        )
    write(table, read(table) + rows)


def training(
    model: nn.Module,
    weights: list[nn.Parameter],
    texts: Texts,
    seed: int,
    rate: float,
    steps: int,
) -> Iterator[tuple[int, float]]:
    """Yields (step, seconds a step so far) before the first step (in no sweep) and after some of them; AdamW, a warm-up of
    3 steps, then a cosine.
    """
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    rows = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    rows = rows[rows != first_window(seed, texts)]
    spent = 0.0
    if steps > SWEEP_STEPS:
        yield 0, 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 3) * (1 + math.cos(math.pi * step / steps)) / 2
        start = time.perf_counter()
        model.train()
        batch = texts.train[rows[step * BATCH : (step + 1) * BATCH]]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - start
        if step + 1 in (10, steps):
            yield step + 1, spent / (step + 1)


@torch.no_grad()
def measured(model: nn.Module, windows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    return statistics.fmean(model(input_ids=each, labels=each, use_cache=False).loss.item() for each in windows.split(4))


def best_rate(arm: str) -> float:
    """Of the sweep, by the loss on the target after its last step."""
    rows = [row for row in read(RATES) if row["arm"] == arm and row["step"] == SWEEP_STEPS]
    if not rows:
        raise SystemExit(f"{RATES} has no rates for {arm}: run it again without --seconds")
    return min(rows, key=lambda row: row["target_nats"])["rate"]


def times(texts: Texts, steps: int = 6) -> None:
    """Median seconds of a step, forward and backward, of each kind of adapter on the same batches."""
    from peft import PrefixTuningConfig, get_peft_model

    def peft_prefix() -> nn.Module:
        config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(texts.base), config)

    def ours(unpatched: bool = True) -> nn.Module:
        import peftkern

        model = adapted("random", 0, texts)
        if unpatched:
            peftkern.unpatch(model)
        return model

    makers = {
        "PEFT's prefix": peft_prefix,
        "prefix inside attention": ours,
        "prefix inside attention, patched": lambda: ours(False),
        "LoRA, patched": lambda: adapted("LoRA", 0, texts),
    }
    models = {name: make().train() for name, make in makers.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps):
        batch = texts.train[step * BATCH : (step + 1) * BATCH]
        for name, model in models.items():  # in turn, so that a busy machine slows all of them
            start = time.perf_counter()
            model(
                input_ids=batch,
                labels=batch,
                **({} if name.startswith("PEFT") else {"use_cache": False}),
            ).loss.backward()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        print(f"{name}: {statistics.median(seconds[1:]):.3f} s a step")


def read(table: Path) -> list[dict[str, Any]]:
    """The rows of a table, empty where there is none."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        kinds = dict(arm=str, seed=int, weights=int, step=int)
        return [{name: kinds.get(name, float)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    """The whole table, in order."""
    RESULTS.mkdir(exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        rows = sorted(
            rows,
            key=lambda row: (list(SWEEP).index(row["arm"]), row["rate"], row["seed"], row["step"]),
        )
        writer.writerows({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Target loss over the steps, and at the end what was learned against what was forgotten."""
    import matplotlib

    with contextlib.suppress(ImportError):
        matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    last = max(row["step"] for row in rows)
    for arm in SWEEP:
        found = [row for row in rows if row["arm"] == arm]
        if not found:
            continue
        steps = sorted({row["step"] for row in found})
        target, errors = zip(*(mean_and_error(found, step, "target_nats") for step in steps), strict=True)
        line = curves.errorbar(steps, target, yerr=errors, marker="o", markersize=3, capsize=2, label=arm)
        before, after = (mean_and_error(found, step, "source_nats") for step in (0, last))
        end = mean_and_error(found, last, "target_nats")
        base = mean_and_error([row for row in rows if row["arm"] == "LoRA"] or found, 0, "source_nats")[0]
        ends.errorbar(
            after[0] - base,
            end[0],
            xerr=after[1],
            yerr=end[1],
            marker="o",
            capsize=2,
            color=line.lines[0].get_color(),
        )
        ends.annotate(arm, (after[0] - base, end[0]), textcoords="offset points", xytext=(6, 4))
    curves.set(
        xlabel=f"steps of {LENGTH * BATCH} tokens",
        ylabel="held-out King James, nats a token",
        ylim=(None, 3.6),
    )
    curves.legend()
    ends.set(
        xlabel="forgotten: Python's reference, nats a token above the base",
        ylabel="held-out King James, nats a token",
    )
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"{title(rows, last)}\nSmolLM2-135M, {TOKENS} virtual tokens, LoRA r = {RANK}; {seeds} seeds, bars: standard errors; 2 cores"
    )
    figure.savefig(RESULTS / "prefix_start.png", dpi=110)
    pyplot.close(figure)
    for arm in SWEEP:
        found = [row for row in rows if row["arm"] == arm]
        if found:
            ends_of = [mean_and_error(found, last, name) for name in ("target_nats", "source_nats")]
            print(f"{arm}: target {ends_of[0][0]:.3f} ± {ends_of[0][1]:.3f}, source {ends_of[1][0]:.3f} ± {ends_of[1][1]:.3f}")


def title(rows: list[dict[str, Any]], last: int) -> str:
    """The answer: the starts in the order of what they learned."""
    means = {arm: [row["target_nats"] for row in rows if row["arm"] == arm and row["step"] == last] for arm in SWEEP}
    order = sorted((arm for arm in means if means[arm]), key=lambda arm: statistics.fmean(means[arm]))
    return f"Best after {last} steps: " + ", then ".join(order)


def mean_and_error(rows: list[dict[str, Any]], step: int, name: str) -> tuple[float, float]:
    """Over the seeds; the standard error of one seed is 0."""
    values = [row[name] for row in rows if row["step"] == step]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


if __name__ == "__main__":
    main()
