"""`peftkern arithmetic --sweep`: an expression with a variable, run over its values on validation text; the
best adapter is written."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .combine import combine
from .expression import parse
from .folders import folders_of
from .lora import LoraWeights
from .lora_files import check_output, read_adapter, write_adapter
from .models import add_to_model
from .rules import Method
from .sweep import Sweep, sweep

__all__ = ["swept"]

_MOST_VALUES = 1001


def swept(args: argparse.Namespace) -> str:
    """Sweep, and write the best adapter with sweep.csv and sweep.png beside it; returns what to print.

    Raises: ValueError, OSError, ModuleNotFoundError for what the user can mend.
    """
    from ...errors import require

    require("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl", "matplotlib")
    variable, values = _values(args.sweep)
    points = {value: parse(args.expression, {variable: value}) for value in values}
    if variable in points[values[0]] or parse(args.expression, {variable: 1.0}) == parse(
        args.expression, {variable: 2.0}
    ):
        raise ValueError(
            f"--sweep: {variable} is not in the expression; write it where the number shall be, as in"
            f" {variable}*(a + b)"
        )
    if args.data is None:
        raise ValueError("--sweep needs --data: validation text by which the best is chosen")
    check_output(Path(args.output), overwrite=args.overwrite)
    folders = folders_of(points[values[0]], args.folders)
    adapters = {name: read_adapter(folder, name) for name, folder in folders.items()}
    method = Method(args.method, density=args.density, drop=args.drop, seed=args.seed, scale=args.scale)
    options = {name: getattr(args, name) for name in ("space", "rank", "max_error", "base", "any_base")}

    def mixture(value: float) -> LoraWeights:
        return combine(parse(args.expression, {variable: value}), adapters, method=method, **options).adapter

    result = _sweep(
        args,
        mixture,
        values,
        next(iter(folders.values())),
        scales=_scales(args.expression, variable, method),
    )
    best = mixture(result.best)
    best.record.update(
        {
            "expression": args.expression,
            variable: result.best,
            "adapters": {n: str(f) for n, f in folders.items()},
        }
    )
    write_adapter(best, args.output, overwrite=args.overwrite, beside=lambda folder: _write(result, folder))
    return (
        f"{result.verdict}\n{args.output}: the adapter at {variable} = {result.best:g}, sweep.csv and"
        " sweep.png"
    )


def _values(text: str) -> tuple[str, list[float]]:
    """The variable and its values, of "x=0:1:11"."""
    name, _, numbers = text.partition("=")
    try:
        first, last, count = numbers.split(":")
        start, stop, many = float(first), float(last), int(count)
    except ValueError:
        raise ValueError(f"--sweep: got {text!r}, expected NAME=FROM:TO:COUNT, as x=0:1:11") from None
    if (
        not name.isidentifier()
        or not 2 <= many <= _MOST_VALUES
        or not abs(start) + abs(stop) < float("inf")
        or start == stop
    ):
        raise ValueError(
            f"--sweep: got {text!r}, expected a name, two different numbers and a count from 2 to"
            f" {_MOST_VALUES}"
        )
    return name, [round(start + (stop - start) * i / (many - 1), 12) for i in range(many)]


def _scales(expression: str, variable: str, method: Method) -> bool:
    """Whether the variable multiplies the whole: then all mixtures share one adapter's tensors."""
    one, two = (parse(expression, {variable: value}) for value in (1.0, 2.0))
    return method.name == "sum" and all(two[name] == 2 * one[name] for name in one)


def _sweep(
    args: argparse.Namespace,
    mixture: Any,
    values: Sequence[float],
    adapter: Path,
    *,
    scales: bool,
) -> Sweep:
    import peftkern

    from ...finetune.inference import loaded

    given = {name: getattr(args, name) for name in ("model", "quantization", "seq_length", "eval_tokens")}
    with loaded(str(adapter), **given) as held:
        if scales:
            add_to_model(held.model, mixture(1.0), "mixture")
            names: str | Mapping[float, str] = "mixture"
        else:
            names = {value: f"mixture_{i}" for i, value in enumerate(values)}
            for value, name in names.items():
                add_to_model(held.model, mixture(value), name)
        peftkern.patch(held.model)
        windows = {"data": _windows(held, args.data, "--data")}
        if args.control is not None:
            windows["control"] = _windows(held, args.control, "--control")
        chosen = {
            "control": "control" if "control" in windows else None,
            "budget": args.budget,
            "maximize": args.maximize,
        }
        with held.autocast():
            return sweep(held.model, names, windows, values=values, **chosen)


def _windows(held: Any, source: str, option: str) -> Tensor:
    """Windows [n, seq_length] of a text's tokens, spread over it."""
    from ...finetune.data import load_data
    from ...finetune.inputs import prepare_evaluations

    rows = prepare_evaluations(held.config, {"data": load_data(source, option=option)}, held.tokenizer)[
        "data"
    ]
    ids = torch.tensor([token for row in rows["input_ids"] for token in row])
    length, most = held.config.seq_length, max(1, held.config.eval_tokens // held.config.seq_length)
    count = len(ids) // length
    if not count:
        raise ValueError(
            f"{option} {source}: {len(ids)} tokens, fewer than one window of {length}: give more text, or"
            " --seq-length"
        )
    chosen = [i * count // min(count, most) for i in range(min(count, most))]
    return ids[: count * length].view(count, length)[chosen]


def _write(result: Sweep, folder: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result.write_csv(folder / "sweep.csv")
    figure = Figure(figsize=(6, 4), layout="constrained")
    result.draw(figure.add_subplot())
    FigureCanvasAgg(figure).print_png(folder / "sweep.png")
