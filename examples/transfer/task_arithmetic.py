"""Task arithmetic on SmolLM2-135M: a KJV and a code adapter added and swept over lambda, and the KJV adapter
negated.

Each of three seeds trains both adapters (LoRA r = 8, 30 steps of 512 tokens), adds them exactly, and
evaluates eleven lambdas in batched passes on held-out KJV, held-out code and Python's reference prose, which
nothing was trained on. Writes CSV and PNG into examples/transfer/results. A trained adapter is kept in the
cache: `--seeds 0` (1, 2) does one seed at a time, `--plot` draws what is there. Run as `python -m
examples.transfer.task_arithmetic`; about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern.adapters.arithmetic import add_to_model, combine, read_adapter
from peftkern.adapters.arithmetic.sweep import Sweep, losses_by_adapter, scaled_adapters
from peftkern.files import cache_dir

from .samples import code_pairs, kjv, pydoc_prose, smollm2

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH, RATE = 30, 2, 256, 2e-3
WINDOWS = 3  # of a set to evaluate, 256 tokens each
ADDED = tuple(i / 5 for i in range(11))
NEGATED = tuple(0.0 - i / 5 for i in range(11))
SETS = ("kjv", "code", "prose")
BUDGET = 0.05  # of the control loss, for negation


def texts(name: str, *, held_out: bool) -> list[str]:
    """The documents of a set."""
    if name == "code":
        return [pair.source for pair in code_pairs(held_out=held_out)]
    return (kjv if name == "kjv" else pydoc_prose)(held_out=held_out)


def windows(tokenizer: Any, documents: list[str], count: int, length: int, seed: int) -> Tensor:
    """`count` windows [count, length] from the shuffled documents, one after the other."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        ids += tokenizer(documents[index])["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"documents: {len(ids)} tokens, {count * length} are needed")


def model_with(adapter: Path | None = None) -> tuple[Any, Any]:
    """SmolLM2 in bf16, patched, with a new LoRA adapter or a saved one."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base, tokenizer = smollm2(torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config) if adapter is None else PeftModel.from_pretrained(base, adapter)
    peftkern.patch(model)
    return model, tokenizer


def train(name: str, seed: int) -> Path:
    """The folder of an adapter trained on a set, made where the cache has none."""
    folder = cache_dir() / "examples" / "task_arithmetic" / f"{name}-{seed}-{STEPS}x{BATCH}x{LENGTH}"
    if (folder / "adapter_config.json").is_file():
        return folder
    torch.manual_seed(seed)
    model, tokenizer = model_with()
    data = windows(tokenizer, texts(name, held_out=False), STEPS * BATCH, LENGTH, seed).view(
        STEPS,
        BATCH,
        LENGTH,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 6) * (1 - step / STEPS),
    )
    model.train()
    for step, ids in enumerate(data):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"{name}, seed {seed}, step {step}: {loss.item():.3f} nats", flush=True)
    model.save_pretrained(folder)
    return folder


def measure(seed: int) -> Iterator[dict[str, Any]]:
    """The losses of both sweeps for one seed's adapters, a row a lambda and set."""
    adapters = {name: read_adapter(train(name, seed), name) for name in ("kjv", "code")}
    model, tokenizer = model_with(train("kjv", seed))
    add_to_model(model, combine("kjv + code", adapters).adapter, "sum")
    held_out = {name: windows(tokenizer, texts(name, held_out=True), WINDOWS, LENGTH, 0) for name in SETS}
    for what, adapter, values in (("kjv + code", "sum", ADDED), ("-kjv", "default", NEGATED)):
        with scaled_adapters(model, adapter, values) as names:
            losses = {name: losses_by_adapter(model, names, ids) for name, ids in held_out.items()}
        control = "prose" if what == "-kjv" else None
        print(
            seed,
            what,
            Sweep(values, losses, "kjv", control, BUDGET, maximize=what == "-kjv").verdict,
            flush=True,
        )
        for name, found in losses.items():
            for value, row in zip(values, found, strict=True):
                yield {
                    "seed": seed,
                    "what": what,
                    "lambda": f"{value:g}",
                    "set": name,
                    "nats": f"{row.mean().item():.5f}",
                }
    yield from timing(model, "sum", held_out["kjv"][:1, :128], seed)


def timing(model: Any, adapter: str, ids: Tensor, seed: int) -> Iterator[dict[str, Any]]:
    """Seconds of eleven lambdas on one window: as one batched pass, and one after the other."""
    with scaled_adapters(model, adapter, ADDED) as names:
        losses_by_adapter(model, names[:1], ids)  # what is made at the first call
        for what, run in (
            ("seconds, one batched pass", lambda: losses_by_adapter(model, names, ids)),
            ("seconds, one by one", lambda: [losses_by_adapter(model, [name], ids) for name in names]),
        ):
            run()
            spent = []
            for _ in range(3):
                start = time.perf_counter()
                run()
                spent.append(time.perf_counter() - start)
            yield {
                "seed": seed,
                "what": what,
                "lambda": "",
                "set": "",
                "nats": f"{statistics.median(spent):.3f}",
            }


def curve(rows: list[dict[str, str]], what: str, name: str) -> list[tuple[float, float, float]]:
    """(lambda, mean over the seeds, standard error) of a set's loss."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["what"] == what and row["set"] == name:
            found.setdefault(float(row["lambda"]), []).append(float(row["nats"]))
    errors = {
        x: statistics.stdev(y) / math.sqrt(len(y)) if len(y) > 1 else math.nan for x, y in found.items()
    }
    return [
        (x, statistics.mean(y), errors[x]) for x, y in sorted(found.items(), key=lambda item: abs(item[0]))
    ]


def draw(rows: list[dict[str, str]]) -> None:
    """Both sweeps side by side, and their tables on stdout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    seeds = len({row["seed"] for row in rows})
    best = min(curve(rows, "kjv + code", "kjv"), key=lambda point: point[1])[0]
    titles = {
        "kjv + code": f"KJV + code is best at {best:g} times the sum",
        "-kjv": "Negating KJV costs KJV most, the other texts less",
    }
    for axes, (what, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name in SETS:
            x, mean, error = zip(*curve(rows, what, name), strict=True)
            axes.errorbar(x, mean, yerr=error, marker="o", capsize=3, label=name)
            print(
                what,
                name,
                " ".join(f"{a:g}: {b:.3f} ± {c:.3f}" for a, b, c in zip(x, mean, error, strict=True)),
            )
        axes.set(xlabel="lambda", ylabel="held-out loss, nats a token", title=title)
        axes.legend()
    figure.suptitle(f"SmolLM2-135M, LoRA r = 8, {STEPS} steps; mean and s.e. of {seeds} seeds")
    FigureCanvasAgg(figure).print_png(RESULTS / "task_arithmetic.png")


def main() -> None:
    """Measure the seeds that are asked for, keep the others' rows, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "task_arithmetic.csv"
    for seed in () if args.plot else args.seeds:
        new = list(measure(seed))
        old = list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []
        rows = sorted(
            [row for row in old if row["seed"] != str(seed)] + new,
            key=lambda row: int(row["seed"]),
        )
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["seed", "what", "lambda", "set", "nats"])
            writer.writeheader()
            writer.writerows(rows)
    draw(list(csv.DictReader(path.open(encoding="utf-8"))))


if __name__ == "__main__":
    main()
