"""Layer-wise learning rates, by the total ratio between top and bottom, times LoRA+, as parameter groups of
any torch optimizer.

The rate of depth d is lr * ratio^(-(top - d) / (top - bottom)), where bottom and top are the smallest and
largest depth of a trainable
parameter: the ratio of the largest to the smallest rate is `layer_ratio`, however many layers there are.
ULMFiT's 2.6 a layer was for 4 groups, a total of 17.6; kept as a factor a layer it would freeze the bottom of
a model of 32 layers (2.6^-31 = 1.4e-13).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .depth import parameter_depths

__all__ = ["LORA_PLUS_KINDS", "Rates", "check_groups", "parameter_kind", "rates_table"]

# What LoRA+ may multiply the rate of. The paper speaks of B; PEFT's create_loraplus_optimizer multiplies
# every vector as well.
LORA_PLUS_KINDS = ("B", "magnitude", "bias")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast each parameter may move.

    layer_ratio   rate of the top over that of the bottom, 1 or more: 17.6 (ULMFiT), 100 (fastai); 1: the same
    for all. lora_plus     factor on the rates of `lora_plus_on`: about 16 in LoRA+ (Hayou et al., 2024,
    arXiv:2402.12354); 1: none. lora_plus_on  of "B" (lora_B and lora_embedding_B), "magnitude" (DoRA's) and
    "bias" (every trained bias, lora_B's included). A, norms
                  and whole weights are never multiplied.

    >>> model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)])
    >>> [round(group["lr"] / 2.6**3, 4) for group in Rates(layer_ratio=2.6**3).groups(model, lr=2.6**3)]
    [1.0, 0.3846, 0.1479, 0.0569]
    """

    layer_ratio: float = 1.0
    lora_plus: float = 1.0
    lora_plus_on: Sequence[str] = ("B",)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.layer_ratio) and self.layer_ratio >= 1):
            raise ValueError(
                f"layer_ratio: got {self.layer_ratio}, expected 1 or more: the rate of the top over that of"
                " the bottom"
            )
        if not (math.isfinite(self.lora_plus) and self.lora_plus > 0):
            raise ValueError(f"lora_plus: got {self.lora_plus}, expected a positive number, such as 16")
        unknown = [kind for kind in self.lora_plus_on if kind not in LORA_PLUS_KINDS]
        if unknown or not self.lora_plus_on:
            raise ValueError(
                f"lora_plus_on: got {tuple(self.lora_plus_on)}, expected some of {LORA_PLUS_KINDS}",
            )

    def factor(self, depth: int, lowest: int, highest: int) -> float:
        """The rate at a depth over the rate at the `highest`."""
        return 1.0 if highest == lowest else self.layer_ratio ** (-(highest - depth) / (highest - lowest))

    def groups(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        decays: Container[str] | None = None,
        layers: str | Sequence[str] | None = None,
        depths: Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups of every trainable parameter of the model, top first, for torch.optim and the
        optimizers made like it.

        Each group has params, lr, weight_decay, depth, kind ("base", or "lora_plus" where the rate is
        multiplied) and a name. The order and the parameters' order depend on the model alone, so that a
        stored optimizer state fits the groups of another process. The value of weight_decay is the same in
        all groups that decay; AdamW multiplies it by the group's rate, as it does for any rate.

        Args:
            lr: the rate at the top.
            decays: names of the parameters that weight decay applies to; None: those of two or more
                dimensions.
            layers: the containers of the layers, where `depth.layer_stacks` would take others.
            depths: the depth of each parameter by name, instead of `depth.parameter_depths`.
        Raises: ValueError where nothing is trainable, the layers are not found, `depths` leaves a trainable
            parameter out, or there is nothing that `lora_plus` could multiply.
        """
        trainable = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        if not trainable:
            raise ValueError(f"model: no parameter of {type(model).__name__} is trainable (requires_grad)")
        depths = self._depths(model, trainable, layers, depths)
        lowest, highest = (bound(depths[name] for name in trainable) for bound in (min, max))
        fast = {name for name, parameter in trainable.items() if self._is_fast(name, parameter)}
        if self.lora_plus != 1 and not fast:
            raise ValueError(
                f"lora_plus: no trainable parameter is one of {tuple(self.lora_plus_on)}, so there is nothing"
                " to multiply"
            )
        made: dict[tuple[int, bool, bool], dict[str, Any]] = {}
        for name, parameter in trainable.items():
            decaying = weight_decay != 0 and (parameter.dim() >= 2 if decays is None else name in decays)
            key = (-depths[name], name in fast, not decaying)
            if key not in made:
                rate = (
                    lr
                    * self.factor(depths[name], lowest, highest)
                    * (self.lora_plus if name in fast else 1.0)
                )
                made[key] = _group(depths[name], name in fast, rate, weight_decay if decaying else 0.0)
            made[key]["params"].append(parameter)
        groups = [made[key] for key in sorted(made)]
        check_groups(groups, model)
        return groups

    def _depths(
        self,
        model: nn.Module,
        trainable: Iterable[str],
        layers: str | Sequence[str] | None,
        depths: Mapping[str, int] | None,
    ) -> Mapping[str, int]:
        if depths is None:
            # Without a ratio the order of the layers does not matter, and a model may have none.
            return (
                dict.fromkeys(trainable, 0)
                if self.layer_ratio == 1 and layers is None
                else parameter_depths(
                    model,
                    layers=layers,
                )
            )
        missing = [name for name in trainable if name not in depths]
        if missing:
            raise ValueError(
                f"depths: has no depth for {missing[0]} ({len(missing)} trainable parameters are missing)",
            )
        return depths

    def _is_fast(self, name: str, parameter: nn.Parameter) -> bool:
        return self.lora_plus != 1 and parameter_kind(name, parameter) in self.lora_plus_on


def parameter_kind(name: str, parameter: nn.Parameter) -> str:
    """What a parameter is to LoRA+, by its name in PEFT: "A", "B", "magnitude", "bias" or "other"."""
    if name.endswith("bias") or ".bias." in name:
        return "bias"
    parts = name.split(".")
    for part, kind in _PARTS.items():
        if part in parts:
            return kind
    return "other"


_PARTS = {
    "lora_A": "A",
    "lora_embedding_A": "A",
    "lora_B": "B",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}


def _group(depth: int, fast: bool, rate: float, weight_decay: float) -> dict[str, Any]:
    kind = "lora_plus" if fast else "base"
    name = f"depth {depth}, {kind}" + ("" if weight_decay else ", no decay")
    return {
        "params": [],
        "lr": rate,
        "weight_decay": weight_decay,
        "depth": depth,
        "kind": kind,
        "name": name,
    }


def check_groups(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> None:
    """Raise ValueError unless every trainable parameter of the model is in exactly one group, and no group
    has any other.

    Call it on `optimizer.param_groups` of an optimizer that something else made: a parameter in no group is
    silently never trained.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = [id(parameter) for group in groups for parameter in group["params"]]
    counts: dict[int, int] = {}
    for key in held:
        counts[key] = counts.get(key, 0) + 1
    wrong = {
        "in no group": [name for key, name in names.items() if key not in counts],
        "in several groups": [names.get(key, "not trainable") for key, count in counts.items() if count > 1],
        "in a group, but not trainable parameters of the model": [
            str(key) for key in counts if key not in names
        ],
    }
    said = [_count(found, what) for what, found in wrong.items() if found]
    if said:
        raise ValueError(
            f"groups: every trainable parameter must be in exactly one group, but {'; '.join(said)}",
        )


def _count(found: list[str], what: str) -> str:
    return f"{len(found)} {'is' if len(found) == 1 else 'are'} {what} ({found[0]})"


def rates_table(groups: Iterable[Mapping[str, Any]]) -> str:
    """One line a group: depth, kind, rate, weight decay and how many numbers it trains."""
    lines = ["depth  kind       rate       decay   parameters"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group.get('depth', '-'):>5}  {group.get('kind', '-'):<9}  {group['lr']:.3e} "
            f" {group.get('weight_decay', 0.0):<6g}  {count}"
        )
    return "\n".join(lines)
