"""The sub-command `merge`: an adapter and its base as one model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..finetune.inference import LoadedModel
    from .merge_report import MergeComparison, MergeReport

__all__ = ["add_commands"]

_FORMS = ("auto", "compare", "requantize", "stochastic", "feedback", "residual", "dense")
_MODEL = ("model", "quantization", "double_quant", "dtype", "trust_remote_code", "patch", "seq_length")
_COMPARED = ("requantize", "stochastic", "feedback", "residual", "dense")
_ON_ORIGINAL = (("requantize", "original"), ("feedback", "original"), ("dense", "original"))
_EXTRA = ("transformers", "peft", "accelerate", "bitsandbytes", "matplotlib")
_REPORT = "merge.json"


def add_commands(commands: Any) -> None:
    """Add `merge` to the sub-parsers of `peftkern`."""
    switch: Any = argparse.BooleanOptionalAction
    parser = commands.add_parser("merge", help="an adapter and its base as one model, and what that costs")
    parser.add_argument("--adapter", required=True, help="the --output of a run, or a folder that PEFT saved")
    parser.add_argument("--output", help="the folder to write; not needed with --form compare")
    parser.add_argument("--form", choices=_FORMS, default="dense", help=_form_help())
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="merge into the 4-bit weights the adapter was trained on (default), or those they came from",
    )
    parser.add_argument("--rank", type=int, default=8, help="of the residual adapter (default: 8)")
    parser.add_argument("--probe", nargs="+", help="texts to measure on, as --eval-data of finetune")
    parser.add_argument(
        "--calibration",
        nargs="+",
        help="texts for --form feedback; default: --probe",
    )
    parser.add_argument("--probe-tokens", type=int, default=4096, help="most of each text (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge in --output")
    parser.add_argument("--other-base", action="store_true", help="merge into a base not the adapter's own")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="the base: hub id, folder, .gguf or `sample`; default: the adapter's")
    group.add_argument("--quantization", help="nf4, fp4 or none; default: the run's, else nf4")
    group.add_argument("--double-quant", action=switch, help="quantize block maxima too; default: as the run")
    group.add_argument("--dtype", help="auto, bf16, fp16 or fp32; default: the run's, else auto")
    group.add_argument("--trust-remote-code", action=switch, help="run Python code of the model's")
    group.add_argument("--patch", action=switch, default=True, help="--no-patch runs plain PEFT")
    group.add_argument("--seq-length", type=int, help="tokens of a sequence; default: the run's, else 1024")
    parser.set_defaults(run=_main)


def _form_help() -> str:
    return (
        "dense (default): 16 bits; requantize: 4 bits; feedback: 4 bits, rounding errors fed back along the "
        "inputs; stochastic: 4 bits, unbiased and noisier; residual: 4 bits and a small adapter of what "
        "rounding lost; auto: the smallest that the probe finds faithful; compare: measure all, write nothing"
    )


def _main(args: argparse.Namespace) -> int:
    """Run the command; what the user can mend is one message and status 2."""
    from ..errors import exit_status, require

    def run() -> None:
        require(*_EXTRA)
        from ..finetune.recipe import calm_libraries

        calm_libraries(not sys.stderr.isatty())
        _run(args)

    return exit_status("merge", run, worded=_worded, mendable=(ValueError,))


def _worded(error: Exception) -> str:
    """A library's message with the options in the place of its arguments."""
    text = str(error)
    for argument in ("probe", "rank", "form", "adapters", "model"):
        text = f"--{text}" if text.startswith(f"{argument}: ") else text
    return text.replace("original: ", "--base original: ", 1) if text.startswith("original: ") else text


def _run(args: argparse.Namespace) -> None:
    from ..finetune.inference import loaded

    _check(args)
    options = {name: getattr(args, name) for name in _MODEL}
    with loaded(args.adapter, **options) as model:
        _same_base(args, model)
        with model.autocast():
            _merge(args, model)


def _check(args: argparse.Namespace) -> None:
    """What can be told before anything is loaded."""
    from ..errors import InputError

    if args.rank < 1:
        raise InputError(f"--rank must be at least 1, got {args.rank}")
    if args.probe_tokens < 2:
        raise InputError(f"--probe-tokens must be at least 2, got {args.probe_tokens}")
    calibrated = args.form == "feedback" and args.calibration
    if args.form in ("auto", "compare", "feedback") and not args.probe and not calibrated:
        raise InputError(f"--form {args.form} needs --probe: texts like those the adapter was trained on")
    if args.form == "compare":
        return
    if not args.output:
        raise InputError("give --output, the folder to write the merged model to")
    output = Path(args.output)
    if os.path.abspath(output) in (
        os.path.abspath(args.adapter),
        os.path.abspath(args.model or args.adapter),
    ):
        raise InputError(f"--output {output} is the folder of the adapter or of its base: name another")
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not (args.overwrite and (output / _REPORT).is_file()):
        ours = (output / _REPORT).is_file()
        what = "give --overwrite" if ours else "no merge wrote it: name another folder"
        raise InputError(f"--output {output} exists already: {what}")


def _same_base(args: argparse.Namespace, model: LoadedModel) -> None:
    """Refuse a base that differs from the one a run's adapter was trained on."""
    from ..errors import InputError
    from ..finetune.base import base_changes

    file = Path(args.adapter) / "run.json"
    if args.other_base or not file.is_file():
        return
    record = json.loads(file.read_text(encoding="utf-8"))
    changes = base_changes(record.get("base", {}), model.config.model)
    if changes:
        raise InputError(
            f"the adapter was trained on another base: {'; '.join(changes)}. Give its own with --model, "
            "or --other-base to merge all the same"
        )


def _merge(args: argparse.Namespace, model: LoadedModel) -> None:
    from .merge import compare_merges, merge

    rows, calibration = _tokens(args, model, "probe"), _tokens(args, model, "calibration")
    original = _original(args, model)
    common = dict(
        original=original,
        rank=args.rank,
        seed=args.seed,
        progress=sys.stderr.isatty(),
        calibration=calibration,
    )
    form, base = args.form, args.base
    if form in ("auto", "compare"):
        forms = _COMPARED if original is None else (*_COMPARED, *_ON_ORIGINAL)
        comparison = compare_merges(model.model, rows, forms=forms, **common)
        print(comparison)
        if form == "compare":
            return
        form, base = _chosen(comparison)
    _check_space(args, model, form)
    report = merge(model.model, form=form, base=base, probe=rows, **common)
    print(report)
    _write(args, model, report, original)


def _chosen(comparison: MergeComparison) -> tuple[str, str]:
    from ..errors import InputError

    if comparison.best is None:
        raise InputError(f"--form auto finds none to take. {comparison.verdict} Or name a form yourself")
    return comparison.best.form, comparison.best.base


def _tokens(args: argparse.Namespace, model: LoadedModel, option: str) -> list[Any] | None:
    """Token ids of the sequences of --probe or --calibration, of all its texts in turn."""
    sources = getattr(args, option)
    if not sources:
        return None
    import torch

    from ..errors import InputError
    from ..finetune.data import evaluation_names, load_data
    from ..finetune.inputs import prepare_evaluations
    from ..finetune.trainer import spread

    texts = evaluation_names(tuple(sources))
    rows = {name: load_data(source, option=f"--{option}") for name, source in texts.items()}
    windows = max(2, args.probe_tokens // model.config.seq_length)
    prepared = prepare_evaluations(model.config, rows, model.tokenizer)
    found = [torch.tensor(row["input_ids"]) for data in prepared.values() for row in spread(data, windows)]
    found = [row for row in found if row.numel() > 1]
    if not found:
        raise InputError(f"--{option} has no text of two tokens: give more text")
    return found


def _original(args: argparse.Namespace, model: LoadedModel) -> str | None:
    """The folder of the base's own weights; None where it has none and none is needed."""
    from ..errors import InputError
    from ..finetune.model import resolve_model

    path = resolve_model(model.config.model)
    if not os.path.isdir(path):
        path = _in_cache(path)
    config = Path(path or "") / "config.json"
    if path and config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        if "quantization_config" not in values:
            return path
    if args.base == "original":
        raise InputError(f"--base original: {model.config.model} has no 16-bit weights: leave it out")
    return None


def _in_cache(model: str) -> str | None:
    from transformers.utils import cached_file

    for name in ("model.safetensors.index.json", "model.safetensors"):
        try:
            return str(Path(cached_file(model, name, local_files_only=True)).parent)
        except (OSError, ValueError, TypeError):
            continue
    return None


def _check_space(args: argparse.Namespace, model: LoadedModel, form: str) -> None:
    from ..errors import InputError
    from .merge_save import bytes_on_disk

    needed = int(1.05 * bytes_on_disk(model.model, form)) + (16 << 20)
    parent = next(path for path in Path(args.output).absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"--output {args.output} needs about {needed / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB:"
            " free some, name a folder on another disk, or take a 4-bit --form"
        )


def _write(args: argparse.Namespace, model: LoadedModel, report: MergeReport, original: str | None) -> None:
    from ..patching.weights import is_4bit
    from .merge_save import ADAPTER_FOLDER, save_merged

    lora = {id(task) for task in _adapted(model.model)}
    others = sum(is_4bit(module) and id(module) not in lora for module in model.model.modules())
    files = dict(tokenizer=model.tokenizer, original=original, also=_files(report))
    save_merged(model.model, args.output, report, **files)
    print(f"Written to {args.output}.")
    if report.form == "dense" and others and report.base == "original":
        print(f"{others} layers without an adapter are the original ones too, which no number above shows.")
    if report.form == "residual":
        print(f"What rounding lost is the adapter in {Path(args.output) / ADAPTER_FOLDER}: load both.")


def _adapted(model: Any) -> list[Any]:
    """The bases that merged layers had before."""
    from ..patching.merged import unmerged
    from .merge_layers import lora_layers

    return [origin.base for layer in lora_layers(model).values() if (origin := unmerged(layer)) is not None]


def _files(report: MergeReport) -> Any:
    """What writes the report beside the model."""

    def write(folder: Path) -> None:
        from dataclasses import asdict

        from matplotlib.figure import Figure

        values = asdict(report) | {"verdict": report.verdict}
        (folder / _REPORT).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        report.plot(figure.subplots())
        figure.savefig(folder / "merge.png", dpi=120)

    return write
