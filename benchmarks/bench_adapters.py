"""Switching adapters on one base of SmolLM2's shape (LoRA r = 8 on q and v, 60 layers): a bank, PEFT's
set_adapter, PEFT's hot swap.

"switch": the next adapter is active. "switch, one token": and a token has run through it, on a patched model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern.adapters.arithmetic import LoraWeights, of_model
from peftkern.adapters.switching import AdapterBank

from .harness import OURS, Provider, Spec, main
from .peers import close, has

__all__ = ["build", "specs"]

DISTINCT = 4  # adapters of other numbers; more of them are other tensors of the same numbers
PEFT_UP_TO = 30  # each adapter that PEFT loads takes longer than the one before
IDS = torch.tensor([[7]])


def specs(small: bool) -> list[Spec]:
    width, counts = (64, (3,)) if small else (576, (10, 30, 1000))
    return [
        Spec("adapters", mode, "float32", width, width, n)
        for n in counts
        for mode in ("switch", "switch, one token")
    ]


def build(spec: Spec) -> list[Provider]:
    if not has("peft", "transformers"):
        return []
    model, adapters = _model(spec.n), _adapters(spec.n)
    peftkern.patch(model)
    expected = [_logits(model, adapter) for adapter in adapters]
    token = spec.mode != "switch"
    providers = [_provider(OURS, model, _bank(model, adapters, spec.m), expected, token)]
    peers: list[tuple[str, Callable[[Any, list[LoraWeights], int], Callable[[int], None]]]] = [
        ("PEFT hot swap", _hot_swap),
    ]
    if spec.m <= PEFT_UP_TO:
        peers.append(("PEFT set_adapter", _set_adapter))
    for name, make in peers:
        own = _model(spec.n)
        switch = make(own, adapters, spec.m)
        peftkern.patch(own)
        providers.append(_provider(name, own, switch, expected, token))
    return providers


def _provider(
    name: str,
    model: Any,
    switch: Callable[[int], None],
    expected: list[Tensor],
    token: bool,
) -> Provider:
    numbers: Iterator[int] = itertools.count()
    last = [0]

    def call() -> Any:
        last[0] = next(numbers)
        switch(last[0])
        return _run(model) if token else None

    def check(result: Any) -> None:
        got = _run(model) if result is None else result
        close({"logits": expected[last[0] % DISTINCT].double()}, torch.float32)({"logits": got})

    return Provider(name, call, check)


def _run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def _model(width: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=30 if width == 576 else 2,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ).eval()


def _adapters(width: int) -> list[LoraWeights]:
    """Adapters of random numbers, each with tensors of its own."""
    found = []
    for seed in range(DISTINCT):
        model, generator = _model(width), torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        found.append(of_model(model))
    return found


def _logits(model: Any, adapter: LoraWeights) -> Tensor:
    bank = AdapterBank(model)
    bank.add("one", adapter)
    with bank.using("one"):
        return _run(model)


def _bank(model: Any, adapters: list[LoraWeights], count: int) -> Callable[[int], None]:
    bank = AdapterBank(model)
    for number in range(count):
        bank.add(str(number), adapters[number % DISTINCT])
    return lambda number: bank.use(str(number % count))


def _set_adapter(model: Any, adapters: list[LoraWeights], count: int) -> Callable[[int], None]:
    from peft import set_peft_model_state_dict

    from peftkern.adapters.arithmetic.lora_files import state_of

    config = model.peft_config["default"]
    for number in range(count):
        model.add_adapter(str(number), config)
        set_peft_model_state_dict(model, state_of(adapters[number % DISTINCT]), adapter_name=str(number))
    return lambda number: model.set_adapter(str(number % count))


def _hot_swap(model: Any, adapters: list[LoraWeights], count: int) -> Callable[[int], None]:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    from peftkern.adapters.arithmetic.lora_files import state_of

    def named(adapter: LoraWeights) -> dict[str, Tensor]:
        return {key.replace(".weight", ".default.weight"): value for key, value in state_of(adapter).items()}

    states, config = [named(adapter) for adapter in adapters], model.peft_config["default"]

    def switch(number: int) -> None:
        hotswap_adapter_from_state_dict(model, states[number % DISTINCT], "default", config)

    return switch


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
