"""The weights of a safetensors folder, read in slices: no more of them is in memory than is asked for.

A slice is read by `pread` into one buffer that the next slice uses again. Mapping the files, as
`safetensors.safe_open` does, would leave their pages resident until the end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SLICE", "StoredTensor", "StoredWeights", "WeightsError"]

SLICE = 64 * 256 * 64  # elements: a multiple of a nested block of absmax, 256 blocks of 64; 2 MiB as bf16
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AGAIN = "download or copy this file again"
_DTYPES = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U8": "uint8",
        "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
    }.items()
}


class WeightsError(ValueError):
    """A file of weights that is missing, cut or garbled; the message names the file and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a file: its open `descriptor`, and the `offset` in bytes from its beginning."""

    name: str
    path: Path
    descriptor: int
    kind: str  # as safetensors spells a dtype: "BF16"
    shape: tuple[int, ...]
    offset: int
    read_bytes: Callable[[int], None]
    keep_cache: bool

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.kind]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def slices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first element, flat slice in the stored dtype); all but the last of `SLICE`
        elements.

        A slice is valid until the next one is asked for. Raises WeightsError where the file ends early.
        """
        size = self.dtype.itemsize
        staging = torch.empty(min(SLICE, self.numel) * size, dtype=torch.uint8)
        for start in range(0, self.numel, SLICE):
            count = min(SLICE, self.numel - start)
            raw = staging[: count * size]
            self._fill(raw, self.offset + start * size)
            yield start, raw.view(self.dtype)
            self.read_bytes(count * size)
        if not self.keep_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)

    def dense(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor as `dtype` (default: as stored) on a device; beside it there is one slice."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        flat = out.view(-1)
        for start, part in self.slices():
            flat[start : start + part.numel()].copy_(part)
        return out

    def _fill(self, raw: Tensor, offset: int) -> None:
        view, done = memoryview(raw.numpy()), 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise WeightsError(f"{self.path}: {self.name} cannot be read ({error}): {_AGAIN}") from error
            if not count:
                raise WeightsError(f"{self.path}: ends within {self.name}: {_AGAIN}")
            done += count


class StoredWeights:
    """All tensors of a folder's safetensors files, as a context that closes the files.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        keep_cache: leave what was read in the page cache, for the next run to find; otherwise it is dropped.
        on_read: called with the number of bytes after each slice.
    Raises: WeightsError where a file is missing, cut or garbled, before anything is loaded.
    """

    def __init__(
        self, folder: Path, *, keep_cache: bool = False, on_read: Callable[[int], None] = lambda count: None
    ) -> None:
        self._keep_cache, self._on_read = keep_cache, on_read
        self._descriptors: list[int] = []
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for path, names in _shards(folder).items():
                self._open(path, names)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the tensors can no longer be read."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _open(self, path: Path, names: set[str]) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(
                f"{path}: cannot be opened ({error.strerror}): download or copy the model again, with all "
                "its shards"
            ) from error
        self._descriptors.append(descriptor)
        entries, first = _header(path, descriptor)
        missing = sorted(names - set(entries))
        if missing:
            raise WeightsError(f"{path}: lacks {missing[0]}, which {_INDEX} says it holds: {_AGAIN}")
        for name, (kind, shape, begin) in entries.items():
            self.tensors[name] = StoredTensor(
                name, path, descriptor, kind, shape, first + begin, self._read, self._keep_cache
            )

    def _read(self, count: int) -> None:
        self._on_read(count)


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files of a folder, and the names that its index says each holds."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).exists():
            raise WeightsError(
                f"{folder}: has neither {_SINGLE} nor {_INDEX}: save the model with save_pretrained, "
                "or convert its weights to safetensors"
            )
        return {folder / _SINGLE: set()}
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found: dict[Path, set[str]] = {}
        for name, file in homes.items():
            found.setdefault(folder / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: is no index of shards ({error!r}): {_AGAIN}") from error
    missing = sorted(path for path in found if not path.is_file())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise WeightsError(
            f"{missing[0]}{more}: is missing, {_INDEX} names it: download or copy it beside the other "
            f"{len(found) - len(missing)} of {len(found)} shards"
        )
    return found


def _header(path: Path, descriptor: int) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Name -> (dtype, shape, first byte) of a file's tensors, and where its data begin."""
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise WeightsError(f"{path}: {'cut' if size else 'empty'}: {_AGAIN}")
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > size - 8:
        raise WeightsError(
            f"{path}: cut, or no safetensors file (its header is longer than the file): {_AGAIN}"
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise WeightsError(f"{path}: its header is garbled ({error}): {_AGAIN}") from error
    end = 8 + length + max((stop for *_, stop in entries.values()), default=0)
    if end != size:
        raise WeightsError(f"{path}: cut or padded ({size} bytes, {end} expected): {_AGAIN}")
    return {name: entry[:3] for name, entry in entries.items()}, 8 + length


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"dtype {kind} is not known")
    if end - begin != torch.Size(shape).numel() * _DTYPES[kind].itemsize:
        raise ValueError(f"{shape} of {kind} are not the {end - begin} bytes it has")
    return kind, shape, begin, end
