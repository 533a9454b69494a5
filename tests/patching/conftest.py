from collections import Counter

import pytest

from peftkern import bnb_backend, functional


@pytest.fixture(autouse=True)
def stock_bitsandbytes():
    """Where peftkern is installed, bitsandbytes' own ops are ours too; "stock" means its own kernels."""
    was = bnb_backend.unregister()
    yield
    if was:
        bnb_backend.register()


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs: "lora" for the fused LoRA linear, "linear" for the bare one. `calls.dtype` is what the last one computed in."""
    counter: Counter[str] = Counter()
    original = functional.qlora_linear

    def counted(x, weight, bias=None, lora_a=None, lora_b=None, **options):
        counter["linear" if lora_a is None else "lora"] += 1
        counter.dtype = x.dtype
        return original(x, weight, bias, lora_a, lora_b, **options)

    monkeypatch.setattr(functional, "qlora_linear", counted)
    return counter
