"""How a prefix begins decides what it learns: random, zero, a text's keys and values, or a gate of zero,
beside LoRA of as many weights.

A model learns the King James Bible for a few steps from each start, inside attention, and is measured on
held-out books and, for what it forgets, on held-out prose of Python's reference. LoRA on all linear layers
has as many weights as the prefix. The rate of each start is the best of a sweep on a seed that is not
reported. `--base bytes` does it with a Llama of 94,000 weights that is first trained on Python's reference,
byte by byte. Writes prefix_start-BASE.csv, -rates.csv and .png into results/; rows that a file has already
are not made again, so that it can be run in parts.

    python -m examples.transfer.prefix_start
    python -m examples.transfer.prefix_start --base bytes
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from examples.transfer import samples
from peftkern.files import cache_dir

RESULTS = Path(__file__).parent / "results"
ARMS = ("random", "zero", "text", "gate", "LoRA")
SWEEP_SEED = 100


@dataclass(frozen=True)
class Setting:
    """Windows of `length` tokens, `batch` a step; a prefix of `tokens`, LoRA of `rank`; `measured`: windows
    of each text; `at`: the steps after which they are measured, the last one last; `rates`: what the sweep
    tries.
    """

    name: str
    length: int
    batch: int
    tokens: int
    rank: int
    measured: int
    at: tuple[int, ...]
    sweep: int
    rates: dict[str, tuple[float, ...]]

    def table(self, what: str = "") -> Path:
        """The CSV of the runs, or of the sweep."""
        return RESULTS / f"prefix_start-{self.name}{what}.csv"


FAST, SLOW = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)
PREFIX_RATES = {"random": (1e-2, 3e-2, 1e-1), "zero": FAST, "text": FAST, "gate": FAST, "LoRA": SLOW}
BYTE_RATES = {arm: (1e-2, 3e-2, 1e-1) if arm != "LoRA" else FAST for arm in ARMS}
SETTINGS = {
    "smollm2": Setting("smollm2", 128, 2, 53, 2, 12, (5, 10, 20, 30), 15, PREFIX_RATES),
    "bytes": Setting("bytes", 24, 16, 37, 4, 192, (25, 50, 100), 50, BYTE_RATES),
}
COLUMNS = ("arm", "seed", "rate", "weights", "step", "target_nats", "source_nats", "seconds_a_step")


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweep the rates, train every start with every seed, draw; or time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", choices=SETTINGS, default="smollm2", help="bytes: a small model of bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so many")
    parser.add_argument("--time", action="store_true", help="only: seconds a step of each kind, on SmolLM2")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    start, setting = time.monotonic(), SETTINGS[args.base]
    texts = Texts(setting)
    if args.time:
        times(texts)
        return
    sweep = [(arm, rate) for i in range(3) for arm in ARMS for rate in setting.rates[arm][i : i + 1]]
    runs = [(setting.table("-rates"), arm, SWEEP_SEED, rate, (setting.sweep,)) for arm, rate in sweep]
    runs += [(setting.table(), arm, seed, None, (0, *setting.at)) for seed in args.seeds for arm in ARMS]
    for table, arm, seed, rate, at in runs:
        if time.monotonic() - start < args.seconds:
            once(table, texts, arm, seed, best_rate(setting, arm) if rate is None else rate, at)
    if setting.table().exists():
        draw(setting, read(setting.table()))


class Texts:
    """The base, and token ids [windows, length] of the training books and of what is measured on."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        if setting.name == "bytes":
            self.tokens = lambda text: [min(ord(character), 127) for character in text + "\n"]
            self.base = byte_model(self._windows(samples.pydoc_prose(held_out=False), 64))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(samples.smollm2_folder())
            self.tokens = lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            self.base = samples.smollm2(torch.bfloat16)[0].requires_grad_(False)
        self.train = self._windows(samples.kjv(held_out=False)[:150])
        target, source = (self._windows(load(held_out=True)) for load in (samples.kjv, samples.pydoc_prose))
        count = setting.measured
        self.target, self.source = (each[:: len(each) // count][:count] for each in (target, source))

    def first_text(self, seed: int) -> Tensor:
        """What a prefix begins with: tokens of the training books before those that are trained on."""
        return self.train[2 * seed : 2 * seed + 2].flatten()

    def _windows(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        ids, length = [token for text in texts for token in self.tokens(text)], length or self.setting.length
        return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def byte_model(windows: Tensor, steps: int = 900) -> nn.Module:
    """A Llama of 94,000 weights that has learned the windows [n, 64]; kept in the cache folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, max_position_embeddings=64, tie_word_embeddings=True, **sizes),
    )
    path = cache_dir() / "prefix-byte-model.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in trange(steps, desc="byte model"):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        rows = torch.randint(len(windows), (16,), generator=torch.Generator().manual_seed(step))
        model(input_ids=windows[rows], labels=windows[rows], use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.requires_grad_(False)


def adapted(arm: str, seed: int, texts: Texts) -> nn.Module:
    """The base with a fresh adapter in fp32, patched."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    import peftkern
    from peftkern.adapters.prefix import prefix_model

    base, setting = copy.deepcopy(texts.base), texts.setting
    torch.manual_seed(seed)
    if arm == "LoRA":
        model = get_peft_model(
            base,
            LoraConfig(
                r=setting.rank,
                lora_alpha=2 * setting.rank,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    else:
        config = PrefixTuningConfig(num_virtual_tokens=setting.tokens, task_type="CAUSAL_LM")
        model = prefix_model(base, config, init=arm, text=texts.first_text(seed))
    peftkern.patch(model, dense=True, fused_loss=True)
    return model


def once(table: Path, texts: Texts, arm: str, seed: int, rate: float, at: tuple[int, ...]) -> None:
    """Train and measure one arm, unless the table has it, and add its rows to the table."""
    if any((row["arm"], row["seed"], row["rate"]) == (arm, seed, rate) for row in read(table)):
        return
    model = adapted(arm, seed, texts)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count, rows = sum(parameter.numel() for parameter in weights), []
    for step, seconds in training(model, weights, texts, seed, rate, at):
        target, source = (measured(model, windows) for windows in (texts.target, texts.source))
        rows.append(dict(zip(COLUMNS, (arm, seed, rate, count, step, target, source, seconds), strict=True)))
        print(
            f"{arm} seed {seed} rate {rate:g} step {step}: target {target:.4f} source {source:.4f},"
            f" {seconds:.2f} s a step",
            flush=True,
        )
    write(table, read(table) + rows)


def training(
    model: nn.Module,
    weights: list[nn.Parameter],
    texts: Texts,
    seed: int,
    rate: float,
    at: tuple[int, ...],
) -> Iterator[tuple[int, float]]:
    """Yields (step, seconds a step so far) after each of the steps `at`; AdamW, a warm-up, then a cosine."""
    optimizer, steps = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), at[-1]
    rows = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed))
    rows, batch, spent = rows[rows // 2 != seed], texts.setting.batch, 0.0
    for step in range(steps + 1):
        if step in at:
            yield step, spent / max(1, step)
        warm = min(1.0, (step + 1) / (0.1 * steps))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        start = time.perf_counter()
        model.train()
        ids = texts.train[rows[step * batch : (step + 1) * batch]]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - start


@torch.no_grad()
def measured(model: nn.Module, windows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    return statistics.fmean(
        model(input_ids=each, labels=each, use_cache=False).loss.item() for each in windows.split(8)
    )


def best_rate(setting: Setting, arm: str) -> float:
    """Of the sweep, by the loss on the target after its last step."""
    rows = [row for row in read(setting.table("-rates")) if row["arm"] == arm]
    if not rows:
        raise SystemExit(f"{setting.table('-rates')} has no rates for {arm}: run it again without --seconds")
    return min(rows, key=lambda row: row["target_nats"])["rate"]


def times(texts: Texts, steps: int = 6) -> None:
    """Median seconds of a step, forward and backward, of each kind of adapter on the same batches."""
    from peft import PrefixTuningConfig, get_peft_model

    def peft_prefix() -> nn.Module:
        config = PrefixTuningConfig(num_virtual_tokens=texts.setting.tokens, task_type="CAUSAL_LM")
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
        batch = texts.train[2 * step : 2 * step + 2]
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
        return [
            {name: kinds.get(name, float)(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def write(table: Path, rows: list[dict[str, Any]]) -> None:
    """The whole table, in order."""
    RESULTS.mkdir(exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        rows = sorted(
            rows,
            key=lambda row: (ARMS.index(row["arm"]), row["rate"], row["seed"], row["step"]),
        )
        writer.writerows(
            {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )


def draw(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Target loss over the steps, and at the end what was learned against what was forgotten."""
    import matplotlib

    with contextlib.suppress(ImportError):
        matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    last = max(row["step"] for row in rows)
    for arm in ARMS:
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
    curves.set(
        xlabel=f"steps of {setting.length * setting.batch} tokens",
        ylabel="held-out King James, nats a token",
    )
    curves.legend()
    for axes in (curves, ends):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    ends.set(
        xlabel="forgotten: Python's reference, nats a token above the base",
        ylabel="held-out King James, nats a token",
    )
    seeds = len({row["seed"] for row in rows})
    what = f"{setting.name}, {setting.tokens} virtual tokens, LoRA r = {setting.rank}; {seeds} seeds"
    figure.suptitle(f"{title(rows, last)}\n{what}, bars: standard errors")
    figure.savefig(setting.table().with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    for arm in ARMS:
        found = [row for row in rows if row["arm"] == arm]
        if found:
            ends_of = [mean_and_error(found, last, name) for name in ("target_nats", "source_nats")]
            print(
                f"{arm}: target {ends_of[0][0]:.3f} ± {ends_of[0][1]:.3f}, source {ends_of[1][0]:.3f} ±"
                f" {ends_of[1][1]:.3f}"
            )


def title(rows: list[dict[str, Any]], last: int) -> str:
    """The answer: the starts in the order of what they learned."""
    means = {
        arm: [row["target_nats"] for row in rows if row["arm"] == arm and row["step"] == last] for arm in ARMS
    }
    order = sorted((arm for arm in means if means[arm]), key=lambda arm: statistics.fmean(means[arm]))
    return f"Best after {last} steps: " + ", then ".join(order)


def mean_and_error(rows: list[dict[str, Any]], step: int, name: str) -> tuple[float, float]:
    """Over the seeds; the standard error of one seed is 0."""
    values = [row[name] for row in rows if row["step"] == step]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


if __name__ == "__main__":
    main()
