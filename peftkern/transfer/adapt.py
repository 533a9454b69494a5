"""`peftkern adapt`: a text classifier for a domain without labels, from labelled text of another, by DANN or
MMD.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ..errors import InputError, exit_status, require
from .adapt_config import METHODS, AdaptConfig, AdaptReport

__all__ = ["METHODS", "AdaptConfig", "AdaptReport", "adapt", "add_commands"]


def add_commands(commands: Any) -> None:
    """Add `adapt` to the sub-parsers of `peftkern`."""
    said = "a text classifier for a domain without labels, from labelled text of another"
    parser = commands.add_parser("adapt", help=said)
    helps = {
        "model": "an encoder: hub id or folder",
        "data": "labelled source rows: text and label, .jsonl, .csv, .tsv, .json, .parquet",
        "target_data": "target rows to adapt to: text; a label among them is not read",
        "output": "folder for adapter and report",
        "test_data": "labelled target rows to score with at the end, and for nothing else",
        "method": "mmd (maximum mean discrepancy), dann (domain-adversarial) or none (the source alone)",
        "strength": "weight of the alignment's loss beside the task's",
        "r": "LoRA rank",
        "seq_length": "most tokens of a text",
        "batch_size": "source rows of a step, and as many target rows",
        "steps": "optimizer steps",
        "lr": "learning rate at the start",
        "eval_fraction": "part of the source rows to hold out",
        "seed": "seed of everything random",
        "patch": "use peftkern's kernels",
    }
    types: dict[str, type] = {"strength": float, "lr": float, "eval_fraction": float, "patch": bool}
    types |= dict.fromkeys(("r", "seq_length", "batch_size", "steps", "seed"), int)
    for field in dataclasses.fields(AdaptConfig):
        flag, required = "--" + field.name.replace("_", "-"), field.default is dataclasses.MISSING
        default = None if required else field.default
        shown = "" if default is None or isinstance(default, bool) else f" (default: {default})"
        options: dict[str, Any] = {
            "help": helps[field.name] + shown,
            "default": default,
            "required": required,
        }
        if types.get(field.name) is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = types.get(field.name, str)
        parser.add_argument(flag, **options)
    parser.set_defaults(run=_main)


def _main(args: argparse.Namespace) -> int:
    def run() -> None:
        names = [field.name for field in dataclasses.fields(AdaptConfig)]
        config = AdaptConfig(**{name: getattr(args, name) for name in names})
        print(f"\n{adapt(config).verdict}\nAdapter:  {config.output}")

    return exit_status("adapt", run)


def adapt(config: AdaptConfig) -> AdaptReport:
    """Train LoRA and a classifier on the source's labels, aligned with the target's texts; save both, and
    report.

    Raises: InputError for rows without text or label, one class, fewer than two target rows, or a folder that
    exists.
    """
    require("transformers", "peft", "accelerate", "tqdm")
    from ..files import atomic_directory
    from .extras import require_transfer

    require_transfer()
    output = Path(config.output)
    if output.exists():
        raise InputError(f"--output {output} exists: name a folder that does not, as nothing is overwritten")
    source = _rows(config.data, "--data", labelled=True)
    target = _rows(config.target_data, "--target-data", labelled=False)
    test = [] if config.test_data is None else _rows(config.test_data, "--test-data", labelled=True)
    labels = sorted({label for _, label in source})
    if len(labels) < 2:
        raise InputError(f"--data: all {len(source)} labels are {labels[0]!r}: it needs two classes")
    unknown = {label for _, label in test} - set(labels)
    if unknown:
        known = ", ".join(labels)
        raise InputError(f"--test-data has the label {min(unknown)!r}, which --data has not: it has {known}")
    if len(target) < 2:
        raise InputError(f"--target-data has {len(target)} row(s), expected at least 2")
    from .classifier import train

    model, tokenizer, report = train(config, source, target, test, labels)
    with atomic_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        values = dataclasses.asdict(config) | {"labels": labels, "report": report.verdict.split("\n")}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / "adapt.json").write_text(text, encoding="utf-8")
    return report


def _rows(source: str, option: str, *, labelled: bool) -> list[tuple[str, str]]:
    """(text, label) of each row; the label is "" where none is wanted."""
    from ..finetune.readers import read_rows

    path = Path(source)
    if not path.exists():
        raise InputError(f"{option} {source}: no such file or folder")
    rows = []
    for place, row in read_rows(path, option, also=("label",)):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place}: the row has no text: {option} needs rows with the field text")
        label = row.get("label")
        if labelled and (label is None or label == "" or isinstance(label, (dict, list))):
            raise InputError(f"{place}: the row has no label: {option} needs rows with text and label")
        rows.append((text, str(label) if labelled else ""))
    if not rows:
        raise InputError(f"{option} {source} is empty: it needs at least one row")
    return rows
