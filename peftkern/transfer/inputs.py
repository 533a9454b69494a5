"""Models and rows of files for the measurements of the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..finetune.loading import load_errors
from ..finetune.model import resolve_model
from ..finetune.readers import read_rows
from .tasks import Task, classification, language_modelling

__all__ = ["LabelledTexts", "labelled", "load_features_model", "load_model", "task_of", "texts_of"]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels and documents, each None where the file has none."""

    texts: list[str]
    labels: list[Any] | None
    documents: list[Any] | None


def _rows(path: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    file = Path(path)
    if not file.exists():
        raise InputError(f"{option} {path}: no such file")
    rows = list(read_rows(file, option))
    if not rows:
        raise InputError(f"{option} {path} holds no rows")
    wrong = next((place for place, row in rows if not isinstance(row, dict)), None)
    if wrong is not None:
        raise InputError(f"{wrong}: expected a row with named columns")
    return rows


def _column(rows: list[tuple[str, dict[str, Any]]], name: str, option: str) -> list[Any]:
    missing = next(((place, row) for place, row in rows if row.get(name) is None), None)
    if missing is not None:
        place, row = missing
        columns = ", ".join(map(str, row))
        raise InputError(
            f"{place}: column {name!r} ({option}) is missing or empty; the row has {columns or 'none'}: name"
            " another column"
        )
    return [row[name] for _, row in rows]


def texts_of(path: str, option: str, column: str) -> list[str]:
    """The texts of a file's rows; raises InputError naming the row that has none."""
    return [str(text) for text in _column(_rows(path, option), column, "--text-column")]


def labelled(args: argparse.Namespace, *, labels: bool) -> LabelledTexts:
    """At most --rows rows of --data, drawn at random; without `labels` the label column may be missing from
    all rows.
    """
    rows = _rows(args.data, "--data")
    if len(rows) > args.rows:
        order = (
            torch.randperm(
                len(rows),
                generator=torch.Generator().manual_seed(args.seed),
            )[: args.rows]
            .sort()
            .values
        )
        rows = [rows[index] for index in order.tolist()]
    wanted = labels or any(row.get(args.label_column) is not None for _, row in rows)
    if labels and all(row.get(args.label_column) is None for _, row in rows):
        raise InputError(
            f"--data {args.data} has no column {args.label_column!r}, and probes need labels: name it"
            " (--label-column), or measure cuts of unlabelled text with --train"
        )
    return LabelledTexts(
        [str(text) for text in _column(rows, args.text_column, "--text-column")],
        _column(rows, args.label_column, "--label-column") if wanted else None,
        _column(rows, args.document_column, "--document-column") if args.document_column else None,
    )


def load_features_model(model: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model without a head, in fp32, and its tokenizer."""
    from transformers import AutoModel

    return _loaded(AutoModel, model, trust_remote_code)


def load_model(model: str, trust_remote_code: bool) -> tuple[Any, Any, bool]:
    """A causal language model with its head where it is one, else a model without a head; its tokenizer;
    whether it is causal.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    causal = _is_causal(model, trust_remote_code)
    return (*_loaded(AutoModelForCausalLM if causal else AutoModel, model, trust_remote_code), causal)


def _is_causal(model: str, trust_remote_code: bool) -> bool:
    from transformers import AutoConfig

    path = resolve_model(model)
    with load_errors(model, path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def _loaded(kind: Any, model: str, trust_remote_code: bool, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    path = resolve_model(model)
    with load_errors(model, path, files="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    with load_errors(model, path):
        loaded = kind.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            **options,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return loaded.to(device).eval(), tokenizer


def task_of(args: argparse.Namespace) -> tuple[Any, Task, tuple[str, ...]]:
    """A model with the head that --data needs, the task, and the head's prefix where it is new.

    Labelled rows make a task of classification, others one of language modelling in windows of --max-length
    tokens.
    """
    rows = labelled(args, labels=False)
    if rows.labels is None:
        return _language_task(args, rows)
    return _classification_task(args, rows)


def _classification_task(args: argparse.Namespace, rows: LabelledTexts) -> tuple[Any, Task, tuple[str, ...]]:
    from transformers import AutoModelForSequenceClassification

    names = sorted(set(rows.labels or ()), key=str)
    if len(names) < 2:
        raise InputError(f"all {len(rows.texts)} labels are {names[0]!r}: at least two classes are needed")
    model, tokenizer = _loaded(
        AutoModelForSequenceClassification,
        args.model,
        args.trust_remote_code,
        num_labels=len(names),
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    encoded = tokenizer(
        rows.texts,
        padding=True,
        truncation=True,
        max_length=args.max_length,
        padding_side="right",
        return_tensors="pt",
    )
    labels = torch.tensor([names.index(label) for label in rows.labels or ()])
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    task = classification(inputs, labels, groups=rows.documents, batch_size=args.batch_size, seed=args.seed)
    head = next((name for name in ("score", "classifier") if hasattr(model, name)), None)
    if head is None:
        raise InputError(
            f"--model {args.model}: the head of {type(model).__name__} is not known; measure it from Python"
            " (head=...)"
        )
    return model, task, (head,)


def _language_task(args: argparse.Namespace, rows: LabelledTexts) -> tuple[Any, Task, tuple[str, ...]]:
    model, tokenizer, causal = load_model(args.model, args.trust_remote_code)
    if not causal:
        raise InputError(
            f"--data {args.data} has no column {args.label_column!r}, and {args.model} is no causal language"
            " model that could learn the texts themselves: name the column of the labels (--label-column)"
        )
    windows, owners = [], []
    for index, text in enumerate(rows.texts):
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids) - args.max_length + 1, args.max_length):
            windows.append(ids[start : start + args.max_length])
            owners.append(rows.documents[index] if rows.documents else index)
    if not windows:
        raise InputError(
            f"no text of --data {args.data} has {args.max_length} tokens: give longer ones, or a smaller"
            " --max-length"
        )
    if len(windows) > args.rows:
        order = (
            torch.randperm(
                len(windows),
                generator=torch.Generator().manual_seed(args.seed),
            )[: args.rows]
            .sort()
            .values.tolist()
        )
        windows, owners = [windows[i] for i in order], [owners[i] for i in order]
    task = language_modelling(
        torch.tensor(windows),
        groups=owners,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    return model, task, ()
