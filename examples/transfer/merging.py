"""Merging an adapter into its 4-bit base: what each form keeps of it, on SmolLM2 and the King James Bible.

For each seed `peftkern finetune` trains a LoRA adapter of rank 16 on NF4 weights, 40 steps of 512 tokens; it
is kept in the cache. Each form of merge is measured on held-out books: rounding error, survival of the
change, KL from the adapter, perplexity. The feedback's calibration text comes from the training books. Writes
merging.csv, merging.png and merging-layers.png into results/; a seed's row of a form takes the place of its
earlier one.

    python -m examples.transfer.merging --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.transfer import samples
from peftkern.files import cache_dir

RESULTS = Path(__file__).parent / "results"
LENGTH = 256
# Form, base, rank of the residual.
FORMS = (
    ("requantize", "dequantized", 0),
    ("dense", "dequantized", 0),
    ("residual", "dequantized", 2),
    ("residual", "dequantized", 8),
    ("requantize", "original", 0),
    ("dense", "original", 0),
    ("stochastic", "dequantized", 0),
    ("feedback", "dequantized", 0),
    ("feedback", "original", 0),
)
COLUMNS = ("seed", "form", "MB", "delta_ratio", "error_ratio", "survival", "cosine", "mismatch_ratio")
COLUMNS += ("kl", "kl_error", "base_ppl", "adapter_ppl", "merged_ppl", "lost")
_RUN = "--model sample --data sample --eval-data sample --r 16 --steps 40 --seq-length 256 --batch-size 2"
_RUN += " --grad-accumulation 1 --lr 1e-3 --eval-tokens 4096"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, merge in every form, write the table and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--probe", type=int, default=8, help="sequences of 256 tokens from held-out books")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for found in measured(trained(seed), seed, args.probe):
            print(found, flush=True)
            rows = store([*rows, found])
    tell(rows)
    draw(rows)


def trained(seed: int) -> Path:
    """The folder of the adapter, made where the cache has none."""
    from peftkern.__main__ import main as command

    folder = cache_dir() / "examples" / "merging" / f"kjv-{seed}"
    if not (folder / "result.json").is_file():
        status = command(["finetune", *_RUN.split(), "--seed", str(seed), "--output", str(folder)])
        if status:
            raise SystemExit(status)
    return folder


def measured(folder: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """A row for each form; of seed 0 also the plot by layer, and what PEFT's own merge loses."""
    from peftkern.adapters.merge import merge, unmerge
    from peftkern.adapters.merge_layers import base_alone
    from peftkern.adapters.merge_probe import Reference
    from peftkern.finetune.inference import loaded

    original = samples.smollm2_folder()
    with loaded(str(folder)) as it, it.autocast():
        model = it.model
        probe, calibration = (
            windows(it.tokenizer, samples.kjv(held_out=part), count) for part in (True, False)
        )
        reference = Reference(model, list(probe), lambda: base_alone(model))
        for form, base, rank in FORMS:
            options = dict(form=form, base=base, rank=rank or 1, seed=seed, calibration=calibration)
            report = merge(model, original=original, probe=reference, **options)
            unmerge(model)
            print(str(report).splitlines()[-1], flush=True)
            if (seed, form, base) == (0, "requantize", "dequantized"):
                by_layer(report)
            yield row(report, f", rank {rank}" if rank else "", seed)
        if seed == 0:
            print(f"Bytes that PEFT's own merge and unmerge change: {lost_bytes(model):.2%}")


def windows(tokenizer: Any, texts: Sequence[str], count: int) -> Tensor:
    """Token ids [count, 256] at equal distances in the texts, one after the other."""
    every = max(1, len(texts) // (4 * count))
    ids = [token for text in texts[::every] for token in tokenizer(text)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows[:: max(1, len(rows) // count)][:count]


def row(report: Any, more: str, seed: int) -> dict[str, Any]:
    """One line of the table."""
    total, probe = report.total, report.probe
    base, adapter, merged = probe.perplexities
    values = (
        seed,
        report.name + more,
        report.bytes / 1e6,
        total.delta_ratio,
        total.error_ratio,
        total.survival,
    )
    values += (
        total.cosine,
        total.mismatch_ratio,
        probe.kl,
        probe.kl_error,
        base,
        adapter,
        merged,
        probe.lost,
    )
    return dict(zip(COLUMNS, values, strict=True))


def lost_bytes(model: Any) -> float:
    """The part of the packed bytes and absmax that PEFT's own merge and unmerge leave changed."""
    import peftkern

    peftkern.unpatch(model)
    before = four_bit_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model.unmerge_adapter()
    after = four_bit_bytes(model)
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    return changed / sum(part.numel() for part in before)


def four_bit_bytes(model: Any) -> list[Tensor]:
    """Packed codes and 8-bit absmax of every 4-bit weight."""
    weights = [module.weight for module in model.modules() if type(module).__name__ == "Linear4bit"]
    return [part.clone().flatten() for weight in weights for part in (weight.data, weight.quant_state.absmax)]


def store(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the table, with the other rows that it had; returns all of them."""
    path = RESULTS / "merging.csv"
    path.parent.mkdir(exist_ok=True)
    made = {(one["seed"], one["form"]) for one in rows}
    others = [one for one in read(path) if (one["seed"], one["form"]) not in made]
    every = sorted([*others, *rows], key=lambda one: one["seed"])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for one in every:
            numbers = {key: f"{one[key]:.6g}" for key in COLUMNS[2:]}
            writer.writerow({"seed": one["seed"], "form": one["form"]} | numbers)
    return every


def tell(rows: Sequence[dict[str, Any]]) -> None:
    """Print means over seeds with standard errors."""
    for form in dict.fromkeys(one["form"] for one in rows):
        numbers = {key: mean_error([one[key] for one in rows if one["form"] == form]) for key in COLUMNS[2:]}
        told = "  ".join(f"{key} {mean:.4g} ± {error:.2g}" for key, (mean, error) in numbers.items())
        print(f"{form}: {told}")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier table."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {"seed": int(one["seed"]), "form": one["form"]} | {key: float(one[key]) for key in COLUMNS[2:]}
        for one in rows
    ]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def by_layer(report: Any) -> None:
    """How much of the change survives requantizing, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    report.plot(figure.subplots())
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "merging-layers.png", dpi=110)


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """How much of the adapter's gain each form loses."""
    from matplotlib.figure import Figure

    forms = list(dict.fromkeys(one["form"] for one in rows))
    lost = [mean_error([100 * one["lost"] for one in rows if one["form"] == form]) for form in forms]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    errors = [0 if math.isnan(error) else error for _, error in lost]
    axes.barh(forms, [mean for mean, _ in lost], xerr=errors, color="tab:blue")
    for index, (mean, _) in enumerate(lost):
        axes.annotate(f" {mean:.1f} %", (max(mean, 0), index), va="center")
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    seeds = len({one["seed"] for one in rows})
    over = f"mean and s.e. of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_xlabel(f"part of the adapter's gain that is lost, % ({over})")
    axes.margins(x=0.12)
    figure.suptitle(f"Requantizing loses {lost[0][0]:.0f} % of what the adapter learnt; dense loses none")
    figure.savefig(RESULTS / "merging.png", dpi=110)


if __name__ == "__main__":
    main()
