"""The 16-bit weights that a 4-bit base was quantized from, read rows at a time from safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..merging.slabs import Rows

__all__ = ["Originals"]


class Originals:
    """Weights by the names that transformers gives them; nothing is read before its rows are asked for.

    source: a folder that `save_pretrained` wrote (safetensors, with an index or without), or a mapping of
        names to tensors.
    Raises ValueError where the folder holds no such files, or a shard that its index names is missing.
    """

    def __init__(self, source: str | Path | Mapping[str, Tensor]) -> None:
        self._tensors = source if isinstance(source, Mapping) else None
        self._files = {} if isinstance(source, Mapping) else _files(Path(source))
        self._handles: dict[Path, Any] = {}
        self.source = "the mapping" if isinstance(source, Mapping) else str(source)

    def rows(
        self,
        name: str,
        shape: tuple[int, int],
        device: torch.device,
        *,
        transposed: bool = False,
    ) -> Rows:
        """What gives rows of the weight of the module `name`, of `shape` [N, K], as fp32 on `device`.

        Raises ValueError where no tensor, or more than one, fits the name, or it has another shape.
        """
        key = self._key(f"{name}.weight")
        part = self._part(key)
        stored = tuple(part.shape if self._tensors is not None else part.get_shape())
        if stored != (shape[::-1] if transposed else shape):
            raise ValueError(
                f"original: {key} of {self.source} is {stored}, the layer {name} is {shape}; "
                "give the model that the 4-bit base was quantized from"
            )

        def rows(start: int, stop: int) -> Tensor:
            taken = part[:, start:stop].t() if transposed else part[start:stop]
            return taken.to(device=device, dtype=torch.float32)

        return rows

    def _part(self, key: str) -> Any:
        if self._tensors is not None:
            return self._tensors[key]
        from safetensors import safe_open

        path = self._files[key]
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt")
        return self._handles[path].get_slice(key)

    def _key(self, wanted: str) -> str:
        """The stored name: the same, or the one that differs by a prefix."""
        names = self._files if self._tensors is None else self._tensors
        if wanted in names:
            return wanted
        fitting = [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
        if len(fitting) == 1:
            return fitting[0]
        problem = f"has {len(fitting)} tensors that could be" if fitting else "has no"
        raise ValueError(
            f"original: {self.source} {problem} {wanted}; give the folder of the model that the 4-bit base "
            "was quantized from, or merge into the dequantized base"
        )


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _index(index)
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            lacks = f"{folder} lacks {', '.join(missing)}, which {index.name} names"
            raise ValueError(f"original: {lacks}; download it again")
        return {name: folder / file for name, file in names.items()}
    from safetensors import SafetensorError, safe_open

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"original: {path} is damaged ({error}); download it again") from None
    if not found:
        raise ValueError(f"original: {folder} holds no .safetensors file; give a model's folder")
    return found


def _index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"original: {path} is damaged ({error}); download it again") from None
    return dict(names)
