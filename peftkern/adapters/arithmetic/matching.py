"""Whether two full checkpoints can be combined: the same tensors, of the same shapes and kinds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .shards import Checkpoint, Entry, pieces_of

__all__ = ["PIECE", "require_same_tensors", "tied_twice"]

# Elements of a tensor in memory at a time: 4 MiB of fp32 for each checkpoint, which caches hold.
PIECE = 1 << 20
_HEADS, _EMBEDDINGS = (
    ("lm_head.weight", "embed_out.weight"),
    ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"),
)


def tied_twice(checkpoint: Checkpoint) -> str | None:
    """A head that is the embedding, saved a second time; None without one."""
    entries = checkpoint.entries
    config = checkpoint.config()
    if not (
        config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings")
    ):
        return None
    head = next((name for name in entries if name.endswith(_HEADS)), None)
    embedding = next((name for name in entries if name.endswith(_EMBEDDINGS)), None)
    if (
        head is None
        or embedding is None
        or entries[head].shape != entries[embedding].shape
        or entries[head].dtype != entries[embedding].dtype
    ):
        return None
    same = all(
        torch.equal(checkpoint.read(head, start, count), checkpoint.read(embedding, start, count))
        for start, count in pieces_of(entries[head].numel, PIECE)
    )
    return head if same else None


def require_same_tensors(base: Checkpoint, other: Checkpoint, entries: Mapping[str, Entry]) -> None:
    """Raise ValueError where a checkpoint has not the base's tensors, naming the first that differs."""
    place = f"checkpoint {other.name} ({other.folder})"
    lacking = [name for name in entries if name not in other.entries]
    beyond = [name for name in other.entries if name not in base.entries and name != tied_twice(other)]
    for names, what in ((lacking, "lacks"), (beyond, "has beside the base's tensors")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{place} {what} {names[0]}{more}: it was not trained from the base {base.folder}, or is no"
                " full checkpoint"
            )
    for name, entry in entries.items():
        got = other.entries[name]
        if got.shape != entry.shape:
            words = ""
            if name.endswith((*_HEADS, *_EMBEDDINGS)) and got.shape[1:] == entry.shape[1:]:
                words = (
                    f" (vocabularies of {got.shape[0]} and {entry.shape[0]}: resize one with"
                    " resize_token_embeddings and save it anew)"
                )
            raise ValueError(f"{place}: {name} has shape {got.shape}, the base's has {entry.shape}{words}")
        if entry.is_float != got.is_float:
            raise ValueError(
                f"{place}: {name} is {got.dtype}, the base's is {entry.dtype}: a quantized checkpoint has to"
                " be dequantized first"
            )
        if not entry.is_float and not _equal(base, other, name):
            kind = (
                "quantized weights have to be dequantized first"
                if entry.dtype in ("U8", "I8")
                else "integers are not combined"
            )
            raise ValueError(f"{place}: {name} ({entry.dtype}) differs from the base's; {kind}")


def _equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    if one.entries[name].dtype != other.entries[name].dtype:
        return False
    pieces = pieces_of(one.entries[name].numel, PIECE)
    return all(torch.equal(one.read(name, *piece), other.read(name, *piece)) for piece in pieces)
