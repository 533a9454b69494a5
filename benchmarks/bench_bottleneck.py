"""A whole step of SmolLM2-135M on a 4-bit base with bottleneck adapters, forward + backward, against LoRA
(r 16, all linears) of as many parameters; both patched with `fused_loss=True`, 512 tokens."""

from __future__ import annotations

from collections.abc import Callable

from . import peers  # first: it switches peftkern's bitsandbytes hook off

# isort: split
import torch
from torch import Tensor, nn

import peftkern
from peftkern.adapters.bottleneck import BottleneckConfig, get_bottleneck_model

from .bench_step import Step
from .harness import OURS, Provider, Spec, main

__all__ = ["build", "equal_size", "specs"]

MODES = {
    "Houlsby": BottleneckConfig(),
    "Pfeiffer": BottleneckConfig(places=("mlp",), reads="sum", activation="relu"),
    "parallel": BottleneckConfig(
        places=("mlp",), reads="input", activation="relu", scaling=4.0, init="mam_adapter"
    ),
}


def specs(small: bool) -> list[Spec]:
    """n, k: the hidden size; m: tokens."""
    size, m = (192, 64) if small else (576, 512)
    return [
        Spec("bottleneck step", mode, dtype, size, size, m)
        for dtype in ("bfloat16", "float32")
        for mode in MODES
    ]


def equal_size(parameters: int, *, places: int, width: int) -> int:
    """The size of bottlenecks with biases that have, in all, as many parameters as given, or hardly fewer."""
    return (parameters // places - width) // (2 * width + 1)


def _with_bottleneck(step: Step, config: BottleneckConfig) -> Step:
    """The step's model with a bottleneck in place of LoRA."""
    trainable = sum(p.numel() for p in step.parameters)
    peftkern.unpatch(step.model)
    base: nn.Module = step.model.unload()
    width, places = base.config.hidden_size, base.config.num_hidden_layers * len(config.places)
    values = config.to_dict() | {"size": equal_size(trainable, places=places, width=width)}
    step.model = get_bottleneck_model(base, BottleneckConfig(**values)).train()
    peftkern.patch(step.model, fused_loss=True)
    step.parameters = [p for p in step.model.parameters() if p.requires_grad]
    if not 0.98 * trainable <= sum(p.numel() for p in step.parameters) <= trainable:
        raise RuntimeError(f"{sum(p.numel() for p in step.parameters)} parameters, LoRA has {trainable}")
    return step


def _call(step: Step) -> Callable[[], Tensor]:
    def call() -> Tensor:
        step.model.zero_grad(set_to_none=True)
        loss = step.model(input_ids=step.ids, labels=step.ids).loss
        loss.backward()
        return loss.detach()

    return call


def _check(step: Step) -> Callable[[Tensor], None]:
    def check(loss: Tensor) -> None:
        if not torch.isfinite(loss) or any(
            p.grad is None or not torch.isfinite(p.grad).all() for p in step.parameters
        ):
            raise AssertionError("the loss or a gradient is missing or not finite")

    return check


def build(spec: Spec) -> list[Provider]:
    dtype, small = peers.DTYPES[spec.dtype], spec.n != 576
    ours, lora = _with_bottleneck(Step(OURS, dtype, small), MODES[spec.mode]), Step(OURS, dtype, small)
    return [Provider(name, _call(step), _check(step)) for name, step in ((OURS, ours), ("LoRA", lora))]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
