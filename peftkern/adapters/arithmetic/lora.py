"""A LoRA adapter as data: its modules, and what it does to them to be scaled or to be zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LoraModule",
    "LoraWeights",
    "plain_config",
    "scaled",
    "zeros_like",
]

# What of a configuration says where LoRA is put, how large it is and how it was trained, and changes nothing
# of what A and B mean.
_UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
    ),
    *(
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
    ),
    *(
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
    ),
    *(
        "trainable_token_indices",
        "eva_config",
        "use_dora",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "lora_bias",
    ),
    "ensure_weight_tying",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "kaiming")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: W + scaling * b @ a. a [r, K], b [N, r]; an embedding's K is its vocabulary, a
    convolution's are 4-D and so on.

    bias [N]: of b, scaled as well (lora_bias). magnitude: DoRA's. kind: "linear" (Conv1D and convolutions
        too) or "embedding".
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    kind: str = "linear"

    @property
    def rank(self) -> int:
        """r, the number of a's rows."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        """What two modules must share to be added."""
        return tuple(self.a.shape[1:]), (self.b.shape[0], *self.b.shape[2:]), self.kind

    def factors(self) -> tuple[Tensor, Tensor]:
        """b [N, r] with its scaling, and a [r, K], as matrices in fp64; a convolution's kernel is flattened
        into K."""
        if self.b.shape[1] != self.rank:
            raise ValueError(
                f"got b {tuple(self.b.shape)} for a of rank {self.rank}: a grouped convolution's LoRA cannot"
                " be combined"
            )
        if self.b[0, 0].numel() != 1:
            raise ValueError(
                f"got b {tuple(self.b.shape)}, expected a convolution of 1 x 1: it cannot be combined",
            )
        return self.b.flatten(1).double() * self.scaling, self.a.flatten(1).double()

    def with_factors(self, b: Tensor, a: Tensor, bias: Tensor | None = None) -> LoraModule:
        """A plain module of these matrices, scaling 1, with this one's shapes."""
        b, a = b.reshape(*b.shape, *self.b.shape[2:]), a.reshape(-1, *self.a.shape[1:])
        return LoraModule(
            a.float().contiguous(),
            b.float().contiguous(),
            1.0,
            None if bias is None else bias.float(),
            None,
            self.kind,
        )


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA adapter: PEFT's configuration, its modules by the name they have in the base, and what it
    replaces in the base.

    replaced: tensors that take the place of the base's (modules_to_save, trained biases, trained tokens), by
        their name in the file.
    record: how the adapter was made, for its arithmetic.json.
    """

    name: str
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def obstacle(self) -> str | None:
        """Why b @ a is not all that this adapter adds to the base; None where it is, DoRA and `replaced`
        aside."""
        start = self.config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            return (
                f"init_lora_weights={start!r} also changed the base when it "
                "was made; save it as a plain LoRA first "
                "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
            )
        unknown = [key for key, value in self.config.items() if value and key not in _UNDERSTOOD]
        return (
            f"its configuration has {', '.join(unknown)}, a kind of LoRA that cannot be combined"
            if unknown
            else None
        )

    @property
    def trained(self) -> dict[str, Tensor]:
        """What of `replaced` was trained; the rest are copies of frozen weights, which PEFT saves with LoRA
        on an embedding."""
        saved = tuple(self.config.get("modules_to_save") or ())

        def is_trained(key: str) -> bool:
            named = any(part in saved for part in key.split(".")) or any(f".{name}." in key for name in saved)
            return named or not key.endswith(".weight") or "token_adapter" in key

        return {key: value for key, value in self.replaced.items() if is_trained(key)}

    @property
    def is_dora(self) -> bool:
        """Whether a module has a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())


def plain_config(
    config: dict[str, Any],
    modules: Mapping[str, LoraModule],
    *,
    same_targets: bool,
) -> dict[str, Any]:
    """`config` for plain modules of scaling 1; where they may be at other places than it says, they are
    targeted by their full names."""
    (common, _), *_ = Counter(module.rank for module in modules.values()).most_common(1)
    # PEFT matches a pattern with the end of a name: ^ keeps a name from matching a longer one.
    ranks = {f"^{name}": module.rank for name, module in modules.items() if module.rank != common}
    biased = any(module.bias is not None for module in modules.values())
    places = (
        {}
        if same_targets
        else {"target_modules": sorted(modules), "exclude_modules": None, "layers_to_transform": None}
    )
    places |= {} if same_targets else {"layers_pattern": None}
    result = (
        config
        | places
        | {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": ranks,
            "alpha_pattern": dict(ranks),
        }
    )
    result |= {
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": biased,
        "init_lora_weights": True,
        "bias": "none",
    }
    return result | {
        "modules_to_save": None,
        "trainable_token_indices": None,
        "eva_config": None,
        "inference_mode": True,
    }


def scaled(adapter: LoraWeights, weight: float) -> LoraWeights:
    """The adapter times a number, its ranks, alphas and places as they are: b and its bias are scaled, and in
    fp32 unless by -1."""

    def times(tensor: Tensor) -> Tensor:
        return -tensor if weight == -1.0 else (tensor.double() * weight).float()

    modules = {
        name: replace(module, b=times(module.b), bias=None if module.bias is None else times(module.bias))
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules, record={})


def zeros_like(adapter: LoraWeights) -> LoraWeights:
    """A plain adapter at the same places that adds exactly nothing."""
    modules = {
        name: LoraModule(
            module.a[:1].float().contiguous(),
            torch.zeros_like(module.b[:, :1], dtype=torch.float32).contiguous(),
            1.0,
            None,
            None,
            module.kind,
        )
        for name, module in adapter.modules.items()
    }
    return LoraWeights(adapter.name, plain_config(adapter.config, modules, same_targets=True), modules)
