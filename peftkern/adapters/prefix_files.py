"""A prefix's files: PEFT's own, and for a gated one, which PEFT does not know, the same with the gate and
under names that PEFT refuses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import atomic_files

__all__ = ["WEIGHTS", "gate_in", "mark_gated", "read_gated"]

WEIGHTS = "adapter_model.safetensors"
_EMBEDDINGS, _GATE = "gated_prompt_embeddings", "prompt_gate"


def mark_gated(folder: Path, gate: Tensor) -> None:
    """Add the gate to what PEFT has saved in `folder`, whose embeddings get another name: PEFT then fails to
    load them (KeyError 'prompt_embeddings') instead of taking them for a prefix without a gate."""
    from safetensors.torch import load_file, save_file

    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: a gated prefix is saved as safetensors alone")
    tensors = load_file(folder / WEIGHTS)
    with atomic_files(folder) as temporary:
        gated = {_EMBEDDINGS: tensors["prompt_embeddings"], _GATE: gate.detach().cpu().contiguous()}
        save_file(gated, temporary / WEIGHTS, metadata={"format": "pt"})


def gate_in(folder: str | Path) -> bool:
    """Whether `folder` holds a gated prefix."""
    from safetensors import safe_open

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return _GATE in file.keys()  # noqa: SIM118


@torch.no_grad()
def read_gated(folder: str | Path, encoder: nn.Module) -> None:
    """Give a gated prefix the values that `folder` holds; ValueError where their shapes are others."""
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / WEIGHTS)
    for name, parameter in ((_EMBEDDINGS, encoder.embedding.weight), (_GATE, encoder.gate)):
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{folder}: {name} is {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}:"
                " another base?"
            )
        parameter.copy_(tensors[name])
