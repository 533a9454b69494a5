"""The sub-command `report`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from ...errors import exit_status
from ...finetune.config import SAMPLE, FinetuneConfig

__all__ = ["add_commands"]

_OF_RUN = (
    "model",
    "data",
    "eval_data",
    "quantization",
    "dtype",
    "trust_remote_code",
    "seq_length",
    "seed",
    "lr",
)


def add_commands(commands: Any) -> None:
    """Add `report` to the sub-parsers of `peftkern`."""
    parser = commands.add_parser(
        "report", help="measure before training: distance, cut, forgetting, data; and a command line"
    )
    defaults = FinetuneConfig()
    parser.add_argument("--model", default=defaults.model, help="as of finetune (default: %(default)s)")
    parser.add_argument(
        "--data", nargs="+", default=list(defaults.data), help="the target's rows, as of finetune"
    )
    parser.add_argument(
        "--eval-data", nargs="+", default=[], help="held-out rows of the target; default: a part of --data"
    )
    parser.add_argument(
        "--source-data",
        nargs="+",
        default=["python-reference"],
        help="what the model knows and is not to forget",
    )
    parser.add_argument(
        "--output",
        default="report.html",
        help=".html, or .md with its plots beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="begin no section after so long (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=16, help="steps of each short run (default: %(default)s)"
    )
    parser.add_argument(
        "--arms", type=int, default=4, help="first layers that are tried (default: %(default)s)"
    )
    parser.add_argument(
        "--quantization", default=defaults.quantization, help="nf4, fp4 or none (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default=defaults.dtype, help="auto, bf16, fp16 or fp32 (default: %(default)s)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings along"
    )
    parser.add_argument("--seq-length", type=int, help="tokens of a window; default: as of finetune")
    parser.add_argument("--lr", type=float, help="learning rate of the short runs; default: as of finetune")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.set_defaults(run=_main)


def _main(args: argparse.Namespace) -> int:
    return exit_status("report", lambda: _report(args))


def _report(args: argparse.Namespace) -> int:
    from ...finetune.recipe import calm_libraries
    from .build import ReportOptions, transfer_report

    values = {name: getattr(args, name) for name in _OF_RUN}
    if tuple(args.data) == (SAMPLE,) and not args.eval_data:
        values["eval_data"] = [SAMPLE]
    config = FinetuneConfig(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
    options = ReportOptions(
        source_data=tuple(args.source_data),
        output=Path(args.output),
        minutes=args.minutes,
        steps=args.steps,
        arms=args.arms,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        calm_libraries(not sys.stderr.isatty())
        page = transfer_report(config, options, progress=sys.stderr.isatty())
    for section in page.sections:
        print(f"{section.question}  {section.verdict or f'Not measured: {section.missing}.'}")
    print(f"\nPage:  {options.output}\n\n{page.command}")
    return 0
