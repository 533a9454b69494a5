"""Rows as token ids and labels, cut to the window; what is cut or left out is counted and said."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .constants import ALL, COMPLETIONS
from .data import data_kind
from .errors import InputError
from .rows import CHAT, decode_row
from .tables import write_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["render", "tokenize"]

IGNORED = -100  # the label of a token that is no target
_BATCH = 64  # texts that the tokenizer takes at once, on all cores


@dataclass(frozen=True)
class _Example:
    """Token ids and the spans of them, from and to before, that are targets."""

    ids: list[int]
    spans: list[tuple[int, int]]

    def labels(self) -> list[int]:
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels


@dataclass
class _Counts:
    rows: int = 0
    cut: int = 0
    without_target: int = 0
    blank: int = 0
    longest: int = 0


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    wrapped: bool,
    loss_on: str | None = None,
    option: str = "--data",
) -> Dataset:
    """Turn the rows of `load_data` into input_ids, labels (both int32) and row, the index in `rows`.

    A text row is its tokens and the end of sequence, all of them targets. Of the others the targets are, with
    `loss_on` "completions", the completion or what the assistant says; with "all", every token; with None,
    the completion of prompt and completion, and all of messages. Rows are cut to `length` tokens unless they
    will be `wrapped` into windows without loss. Rows left without a target are left out; both are said on
    stderr. Raises InputError if none is left.
    """
    import pyarrow

    if CHAT in rows.column_names and not tokenizer.chat_template:
        raise InputError(
            f"{option}: {rows[0]['place']} has messages, but the tokenizer has no chat template: use "
            "an instruct model, "
            "whose tokenizer has one, or rows of text, or of prompt and completion strings"
        )
    if loss_on == COMPLETIONS and data_kind(rows) == "text":
        raise InputError(
            f"--loss-on completions: {option} has rows of text, which have none: give rows of prompt "
            "and completion, or of messages"
        )
    counts = _Counts()
    integers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", integers), ("labels", integers), ("row", pyarrow.int64())])
    # Windows are cut after the texts are joined, so a long text loses nothing there.
    limit = None if wrapped and data_kind(rows) == "text" else length
    tokens = write_table(_fitting(_tokenized(rows, tokenizer, loss_on), limit, counts), schema)
    if not len(tokens):
        raise InputError(_nothing_left(option, counts, length))
    if counts.cut or counts.without_target or counts.blank:
        print(_losses(option, counts, length), file=sys.stderr)
    return tokens


def render(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    answer: bool = False,
) -> str:
    """What the chat template writes for `messages` of a row, with the row's tools; with `answer`, up to where
    the answer begins."""
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        messages,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        tokenize=False,
        add_generation_prompt=answer,
        **row.get("chat_template_kwargs") or {},
    )


def _tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase, loss_on: str | None) -> Iterator[_Example]:
    """The tokens of each row."""
    from datasets.utils import tqdm

    with tqdm(total=len(rows), desc="Tokenizing", unit="row", disable=None) as bar:
        for batch in rows.iter(_BATCH):
            size = len(batch["place"])
            records = [{name: column[i] for name, column in batch.items()} for i in range(size)]
            if "text" in batch:
                yield from (_whole(_ended(ids, tokenizer)) for ids in tokenizer(batch["text"])["input_ids"])
            else:
                yield from (_example(record, tokenizer, loss_on) for record in records)
            bar.update(size)


def _example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, loss_on: str | None) -> _Example:
    row = decode_row(record)
    if CHAT not in record:
        ids = _ended(tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer)
        return (
            _whole(ids)
            if loss_on == ALL
            else _Example(ids, [(_common_start(tokenizer(row["prompt"])["input_ids"], ids), len(ids))])
        )
    try:
        return _chat(row, record["place"], tokenizer, loss_on)
    except InputError:
        raise
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"{record['place']}: the chat template does not take this row ({type(error).__name__}: {error}): "
            "change the roles or contents of its messages, or leave the row out"
        ) from error


def _chat(
    row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase, loss_on: str | None
) -> _Example:
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    text = render(row, tokenizer, messages)
    ids = _plain_ids(text, tokenizer)
    if loss_on == ALL or (loss_on is None and "messages" in row):
        return _whole(ids)
    if "prompt" in row:
        return _Example(
            ids,
            [
                (
                    _common_start(
                        _plain_ids(render(row, tokenizer, row["prompt"], answer=True), tokenizer), ids
                    ),
                    len(ids),
                )
            ],
        )
    spans = []
    for index in (i for i, turn in enumerate(messages) if turn["role"] == "assistant"):
        before, after = (
            render(row, tokenizer, messages[:index], answer=True) if index else "",
            render(row, tokenizer, messages[: index + 1]),
        )
        if not text.startswith(before) or not text.startswith(after):
            raise InputError(
                f"{place}: the chat template writes turn {index + 1} otherwise once others follow, so "
                "what to learn of it is not clear: "
                "use --loss-on all, or rows of prompt and completion with one answer each"
            )
        spans.append(
            (
                _common_start(_plain_ids(before, tokenizer), ids),
                _common_start(_plain_ids(after, tokenizer), ids),
            )
        )
    return _Example(ids, spans)


def _whole(ids: list[int]) -> _Example:
    return _Example(ids, [(0, len(ids))])


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a rendered chat, which holds its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _common_start(left: list[int], right: list[int]) -> int:
    """How many tokens both begin with: a completion begins where the tokens of prompt and whole part, be it
    within the prompt."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _fitting(examples: Iterator[_Example], limit: int | None, counts: _Counts) -> Iterator[dict[str, Any]]:
    """Rows cut to `limit` tokens; those without a target left out."""
    for row, example in enumerate(examples):
        labels = example.labels()
        counts.rows += 1
        counts.longest = max(counts.longest, len(labels))
        used = labels[:limit]
        # The first token of a sequence is predicted from nothing.
        if any(label != IGNORED for label in used[1:]):
            counts.cut += len(used) < len(labels)
            yield {"input_ids": example.ids[:limit], "labels": used, "row": row}
        elif any(label != IGNORED for label in labels[1:]):
            counts.without_target += 1
        else:
            counts.blank += 1


def _losses(option: str, counts: _Counts, length: int) -> str:
    said = []
    if counts.cut:
        said.append(f"{counts.cut} cut to --seq-length {length}")
    if counts.without_target:
        said.append(
            f"{counts.without_target} left out, as nothing to learn was left of them within "
            f"--seq-length {length}"
        )
    if counts.blank:
        said.append(f"{counts.blank} left out, as they are blank or have no answer")
    longer = (
        f". The longest has {counts.longest} tokens: raise --seq-length, or shorten or split the rows"
        if counts.longest > length
        else ""
    )
    return f"{option}: of {counts.rows} rows {', '.join(said)}{longer}."


def _nothing_left(option: str, counts: _Counts, length: int) -> str:
    if counts.blank == counts.rows:
        return (
            f"{option}: all of its {counts.rows} rows are blank or have no answer, so there is nothing to "
            "learn: give rows with text"
        )
    blank = f", {counts.blank} are blank or have no answer" if counts.blank else ""
    return (
        f"{option}: none of its {counts.rows} rows has a token to learn within --seq-length {length} "
        "(the longest has "
        f"{counts.longest} tokens{blank}): raise --seq-length, or shorten the prompts"
    )
