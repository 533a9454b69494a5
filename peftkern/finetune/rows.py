"""The forms of a row of data: checked on the way in, kept as text, and given back as it was written."""

from __future__ import annotations

import json
from typing import Any

from .errors import InputError

__all__ = [
    "CHAT",
    "COLUMNS",
    "FORMS_TEXT",
    "check_row",
    "decode_row",
    "encode_row",
    "form_of",
    "without_nulls",
]

_FORMS = (("text",), ("prompt", "completion"), ("messages",))
# What a chat template takes beside the messages.
_TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
COLUMNS = ("text", "prompt", "completion", "messages", *_TEMPLATE_KEYS)
FORMS_TEXT = (
    '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
)
# The column of a chat. Arrow's structs would give every message the keys of all others, so a chat is kept as
# its JSON.
CHAT = "chat"


def form_of(row: Any, place: str) -> tuple[str, ...]:
    """Which of the three forms a row has; raises InputError for none or several."""
    if not isinstance(row, dict):
        raise InputError(
            f"{place}: a row must be a JSON object such as {FORMS_TEXT}, got {type(row).__name__}"
        )
    matching = [form for form in _FORMS if all(key in row for key in form)]
    if len(matching) != 1:
        keys = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{place}: a row must have the keys of exactly one of {FORMS_TEXT}; got the keys {keys}"
        )
    return matching[0]


def check_row(row: Any, place: str) -> tuple[str, ...]:
    """The form of a row whose values have the types that the form asks for; raises InputError that names
    `place`."""
    form = form_of(row, place)
    for key in form:
        value = row[key]
        good = (
            _is_messages(value)
            if key == "messages"
            else isinstance(value, str) or (key != "text" and _is_messages(value))
        )
        if not good:
            wanted = 'a list of {"role": ..., "content": ...}' if key == "messages" else "a string"
            raise InputError(f"{place}: {key!r} must be {wanted}, got {json.dumps(value)[:60]}")
    if len({type(row[key]) for key in form}) > 1:
        raise InputError(
            f"{place}: 'prompt' and 'completion' must both be strings or both be lists of messages"
        )
    for key in form:
        for turn in row[key] if isinstance(row[key], list) else ():
            _check_content(turn.get("content"), place)
    return form


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_turn, value))


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and ("content" in turn or "tool_calls" in turn)
    )


def _check_content(content: Any, place: str) -> None:
    """Content is a string, null beside tool calls, or a list of parts with text."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InputError(
            f"{place}: 'content' must be a string or a list of parts, got {json.dumps(content)[:60]}"
        )
    for part in content:
        if not isinstance(part.get("text"), str):
            raise InputError(
                f"{place}: 'content' has a part that is no text: {json.dumps(part)[:60]}; the recipe "
                "trains on text only, so "
                'every part must be {"type": "text", "text": ...}'
            )


def encode_row(row: dict[str, Any], form: tuple[str, ...], place: str) -> dict[str, str]:
    """The columns that keep a row: its strings, or for a chat one JSON text; other keys are dropped."""
    if isinstance(row[form[0]], str):
        columns = {key: row[key] for key in form}
    else:
        kept = {key: row[key] for key in (*form, *_TEMPLATE_KEYS) if row.get(key) is not None}
        columns = {CHAT: json.dumps(kept, ensure_ascii=False)}
    for value in columns.values():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode_escape").decode()
            raise InputError(
                f"{place}: {half} is half a surrogate pair (an emoji cut in two, as slicing in "
                "JavaScript does) and no "
                "character: mend or remove it"
            ) from None
    return columns


def decode_row(columns: dict[str, Any]) -> dict[str, Any]:
    """The row that `encode_row` kept."""
    return (
        json.loads(columns[CHAT])
        if CHAT in columns
        else {key: columns[key] for key in COLUMNS if key in columns}
    )


def without_nulls(value: Any) -> Any:
    """A row read from a columnar file, without the keys that the file fills in as null for messages that lack
    them."""
    if isinstance(value, dict):
        return {
            key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
