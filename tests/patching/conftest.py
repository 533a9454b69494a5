from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from peftkern import functional
from peftkern.functional import group, mlp
from peftkern.patching import whole_layers
from peftkern.runtime import backends

from .. import stock


@pytest.fixture(autouse=True)
def stock_bitsandbytes():
    """Where peftkern is installed, bitsandbytes' own ops are ours too; "stock" means its own, and such as are
    right on this CPU."""
    with stock.right():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Counts what runs: "lora" for the fused LoRA linear, "linear" for the bare one, "add" for a branch onto
    a stock base's output. `calls.dtype` is what the last linear computed in, `calls.groups` and
    `calls.mlps` count those."""
    counter: Counter[str] = Counter()
    original, original_add = functional.qlora_linear, functional.lora_add

    def counted(x, weight, bias=None, lora_a=None, lora_b=None, **options):
        counter["linear" if lora_a is None else "lora"] += 1
        counter.dtype = x.dtype
        return original(x, weight, bias, lora_a, lora_b, **options)

    def counted_add(*args, **options):
        counter["add"] += 1
        return original_add(*args, **options)

    # `linear_4bit` calls it by the name in its own module.
    for module in (functional, functional.linear):
        monkeypatch.setattr(module, "qlora_linear", counted)
    original_prepared = functional.linear.prepared

    def counted_prepared(x, weight, bias=None, lora_a=None, lora_b=None, **options):
        call = original_prepared(x, weight, bias, lora_a, lora_b, **options)

        def counted_call(x):
            counter["linear" if lora_a is None else "lora"] += 1
            counter.dtype = x.dtype
            return call(x)

        return counted_call

    monkeypatch.setattr(functional.linear, "prepared", counted_prepared)
    original_group = functional.qlora_group
    counter.groups = 0

    def counted_group(x, members):
        counter.groups += 1
        counter.update("lora" if member.adapters else "linear" for member in members)
        counter.dtype = x.dtype
        return original_group(x, members)

    monkeypatch.setattr(functional, "qlora_group", counted_group)
    original_prepared_group = group.prepared

    def counted_prepared_group(x, members):
        call = original_prepared_group(x, members)

        def counted_call(x):
            counter.groups += 1
            counter.update("lora" if member.adapters else "linear" for member in members)
            counter.dtype = x.dtype
            return call(x)

        return counted_call

    monkeypatch.setattr(group, "prepared", counted_prepared_group)
    original_few_rows = group.few_rows

    def counted_few_rows(x, members):
        call = original_few_rows(x, members)

        def counted_call(x):
            counter.update("lora" if member.adapters else "linear" for member in members)
            counter.dtype = x.dtype
            return call(x)

        return None if call is None else counted_call

    monkeypatch.setattr(group, "few_rows", counted_few_rows)
    counter.mlps = 0

    def count_mlp(original_mlp):
        def counted_mlp(x, *members, **options):
            counter.mlps += 1
            counter.update("lora" if member.adapters else "linear" for member in members)
            return original_mlp(x, *members, **options)

        return counted_mlp

    for name in ("gated_mlp", "gated_mlp_packed"):
        monkeypatch.setattr(functional, name, count_mlp(getattr(functional, name)))
    original_prepared_mlp = mlp.prepared

    def counted_prepared_mlp(x, inner, down, **options):
        call, members = original_prepared_mlp(x, inner, down, **options), (*inner.values(), down)

        def counted_call(x):
            counter.mlps += 1
            counter.update("lora" if member.adapters else "linear" for member in members)
            return call(x)

        return counted_call

    monkeypatch.setattr(mlp, "prepared", counted_prepared_mlp)
    monkeypatch.setattr(functional, "lora_add", counted_add)
    return counter


@pytest.fixture
def loss_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The keyword arguments of every call of the fused loss."""
    seen, original = [], functional.linear_cross_entropy
    monkeypatch.setattr(
        functional, "linear_cross_entropy", lambda *a, **k: (seen.append(k), original(*a, **k))[1]
    )
    return seen


@pytest.fixture
def bf16_level() -> Iterator[None]:
    """A level with attention of our own."""
    tiled = [level for level in backends.native().isas() if level in ("avx512bf16", "amx")]
    if not tiled:
        pytest.skip("no bf16 products here")
    native = backends.native()
    before = native.isa()
    native.set_isa(tiled[0])
    yield
    native.set_isa(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a layer whether it ran whole."""
    found, call = [], whole_layers.WholeLayer.__call__

    def recorded(self, *args: Any) -> Any:
        out = call(self, *args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(whole_layers.WholeLayer, "__call__", recorded)
    return found
