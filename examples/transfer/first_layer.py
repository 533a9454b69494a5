"""What a step costs that trains from layer n up: SmolLM2 with LoRA r = 8 on 2 x 256 tokens of the King James
Bible.

Processor time of a step (forward, backward), the bytes that it keeps for backward, and the loss, with and
without
gradient checkpointing, beside the arithmetic: (L + 2 (L - n)) / 3 L of the time with every activation kept,
(L + 3 (L - n)) / 4 L with recomputation, (L - n) / L of the bytes. Run as `python -m
examples.transfer.first_layer`; about three minutes on a core.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import peftkern
from peftkern.transfer.first_layer import freeze_below

from .samples import kjv, smollm2

RESULTS = Path(__file__).parent / "results"
CUTS, ROUNDS, ROWS, LENGTH = (0, 10, 20, 25, 29), 5, 2, 256


def _model() -> tuple[nn.Module, Tensor]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base, tokenizer = smollm2(torch.bfloat16)
    ids = tokenizer("\n".join(kjv(held_out=False)[:20]), return_tensors="pt")["input_ids"][0, : ROWS * LENGTH]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    peftkern.patch(model, fused_loss=True)
    return model, ids.reshape(ROWS, LENGTH)


def _step(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Seconds and loss."""
    start = time.process_time()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    seconds = time.process_time() - start
    model.zero_grad()
    return seconds, loss.item()


def _kept(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the distinct tensors that are kept for backward, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    total = sum(sizes.values())
    del loss
    return total


def _measure(model: nn.Module, ids: Tensor, checkpointed: bool) -> list[list[float]]:
    """A row a cut: n, seconds (the least of the rounds), bytes, loss."""
    rows = []
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for cut in CUTS:
        frozen = freeze_below(model, cut)
        timed = [_step(model, ids) for _ in range(ROUNDS)]
        kept = 0 if checkpointed else _kept(model, ids)
        rows.append([cut, min(seconds for seconds, _ in timed), kept, timed[0][1]])
        frozen.remove()
    return rows


def _plot(measured: dict[bool, list[list[float]]], layers: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for checkpointed, label, again in ((False, "activations kept", 0), (True, "gradient checkpointing", 1)):
        rows = measured[checkpointed]
        line = axes.plot(CUTS, [row[1] / rows[0][1] for row in rows], "o-", label=label)[0]
        expected = [(layers + (2 + again) * (layers - cut)) / ((3 + again) * layers) for cut in CUTS]
        axes.plot(CUTS, expected, "--", color=line.get_color(), alpha=0.6, label=f"{label}, by arithmetic")
    last = measured[True][-1][1] / measured[True][0][1]
    title = f"With checkpointing a step of the last layer takes {last:.0%} of one of all {layers}"
    axes.set(
        xlabel="first trained layer", ylabel="processor time of a step, n = 0: 1", title=title, ylim=(0, 1.1)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "first-layer.png", dpi=110)


def main() -> None:
    """Both ways, the table, the CSV and the plot."""
    RESULTS.mkdir(exist_ok=True)
    model, ids = _model()
    _step(model, ids)  # the first builds caches
    measured = {checkpointed: _measure(model, ids, checkpointed) for checkpointed in (False, True)}
    with (RESULTS / "first-layer.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["checkpointing", "first_layer", "seconds", "kept_bytes", "loss"])
        writer.writerows([checkpointed, *row] for checkpointed, rows in measured.items() for row in rows)
    print("| first layer | step, s | of n = 0 | kept, MiB | of n = 0 | checkpointed step, s | of n = 0 |")
    print("|---|---|---|---|---|---|---|")
    for plain, again in zip(measured[False], measured[True], strict=True):
        assert plain[3] == measured[False][0][3], "a cut changed the loss"
        shares = [
            plain[1] / measured[False][0][1],
            plain[2] / measured[False][0][2],
            again[1] / measured[True][0][1],
        ]
        cells = [
            f"{plain[1]:.2f}",
            f"{shares[0]:.2f}",
            f"{plain[2] / 2**20:.0f}",
            f"{shares[1]:.2f}",
            f"{again[1]:.2f}",
        ]
        print(f"| {plain[0]} | {' | '.join(cells)} | {shares[2]:.2f} |")
    _plot(measured, model.config.num_hidden_layers)


if __name__ == "__main__":
    main()
