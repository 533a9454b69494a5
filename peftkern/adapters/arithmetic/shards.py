"""Checkpoints of safetensors shards, read and written in pieces of a few megabytes.

`safetensors` writes a shard from tensors that are all in memory, and maps what it reads, so that resident
memory is not bounded by what one asks for. Here tensors are read into buffers and written to their place in a
file whose header is known beforehand.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "Checkpoint", "Entry", "ShardWriter", "layout", "open_checkpoint"]

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    },
}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor in a shard: its file, safetensors' name of its dtype, its shape, and its bytes' place in the
    file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint's folder by name, in the order of its shards."""

    name: str
    folder: Path
    entries: Mapping[str, Entry]

    def read(self, tensor: str, start: int = 0, count: int | None = None) -> Tensor:
        """The elements start, ..., start + count - 1 of a tensor, flat, in its dtype; only they are read."""
        entry = self.entries[tensor]
        count = entry.numel - start if count is None else count
        if not count:
            return torch.empty(0, dtype=DTYPES[entry.dtype])
        buffer = bytearray(count * entry.itemsize)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * entry.itemsize)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                got = file.readinto(view[done:])
                if not got:
                    raise OSError(f"{entry.file}: it ends within {tensor}; download or copy this shard again")
                done += got
        return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype])

    def config(self) -> dict[str, Any]:
        """Its config.json; empty without one."""
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): download or copy it again") from None

    def identity(self) -> list[list[Any]]:
        """What tells it from another or a changed one: its shards' names, sizes and times."""
        files = sorted({entry.file for entry in self.entries.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def open_checkpoint(folder: str | Path, name: str | None = None) -> Checkpoint:
    """The checkpoint in a folder with model.safetensors, or with shards and their index; only the headers are
    read.

    Raises: ValueError where a shard is missing, cut or damaged, there is no checkpoint, or it is none of
        safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: there is no such folder")
    entries: dict[str, Entry] = {}
    for file, listed in _files(folder).items():
        own = _header(file)
        lacking = [tensor for tensor in listed if tensor not in own]
        if lacking:
            raise ValueError(
                f"checkpoint {folder}: {file.name} lacks {lacking[0]}, which {_INDEX} says it holds; download"
                " the shard again"
            )
        entries |= {tensor: own[tensor] for tensor in listed or own}
    return Checkpoint(name or folder.name, folder, entries)


def _files(folder: Path) -> dict[Path, list[str]]:
    """The shards, and for each the tensors that the index says it holds; an empty list for all that it
    holds."""
    if (folder / _INDEX).is_file():
        try:
            places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {folder}: its {_INDEX} is damaged ({error!r}); download it again"
            ) from None
        files: dict[Path, list[str]] = {}
        for tensor, file in places.items():
            files.setdefault(folder / Path(file).name, []).append(tensor)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"checkpoint {folder}: {len(missing)} of {len(files)} shards are missing:"
                f" {', '.join(missing)}; download them again"
            )
        return files
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: []}
    others = sorted(
        path.name for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in folder.glob(pattern)
    )
    hint = (
        f"it holds {others[0]}; save it anew with save_pretrained"
        if others
        else "give a folder that save_pretrained wrote"
    )
    raise ValueError(f"checkpoint {folder}: it has neither {_SINGLE} nor {_INDEX}; {hint}")


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as content:
        length = struct.unpack("<Q", content.read(8))[0] if size >= 8 else size
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{file}: cut, or no safetensors file; download or copy it again")
        try:
            header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            places = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}: its header is garbled ({error!r}); download or copy it again"
            ) from None
    end = max((end for *_, end in places.values()), default=0)
    if end != size - 8 - length:
        raise ValueError(
            f"{file}: cut or padded ({size} bytes, {end + 8 + length} expected); download or copy it again",
        )
    unknown = {dtype for dtype, *_ in places.values()} - set(DTYPES)
    if unknown:
        raise ValueError(
            f"{file}: it holds tensors of dtype {', '.join(sorted(unknown))}, which cannot be combined",
        )
    ordered = sorted(places.items(), key=lambda item: item[1][2])
    return {name: Entry(file, dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in ordered}


def layout(entries: Mapping[str, Entry], dtype: str | None) -> dict[str, dict[str, Entry]]:
    """For every output file, by name, its tensors: as `entries` has them, their floats in another dtype where
    one is given."""
    files: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        kind = dtype if dtype and entry.is_float else entry.dtype
        files.setdefault(entry.file.name, {})[name] = Entry(Path(entry.file.name), kind, entry.shape, 0)
    return files


class ShardWriter:
    """One shard of known tensors, whose elements are written in any order and in any pieces."""

    def __init__(self, path: Path, tensors: Mapping[str, Entry]) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        self.header, self.size = self._plan(tensors)
        self.tensors = tensors

    def _plan(self, tensors: Mapping[str, Entry]) -> tuple[bytes, int]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, entry in sorted(
            tensors.items(), key=lambda item: -item[1].itemsize
        ):  # wide ones first: each is then aligned
            end = position + entry.nbytes
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
            self.offsets[name], position = position, end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.offsets = {name: start + 8 + len(encoded) for name, start in self.offsets.items()}
        return struct.pack("<Q", len(encoded)) + encoded, 8 + len(encoded) + position

    def create(self) -> None:
        """Write the header and take the whole file's space, so that a full disk shows now; OSError where
        there is none."""
        with self.path.open("wb") as file:
            file.write(self.header)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            file.truncate(self.size)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put flat values, of the tensor's dtype, to its elements start, start + 1, ..."""
        entry = self.tensors[name]
        raw = (
            values.detach().cpu().contiguous().view(torch.uint8)
            if values.numel()
            else torch.empty(
                0,
                dtype=torch.uint8,
            )
        )
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.offsets[name] + start * entry.itemsize)
            view = memoryview(raw.numpy())
            while view:
                view = view[file.write(view) :]

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


def pieces_of(numel: int, piece: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the pieces of a tensor's elements."""
    for start in range(0, numel, piece):
        yield start, min(piece, numel - start)
