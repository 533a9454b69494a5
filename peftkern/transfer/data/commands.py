"""The sub-command `data`: what is wrong in a file of training rows, and the file without it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ...errors import InputError, exit_status

__all__ = ["add_commands"]

_BAG = "bag-of-words"


def add_commands(commands: Any) -> None:
    """Add the command to the sub-parsers of `peftkern`."""
    data = commands.add_parser(
        "data",
        help="wrong labels, near duplicates and evaluation text in training data",
    )
    data.add_argument("data", nargs="+", help="files of rows, as --data of finetune, or `sample`")
    data.add_argument("--eval-data", nargs="+", default=[], help="rows that training must not hold")
    data.add_argument("--output", help="write the rows that --filter leaves to this .jsonl file")
    data.add_argument(
        "--filter",
        nargs="+",
        default=[],
        help="leave out what these found: duplicates, overlap, labels, losses, dynamics",
    )
    data.add_argument("--report", help="folder for report.md, report.json and report.png")
    _add_texts(data.add_argument_group("near duplicates and overlap"))
    _add_labels(data.add_argument_group("labels"))
    _add_losses(data.add_argument_group("losses"))
    data.set_defaults(run=_guarded)


def _add_texts(group: Any) -> None:
    group.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="Jaccard similarity of near duplicates (default: 0.8)",
    )
    group.add_argument(
        "--shingles",
        type=int,
        default=5,
        help="words (or characters) of a shingle (default: 5)",
    )
    group.add_argument(
        "--unit",
        default="words",
        help="words, or characters for languages without spaces (default: words)",
    )
    group.add_argument(
        "--run-length",
        type=int,
        default=13,
        help="words in a row that count as overlap (default: 13)",
    )
    group.add_argument(
        "--coverage",
        type=float,
        default=0.5,
        help="part of an evaluation row that counts as seen (default: 0.5)",
    )


def _add_labels(group: Any) -> None:
    group.add_argument("--label", help="the key of the rows' label: find wrong ones")
    group.add_argument(
        "--group",
        help="the key of the document that a row is from: kept on one side of each fold",
    )
    group.add_argument(
        "--features",
        default=_BAG,
        help=f"{_BAG}, or an encoder: hub id or folder (default: {_BAG})",
    )
    group.add_argument("--folds", type=int, default=5, help="folds of the probes (default: 5)")
    group.add_argument("--seed", type=int, default=0, help="seed of the folds (default: 0)")


def _add_losses(group: Any) -> None:
    group.add_argument("--adapter", help="the --output of a run: take each row's loss under it")
    group.add_argument("--model", help="a base to take the losses under; with --adapter: in place of its own")
    group.add_argument(
        "--row-losses",
        help="row_losses.csv of a run with `finetune --row-losses`: which rows are learnt late, or never",
    )
    group.add_argument("--seq-length", type=int, help="tokens of a row (default: the run's, else 1024)")
    group.add_argument(
        "--percentile",
        type=float,
        default=99.0,
        help="losses above it are filtered (default: 99)",
    )


def _guarded(args: argparse.Namespace) -> int:
    """Run the command; what the user can mend is one message and status 2."""

    def run() -> None:
        from ...finetune.recipe import calm_libraries

        if args.adapter or args.model or args.features != _BAG:
            calm_libraries(not sys.stderr.isatty())
        _run(args)

    return exit_status("data", run)


def _run(args: argparse.Namespace) -> None:
    from .checks import CHECKS, check_texts, write_report, write_rows
    from .rows import read_data

    _check_options(args, CHECKS)
    rows = read_data(args.data, label=args.label, group=args.group)
    evaluation = read_data(args.eval_data, option="--eval-data").texts if args.eval_data else ()
    report = check_texts(
        rows,
        evaluation,
        threshold=args.threshold,
        size=args.shingles,
        unit=args.unit,
        run=args.run_length,
        coverage=args.coverage,
        progress=sys.stderr.isatty(),
    )
    if args.label:
        report = dataclasses.replace(report, labels=_labels(args, rows))
    if args.adapter or args.model:
        report = dataclasses.replace(report, losses=_losses(args), percentile=args.percentile)
    if args.row_losses:
        from .recorded import row_dynamics

        found = row_dynamics(Path(args.row_losses), args.data, len(rows))
        report = dataclasses.replace(report, dynamics=found, percentile=args.percentile)
    print(f"{len(rows)} rows")
    for name, found in report.made().items():
        print(f"{name}: {found.verdict}")
    gone = report.reasons(args.filter)
    if args.report:
        write_report(Path(args.report), report)
        print(f"Report: {args.report}/report.md")
    if args.output:
        print(f"{write_rows(Path(args.output), rows, gone)} of {len(rows)} rows are in {args.output}")


def _check_options(args: argparse.Namespace, checks: tuple[str, ...]) -> None:
    """What can be told before any row is read."""
    unknown = [name for name in args.filter if name not in checks]
    if unknown:
        raise InputError(f"--filter must be of {', '.join(checks)}; got {unknown[0]!r}")
    if bool(args.filter) != bool(args.output):
        raise InputError("--filter and --output go together: what to leave out, and where to write the rest")
    if args.group and not args.label:
        raise InputError("--group is of the check of labels: give --label as well")
    for source in (*args.data, *args.eval_data):
        if (
            args.output
            and Path(source).exists()
            and Path(args.output).exists()
            and Path(source).samefile(args.output)
        ):
            raise InputError(f"--output {args.output} is a file that is read: give another")


def _labels(args: argparse.Namespace, rows: Any) -> Any:
    from ..probes import check_labels
    from .extras import require_data
    from .labels import label_noise, out_of_fold

    require_data("cleanlab", "sklearn")
    check_labels(list(rows.labels), rows.groups, args.folds)
    features = _features(args.features, rows.texts)
    shown = sys.stderr.isatty()
    probabilities = out_of_fold(
        features,
        rows.labels,
        groups=rows.groups,
        folds=args.folds,
        seed=args.seed,
        progress=shown,
    )
    return label_noise(rows.labels, probabilities, seed=args.seed)


def _features(name: str, texts: tuple[str, ...]) -> Any:
    if name == _BAG:
        from ..probes import bag_of_words

        return bag_of_words(texts)
    from transformers import AutoModel, AutoTokenizer

    from ...finetune.loading import load_errors
    from ..features import pooled_features

    with load_errors(name, name):
        model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    found = pooled_features(
        model,
        list(texts),
        tokenizer=tokenizer,
        pools=("mean",),
        depths=(-1,),
        progress=sys.stderr.isatty(),
    )
    return found.at(-1)


def _losses(args: argparse.Namespace) -> Any:
    from ...errors import require
    from ...finetune.data import load_data
    from ...finetune.inference import loaded
    from ...finetune.tokens import tokenize
    from .losses import row_losses

    require("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl")
    data = load_data(args.data)
    with loaded(args.adapter, model=args.model, seq_length=args.seq_length) as model:
        length = model.config.seq_length
        tokens = tokenize(data, model.tokenizer, length=length, wrapped=False, loss_on=model.config.loss_on)
        return row_losses(model, tokens, count=len(data), progress=sys.stderr.isatty())
