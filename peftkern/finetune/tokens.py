"""Rows as token ids and labels, cut to the window; what is cut or left out is counted and said."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    option: str = "--data",
) -> Dataset:
    """Turn the rows of `load_data` into input_ids, labels (both int32) and row, the index in `rows`.

    A text row is its tokens and the end of sequence, all of them targets; of prompt and completion, the completion's tokens
    are; of messages, all that the chat template writes. Rows are cut to `length` tokens unless they will be `wrapped` into
    windows without loss. Rows left without a target are left out; both are said on stderr. Raises InputError if none is left.
    """
    import pyarrow

    if CHAT in rows.column_names and not tokenizer.chat_template:
        raise InputError(
            f"{option}: {rows[0]['place']} has messages, but the tokenizer has no chat template: use an instruct model, "
            "whose tokenizer has one, or rows of text, or of prompt and completion strings"
        )
    counts = _Counts()
    integers = pyarrow.list_(pyarrow.int32())
    schema = pyarrow.schema([("input_ids", integers), ("labels", integers), ("row", pyarrow.int64())])
    # Windows are cut after the texts are joined, so a long text loses nothing there.
    limit = None if wrapped and data_kind(rows) == "text" else length
    tokens = write_table(_fitting(_tokenized(rows, tokenizer), limit, counts), schema)
    if not len(tokens):
        raise InputError(_nothing_left(option, counts, length))
    if counts.cut or counts.without_target or counts.blank:
        print(_losses(option, counts, length), file=sys.stderr)
    return tokens


def render(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, answer: bool = False) -> str:
    """What the chat template writes for `messages` of a row, with the row's tools; with `answer`, up to where the answer begins."""
    tools = row.get("tools")
    return tokenizer.apply_chat_template(
        messages,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        tokenize=False,
        add_generation_prompt=answer,
        **row.get("chat_template_kwargs") or {},
    )


def _tokenized(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
    """For each row its token ids and the index of its first target."""
    from datasets.utils import tqdm

    with tqdm(total=len(rows), desc="Tokenizing", unit="row", disable=None) as bar:
        for batch in rows.iter(_BATCH):
            size = len(batch["place"])
            records = [{name: column[i] for name, column in batch.items()} for i in range(size)]
            if "text" in batch:
                yield from ((_ended(ids, tokenizer), 0) for ids in tokenizer(batch["text"])["input_ids"])
            else:
                yield from (_example(record, tokenizer) for record in records)
            bar.update(size)


def _example(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    row = decode_row(record)
    if CHAT not in record:
        ids = _ended(tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer)
        return ids, _common_start(tokenizer(row["prompt"])["input_ids"], ids)
    try:
        if "messages" in row:
            return _plain_ids(render(row, tokenizer, row["messages"]), tokenizer), 0
        ids = _plain_ids(render(row, tokenizer, row["prompt"] + row["completion"]), tokenizer)
        return ids, _common_start(_plain_ids(render(row, tokenizer, row["prompt"], answer=True), tokenizer), ids)
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"{record['place']}: the chat template does not take this row ({type(error).__name__}: {error}): "
            "change the roles or contents of its messages, or leave the row out"
        ) from error


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a rendered chat, which holds its special tokens already."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _common_start(left: list[int], right: list[int]) -> int:
    """How many tokens both begin with: a completion begins where the tokens of prompt and whole part, be it within the prompt."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _fitting(examples: Iterator[tuple[list[int], int]], limit: int | None, counts: _Counts) -> Iterator[dict[str, Any]]:
    """Rows cut to `limit` tokens; those without a target left out."""
    for row, (ids, start) in enumerate(examples):
        counts.rows += 1
        counts.longest = max(counts.longest, len(ids))
        used = ids[:limit]
        # The first token of a sequence is predicted from nothing.
        first = max(start, 1)
        if first < len(used):
            counts.cut += len(used) < len(ids)
            yield {"input_ids": used, "labels": [IGNORED] * start + used[start:], "row": row}
        elif first < len(ids):
            counts.without_target += 1
        else:
            counts.blank += 1


def _losses(option: str, counts: _Counts, length: int) -> str:
    said = []
    if counts.cut:
        said.append(f"{counts.cut} cut to --seq-length {length}")
    if counts.without_target:
        said.append(f"{counts.without_target} left out, as nothing to learn was left of them within --seq-length {length}")
    if counts.blank:
        said.append(f"{counts.blank} left out, as they are blank")
    longer = (
        f". The longest has {counts.longest} tokens: raise --seq-length, or shorten or split the rows" if counts.longest > length else ""
    )
    return f"{option}: of {counts.rows} rows {', '.join(said)}{longer}."


def _nothing_left(option: str, counts: _Counts, length: int) -> str:
    if counts.blank == counts.rows:
        return f"{option}: all of its {counts.rows} rows are blank, so there is nothing to learn: give rows with text"
    blank = f", {counts.blank} are blank" if counts.blank else ""
    return (
        f"{option}: none of its {counts.rows} rows has a token to learn within --seq-length {length} (the longest has "
        f"{counts.longest} tokens{blank}): raise --seq-length, or shorten the prompts"
    )
