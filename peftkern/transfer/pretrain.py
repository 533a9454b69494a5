"""`peftkern pretrain`: continued pretraining on unlabelled text, causal by the recipe of finetune or masked,
beside a control on other text.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, exit_status, require
from ..finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from ..finetune.recipe import FinetuneResult
    from .masked_run import MaskedResult
    from .pretraining import PretrainingReport

__all__ = ["add_commands", "continued_pretraining"]

# Adapters of a low rank learn little of a new domain's text (Biderman et al., 2024, LoRA Learns Less and
# Forgets Less).
RANK = 64


def add_commands(commands: Any) -> None:
    """Add `pretrain` to the sub-parsers of `peftkern`."""
    from ..finetune.cli import add_arguments

    said = "continue pretraining on unlabelled text, beside a control on other text"
    parser = commands.add_parser("pretrain", help=said)
    add_arguments(parser)
    parser.add_argument(
        "--control-data",
        nargs="+",
        help="text of another domain: the same steps on it show what any text does",
    )
    parser.add_argument(
        "--masked",
        action="store_true",
        help="masked language modelling, for encoders with a masked head (BERT and its kin)",
    )
    parser.add_argument(
        "--mask-rate",
        type=float,
        help="part of the tokens to mask, of which 80 in 100 become the mask (default: 0.15)",
    )
    parser.set_defaults(r=RANK, document_boundaries=True, run=_main)


def _main(args: argparse.Namespace) -> int:

    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(FinetuneConfig)}

    def run() -> None:
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        config = FinetuneConfig(**values | tuples)
        control = tuple(args.control_data or ())
        if args.mask_rate is not None and not args.masked:
            raise InputError("--mask-rate is an option of --masked: give both")
        rate = (0.15 if args.mask_rate is None else args.mask_rate) if args.masked else None
        report = continued_pretraining(config, control, mask_rate=rate)
        print(f"\n{report.table()}\n\n{report.verdict}\n\nAdapter:  {Path(config.output) / 'adapted'}")

    return exit_status("pretrain", run, interrupted="Interrupted: the same command with --resume goes on.")


def continued_pretraining(
    config: FinetuneConfig,
    control_data: Sequence[str] = (),
    *,
    mask_rate: float | None = None,
    quiet: bool = False,
) -> PretrainingReport:
    """Fine-tune on `config.data`, as many steps on `control_data`, and measure both and the base on the
    held-out documents.

    With `mask_rate`, 0.15 for BERT's, an encoder learns masked tokens; else a causal model the next ones. The
    adapters are in the folders adapted and control of `config.output`, beside bits_per_byte.csv, .png and
    report.md. A run that was killed goes on with `resume`, whichever of the two it was in.

    Raises: InputError for rows that are no plain text, no held-out documents, or a control that is the target
    itself.
    """
    require("transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "scipy")
    if mask_rate is not None:
        from .masked_run import check_options, window_of

        check_options(config)
        config = dataclasses.replace(config, seq_length=window_of(config))
    config = config.resolved()
    texts = _checked(config, control_data)
    result = _trained(_of_arm(config, "adapted", mask_rate), mask_rate, quiet)
    folders = {"adapted": Path(result.output)}
    if control_data:
        same = {"data": tuple(control_data), "steps": result.steps, "epochs": None, "filter_data": ()}
        control = dataclasses.replace(_of_arm(config, "control", mask_rate), **same)
        folders["control"] = Path(_trained(control, mask_rate, quiet).output)
    if mask_rate is None:
        report = _measured(config, folders, texts, result.steps)
    else:
        report = _measured_masked(config, folders, texts, result, mask_rate)
    _write(Path(config.output), report)
    return report


def _checked(config: FinetuneConfig, control_data: Sequence[str]) -> list[str]:
    """The held-out documents; InputError where something of the data will not do."""
    from ..finetune.data import load_data

    if not config.eval_data:
        raise InputError("--eval-data is needed: held-out documents of the target, to measure on")
    overlap = set(config.data) & set(control_data)
    if overlap:
        same = f"--control-data {min(overlap)} is --data too"
        raise InputError(f"{same}: the control must be text of another domain")
    texts = _documents(config)
    for option, sources in (("--data", config.data), ("--control-data", control_data)):
        if sources and "text" not in load_data(sources, option=option).column_names:
            raise InputError(f"{option}: pretraining needs rows of text; others are for `peftkern finetune`")
    return texts


def _trained(config: FinetuneConfig, mask_rate: float | None, quiet: bool) -> FinetuneResult | MaskedResult:
    if mask_rate is None:
        from ..finetune.recipe import finetune

        return finetune(config, quiet=quiet)
    from .masked_run import pretrain_masked

    return pretrain_masked(config, rate=mask_rate, quiet=quiet)


def _of_arm(config: FinetuneConfig, arm: str, mask_rate: float | None) -> FinetuneConfig:
    """The configuration of one run; one that has not begun is begun, also with --resume."""
    from ..finetune.folder import read_record

    folder = Path(config.output) / arm
    record = folder / "run.json"
    resume = config.resume and record.exists()
    if resume and ("masked" in read_record(record)) != (mask_rate is not None):
        was, now = ("masked", "without") if mask_rate is None else ("causal", "with")
        raise InputError(f"--resume: the run in {folder} is {was}, and you go on {now} --masked: change one")
    return dataclasses.replace(config, output=str(folder), resume=resume)


def _documents(config: FinetuneConfig) -> list[str]:
    """Whole held-out documents at equal distances, of about `eval_tokens` tokens (at four bytes each)."""
    from ..finetune.data import load_data

    texts = []
    for source in config.eval_data:
        rows = load_data(source, option="--eval-data")
        if "text" not in rows.column_names:
            raise InputError(f"--eval-data {source}: bits per byte are of rows of text, without answers")
        texts += [text for text in rows["text"] if text.strip()]
    if len(texts) < 2:
        raise InputError(f"--eval-data has {len(texts)} document(s), expected at least 2 for an interval")
    share = min(1.0, 4 * config.eval_tokens / sum(len(text.encode()) for text in texts))
    count = max(2, round(share * len(texts)))
    return [texts[index * len(texts) // count] for index in range(count)]


def _measured(
    config: FinetuneConfig,
    folders: dict[str, Path],
    texts: list[str],
    steps: int,
) -> PretrainingReport:
    from ..finetune.inference import loaded
    from .pretraining import PretrainingReport, document_bits

    arms: dict[str, Any] = {}
    taken = ("model", "quantization", "double_quant", "dtype", "trust_remote_code", "patch", "seq_length")
    options = {name: getattr(config, name) for name in taken}
    for arm, folder in folders.items():
        with loaded(str(folder), **options) as model:
            how = {"window": config.seq_length, "autocast": model.autocast, "progress": sys.stderr.isatty()}
            if not arms:
                with model.base():
                    arms["before"] = document_bits(model.model, model.tokenizer, texts, **how)
            arms[arm] = document_bits(model.model, model.tokenizer, texts, **how)
    return PretrainingReport(arms, steps)


def _measured_masked(
    config: FinetuneConfig,
    folders: dict[str, Path],
    texts: list[str],
    result: MaskedResult,
    rate: float,
) -> PretrainingReport:
    from .masked_bits import masked_document_bits
    from .masked_run import loaded_encoder
    from .pretraining import MASKED_BITS, PretrainingReport

    arms: dict[str, Any] = {}
    for arm, folder in folders.items():
        with loaded_encoder(folder, config) as (model, tokenizer, autocast):
            how = {"window": config.seq_length, "rate": rate, "seed": config.seed}
            how |= {"autocast": autocast, "progress": sys.stderr.isatty()}
            if not arms:
                with model.disable_adapter():
                    arms["before"] = masked_document_bits(model, tokenizer, texts, **how)
            arms[arm] = masked_document_bits(model, tokenizer, texts, **how)
    return PretrainingReport(arms, result.steps, measure=MASKED_BITS, new_head=bool(result.new_head))


def _write(folder: Path, report: PretrainingReport) -> None:
    """All three files, or none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..files import atomic_files

    with atomic_files(folder) as temporary:
        with (temporary / "bits_per_byte.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["document", "bytes", *report.arms])
            sizes = next(iter(report.arms.values())).sizes
            for number, size in enumerate(sizes):
                writer.writerow([number, size, *(f"{arm.bits[number]:.6g}" for arm in report.arms.values())])
        parts = (
            f"# Continued pretraining, {report.steps} steps",
            report.table(),
            f"{report.verdict}.",
            "![](bits_per_byte.png)",
        )
        text = "\n\n".join(parts) + "\n"
        (temporary / "report.md").write_text(text, encoding="utf-8")
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        report.draw(figure.add_subplot())
        figure.savefig(temporary / "bits_per_byte.png", dpi=110)
