"""The sub-commands of `peftkern measure`: where to cut, how far a domain lies, whether pretraining helps.
Imports little until one runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError, exit_status, require

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add `measure` to the sub-parsers of `peftkern`."""
    measure = commands.add_parser(
        "measure",
        help="measure a model and data before training: cut, similarity, negative",
    )
    kinds = measure.add_subparsers(metavar="WHAT", required=True)
    cut = kinds.add_parser(
        "cut",
        help="which layers to freeze: probes by depth of labelled texts; --train: short runs instead",
    )
    _add_model(cut)
    _add_data(cut)
    cut.add_argument("--folds", type=int, default=5, help="folds of the cross-validation (default: 5)")
    cut.add_argument("--repeats", type=int, default=3, help="times it is repeated (default: 3)")
    cut.add_argument("--probe", default="ridge", help="ridge (the default) or logistic, which is slower")
    cut.add_argument(
        "--depths",
        type=int,
        nargs="+",
        help="layers to score; default: all, or 13 evenly spaced ones",
    )
    cut.add_argument(
        "--train",
        action="store_true",
        help="train LoRA from each of --depths on instead; needs no labels",
    )
    _add_budget(cut, steps=30)
    cut.set_defaults(run=lambda args: _guarded("measure cut", _cut, args))
    similarity = kinds.add_parser(
        "similarity",
        help="how far a target domain lies from a source, before training",
    )
    _add_model(similarity)
    similarity.add_argument("--source", required=True, help="texts of the source domain, a file of rows")
    similarity.add_argument("--target", required=True, help="texts of the target domain, a file of rows")
    similarity.add_argument("--text-column", default="text", help="the column of the texts (default: text)")
    similarity.add_argument(
        "--words",
        type=int,
        default=60,
        help="words of a passage that texts are cut into (default: 60)",
    )
    similarity.add_argument("--rows", type=int, default=400, help="most passages of a domain (default: 400)")
    similarity.add_argument("--folds", type=int, default=5, help="folds of the cross-validation (default: 5)")
    similarity.add_argument(
        "--null-draws",
        type=int,
        default=10,
        help="times a domain is halved, for what chance gives (default: 10)",
    )
    similarity.add_argument("--seed", type=int, default=0, help="seed of draws and splits")
    similarity.add_argument("--output", help="folder for the report and its plot")
    similarity.set_defaults(run=lambda args: _guarded("measure similarity", _similarity, args))
    negative = kinds.add_parser(
        "negative",
        help="whether pretrained weights help or hurt: three arms on one budget",
    )
    _add_model(negative)
    _add_data(negative)
    negative.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[],
        help="also transfer only the first n layers, for each n",
    )
    negative.add_argument(
        "--rates",
        type=float,
        nargs="+",
        help="learning rates to choose from, for each arm",
    )
    _add_budget(negative, steps=200)
    negative.set_defaults(run=lambda args: _guarded("measure negative", _negative, args))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, folder, .gguf file or `sample`")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the model brings along",
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text (default: 128)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a file of rows: .jsonl, .json, .csv, .tsv, .parquet")
    parser.add_argument("--text-column", default="text", help="the column of the texts (default: text)")
    parser.add_argument("--label-column", default="label", help="the column of the labels (default: label)")
    parser.add_argument(
        "--document-column",
        help="the column of the document a row is from: none is on both sides of a split",
    )
    parser.add_argument("--rows", type=int, default=2000, help="most rows, drawn at random (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of draws and splits")
    parser.add_argument("--output", help="folder for the report and its plot")


def _add_budget(parser: argparse.ArgumentParser, *, steps: int) -> None:
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help=f"training steps of a run (default: {steps})",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs with other seeds (default: 3)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step (default: 8)")
    parser.add_argument(
        "--budget",
        type=float,
        default=600,
        help="seconds training may take; the cost is printed first (default: 600)",
    )


def _guarded(name: str, command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; what the user can mend is one message and status 2."""

    def run() -> None:
        from .extras import require_transfer

        require_transfer()
        require("transformers", "peft", "tqdm")
        from ..finetune.recipe import calm_libraries

        calm_libraries(not sys.stderr.isatty())
        command(args)

    return exit_status(name, run)


def _cut(args: argparse.Namespace) -> None:
    from .cut import where_to_cut
    from .inputs import labelled, load_features_model

    if args.train:
        _cut_by_training(args)
        return
    rows = labelled(args, labels=True)
    model, tokenizer = load_features_model(args.model, args.trust_remote_code)
    report = where_to_cut(
        model,
        rows.texts,
        rows.labels,
        tokenizer=tokenizer,
        groups=rows.documents,
        max_length=args.max_length,
        depths=_depths(args.depths, model),
        kind=_choice("--probe", args.probe, ("ridge", "logistic")),
        folds=args.folds,
        repeats=args.repeats,
        seed=args.seed,
        progress=True,
    )
    _shown(args, "cut", report)


def _cut_by_training(args: argparse.Namespace) -> None:
    from .inputs import task_of
    from .trained_cuts import trained_cuts

    model, task, head = task_of(args)
    report = trained_cuts(
        model,
        task,
        firsts=_depths(args.depths, model),
        steps=args.steps,
        seeds=range(args.seeds),
        head=head,
        budget=args.budget,
        progress=True,
    )
    _shown(args, "cut", report)


def _similarity(args: argparse.Namespace) -> None:
    from .inputs import load_model, texts_of
    from .lexical import passages
    from .similarity import domain_similarity

    sides = []
    for option, path in (("--source", args.source), ("--target", args.target)):
        texts = texts_of(path, option, args.text_column)
        sides.append(passages(texts, words=args.words, most=args.rows, seed=args.seed))
    (source, ours), (target, theirs) = sides
    model, tokenizer, causal = load_model(args.model, args.trust_remote_code)
    report = domain_similarity(
        model,
        source,
        target,
        tokenizer=tokenizer,
        source_documents=ours,
        target_documents=theirs,
        max_length=args.max_length,
        folds=args.folds,
        null_draws=args.null_draws,
        bits=causal,
        seed=args.seed,
        progress=True,
    )
    _shown(args, "similarity", report)


def _negative(args: argparse.Namespace) -> None:
    from .inputs import task_of
    from .negative import negative_transfer

    model, task, head = task_of(args)
    options: dict[str, Any] = {} if args.rates is None else {"rates": args.rates}
    report = negative_transfer(
        model,
        task,
        head=head,
        depths=_depths(args.depths, model) or (),
        steps=args.steps,
        seeds=range(args.seeds),
        budget=args.budget,
        progress=True,
        **options,
    )
    _shown(args, "negative", report)


def _choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(f"{option} is {value!r}, expected one of {', '.join(known)}")
    return value


def _depths(depths: list[int] | None, model: Any) -> list[int] | None:
    """Raise InputError for layers the model does not have."""
    from .features import layer_stack

    layers = len(layer_stack(model)[1])
    wrong = [depth for depth in depths or () if not 0 <= depth <= layers]
    if wrong:
        raise InputError(
            f"--depths {wrong[0]}: the model has {layers} layers, give numbers from 0 to {layers}"
        )
    return sorted(set(depths)) if depths else depths


def _shown(args: argparse.Namespace, name: str, report: Any) -> None:
    """Print the report; with --output write it and its plot, whole or not at all."""
    print(report.table())
    if args.output is None:
        return
    from matplotlib.figure import Figure

    from ..files import atomic_files

    figure = Figure(figsize=(8, 5), layout="constrained")
    report.draw(figure.subplots())
    with atomic_files(Path(args.output)) as folder:
        (folder / f"{name}.md").write_text(report.table() + "\n", encoding="utf-8")
        figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"Written: {args.output}/{name}.md and {name}.png", file=sys.stderr)
