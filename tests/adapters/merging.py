"""Models with adapters of every kind that can be merged, and their bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftkern.merging import Branch
from peftkern.patching.detect import is_lora
from peftkern.patching.merged import branches_of, install_merge
from tests.patching import models

PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": PATTERNS,
    "rslora with patterns": {"use_rslora": True} | PATTERNS,
    "bias": {"lora_bias": True},
}


def adapted(
    kind: str = "lora",
    *,
    four_bit: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """A PEFT model in evaluation whose every projection has an adapter of that kind, none of it zero."""
    bias = kind == "bias"
    lora = KINDS[kind]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if bias else "all-linear"
    base = models.llama(dtype, four_bit=four_bit, bias=bias, **options)
    model = models.lora(base, **{"target_modules": targets} | lora)
    fill(model)
    return model.eval()


def fill(model: nn.Module, *, size: float = 0.3) -> None:
    """Give what starts at zero, or at the base's norm, values of its own."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if "magnitude" in name:
            parameter.data *= 1 + 0.05 * noise
        elif "lora_B" in name or "embedding_A" in name:
            parameter.data = (0.1 * size * noise).to(parameter.dtype)


def add(model: nn.Module, name: str, **options: Any) -> None:
    """One more adapter."""
    torch.manual_seed(5)
    model.add_adapter(name, models.config(**options))
    fill(model)
    model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every byte that a checkpoint would have, 4-bit ones with their absmax."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for name, value in before.items():
        assert now[name].dtype == value.dtype and torch.equal(_bits(now[name]), _bits(value)), name


def _bits(value: Tensor) -> Tensor:
    """4-bit codes stored as floats may read as NaN."""
    return value.contiguous().view(-1).view(torch.uint8)


def logits(model: nn.Module, ids: Tensor = models.IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_lora(module)}


def defined(base: Tensor, branches: list[Branch]) -> Tensor:
    """The merged weight by its definition, fp64."""
    base = base.double()
    total = base.clone()
    for branch in branches:
        delta = branch.up.double() @ branch.down.double()
        total += delta
        if branch.magnitude is not None:
            total *= (branch.magnitude.double() / (base + delta).norm(dim=1))[:, None]
    return total


def install(model: nn.Module) -> nn.Module:
    """Our merge on its LoRA layers, whatever `patch` can do with their forwards."""
    assert all(install_merge(layer) for layer in layers(model).values())
    return model


def branches(layer: nn.Module, names: tuple[str, ...] = ("default",)) -> list[Branch]:
    return branches_of(layer, names)
