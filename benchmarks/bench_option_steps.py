"""What an option of LoRA costs in a whole step of SmolLM2-135M, forward + backward: dropout, DoRA, and four
adapters mixed in one batch, each against the step without it; patched models, `fused_loss=True`, 512
tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from . import peers  # first: it switches peftkern's bitsandbytes hook off

# isort: split
import torch
from torch import Tensor

import peftkern

from .bench_options import BASELINES
from .bench_step import Step
from .harness import OURS, Provider, Spec, main

__all__ = ["build", "specs"]

OPTIONS = {"dropout 0.1": {"lora_dropout": 0.1}, "DoRA": {"use_dora": True}, "4 mixed adapters": {}}
ADAPTERS = ("default", "second", "third", "fourth")


def specs(small: bool) -> list[Spec]:
    """n, k: the hidden size; m: tokens. fp32 alone: on CPUs without bf16 instructions torch's part of a bf16
    step is another."""
    size, m = (192, 64) if small else (576, 512)
    return [Spec("options step", mode, "float32", size, size, m) for mode in OPTIONS]


def _both_ways(step: Step) -> dict[str, Tensor]:
    """Forward and backward; the optimizer's time is that of the parameters, of which four adapters have four
    times as many."""
    step.model.zero_grad(set_to_none=True)
    loss = step.model(input_ids=step.ids, labels=step.ids).loss
    loss.backward()
    return {"loss": loss.detach()}


def _mixed(step: Step) -> Callable[[], dict[str, Tensor]]:
    """A sequence for each adapter, of the same number of tokens in all."""
    for name in ADAPTERS[1:]:
        step.model.add_adapter(name, step.model.peft_config["default"])
    step.model.base_model.set_adapter(list(ADAPTERS))  # all of them trainable
    peftkern.patch(step.model, fused_loss=True)

    def run() -> dict[str, Tensor]:
        with peftkern.mixed_adapters(step.model, ADAPTERS):
            return _both_ways(step)

    return run


def _check(step: Step) -> Callable[[dict[str, Tensor]], None]:
    def check(got: dict[str, Tensor]) -> None:
        grads = [p.grad for p in step.model.parameters() if p.requires_grad]
        if not torch.isfinite(got["loss"]) or any(g is None or not torch.isfinite(g).all() for g in grads):
            raise AssertionError("the loss or a gradient is missing or not finite")

    return check


def build(spec: Spec) -> list[Provider]:
    dtype, small = peers.DTYPES[spec.dtype], spec.n != 576
    steps = [Step(OURS, dtype, small, **options) for options in (OPTIONS[spec.mode], {})]
    calls = [partial(_both_ways, step) for step in steps]
    if spec.mode == "4 mixed adapters":
        for step in steps:
            step.ids = step.ids.view(len(ADAPTERS), -1)
        calls[0] = _mixed(steps[0])
    names = (OURS, BASELINES[spec.mode])
    return [Provider(name, call, _check(step)) for name, call, step in zip(names, calls, steps, strict=True)]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
