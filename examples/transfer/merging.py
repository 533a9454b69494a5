"""Merging an adapter into its 4-bit base: what each form keeps of it, on SmolLM2 and the King James Bible.

A LoRA adapter of rank 8 is trained for a few steps on NF4 weights, for each seed. Every form of merge is then
measured on held-out books: rounding error, survival of the change, KL from the adapter, perplexity. The
feedback's calibration text comes from the training books. Writes merging.csv, merging.png and
merging-layers.png into results/.

    python -m examples.transfer.merging --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.transfer import samples

RESULTS = Path(__file__).parent / "results"
LENGTH = 256
FORMS = (
    "requantize",
    "stochastic",
    "feedback",
    "residual",
    "dense",
    ("requantize", "original"),
    ("dense", "original"),
)
COLUMNS = ("seed", "form", "MB", "delta_ratio", "error_ratio", "survival", "cosine", "mismatch_ratio")
COLUMNS += ("kl", "kl_error", "base_ppl", "adapter_ppl", "merged_ppl", "lost")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, merge in every form, write the table and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30, help="of 512 tokens")
    parser.add_argument("--probe", type=int, default=8, help="sequences of 256 tokens from held-out books")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    report = None
    for seed in args.seeds:
        model, tokenizer = adapted(seed)
        train, held_out = (windows(tokenizer, samples.kjv(held_out=part)) for part in (False, True))
        learn(model, train, args.steps, seed)
        probe = held_out[:: max(1, len(held_out) // args.probe)][: args.probe]
        found, first = measured(model, probe, train[:: len(train) // 16][:16], seed)
        report = report or first
        rows = store([*rows, *found])
        if seed == args.seeds[0]:
            print(f"Bytes that PEFT's own merge and unmerge change: {lost_bytes(model):.1%}")
    tell(rows)
    draw(rows, report if 0 in args.seeds else None)


def adapted(seed: int) -> tuple[Any, Any]:
    """SmolLM2 in NF4 with a fresh LoRA adapter, patched, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    import peftkern

    folder = samples.smollm2_folder()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = dict(dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=four_bit)
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    print(peftkern.patch(model, fused_loss=True).summary)
    return model, AutoTokenizer.from_pretrained(folder)


def windows(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids [windows, 256] of the texts one after the other."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def learn(model: Any, rows: Tensor, steps: int, seed: int) -> None:
    """AdamW at a learning rate that falls to zero, on two windows a step, drawn by the seed."""
    from tqdm import trange

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    model.train()
    bar = trange(steps, desc=f"training, seed {seed}")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 5) * (1 - step / steps)
        ids = rows[order[2 * step : 2 * step + 2]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def measured(model: Any, probe: Tensor, calibration: Tensor, seed: int) -> tuple[list[dict[str, Any]], Any]:
    """A row for each form, and the first report."""
    from peftkern.adapters.merge import compare_merges

    common = dict(original=samples.smollm2_folder(), calibration=calibration, seed=seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        all_forms = compare_merges(model, probe, forms=FORMS, rank=8, **common)
        small = compare_merges(model, probe, forms=["residual"], rank=2, **common)
    print(all_forms)
    reports = [(report, " r=8" if report.form == "residual" else "") for report in all_forms.reports]
    reports.insert(3, (small.reports[0], " r=2"))
    return [row(report, more, seed) for report, more in reports], all_forms.reports[0]


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
    """Write the table, with the rows of other seeds that it had; returns all of them."""
    path = RESULTS / "merging.csv"
    path.parent.mkdir(exist_ok=True)
    seeds = {one["seed"] for one in rows}
    others = [one for one in read(path) if one["seed"] not in seeds]
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
    return [{"seed": int(one["seed"]), "form": one["form"]} | {key: float(one[key]) for key in COLUMNS[2:]} for one in rows]


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def draw(rows: Sequence[dict[str, Any]], report: Any) -> None:
    """How much of the gain each form loses; of seed 0, how much survives requantizing, by layer."""
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
    axes.set_xlabel(f"part of the adapter's gain in loss that is lost, % (mean and s.e. of {seeds} seeds)")
    nearest = lost[0][0]
    axes.set_title(f"Requantizing loses {nearest:.0f} % of what the adapter learnt; dense loses none")
    figure.savefig(RESULTS / "merging.png", dpi=110)
    if report is None:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    report.plot(figure.subplots())
    figure.savefig(RESULTS / "merging-layers.png", dpi=110)


if __name__ == "__main__":
    main()
