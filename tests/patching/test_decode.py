"""Generation: calls of few rows without gradients use what an earlier call prepared, give the same bits, and
notice every change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.functional import group
from peftkern.patching import decode
from peftkern.patching.forwards import find

from . import models


def patched(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    model = models.lora(models.llama(dtype, layers=1, **options)).eval()
    peftkern.patch(model)
    return model


@pytest.fixture
def prepared(monkeypatch) -> list[int]:
    """The members of every call that was prepared."""
    seen, original = [], group.few_rows

    def counted(x, members):
        call = original(x, members)
        seen.extend([len(members)] if call is not None else [])
        return call

    monkeypatch.setattr(group, "few_rows", counted)
    return seen


@contextlib.contextmanager
def unprepared():
    """Every call is computed as any other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_serves", lambda x: False)
        yield


@torch.no_grad()
def outputs(model: nn.Module, rows: int = 1) -> list[Tensor]:
    """q, k, v, o and the MLP of the first layer on the same rows, and the logits of as many tokens."""
    layer = next(module for module in model.modules() if hasattr(module, "self_attn"))
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(3)).to(
        next(model.parameters()).dtype
    )
    attention = layer.self_attn
    parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), attention.o_proj(x), layer.mlp(x)]
    return [*parts, model(input_ids=models.IDS[:1, :rows], use_cache=False).logits]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_bits_are_those_of_any_other_call(dtype, rows, prepared):
    model = patched(dtype, bias=True)
    with unprepared():
        expected = outputs(model, rows)
    assert prepared == []
    first, again = outputs(model, rows), outputs(model, rows)
    assert same(first, expected) and same(again, expected)
    assert sorted(prepared) == [1, 1, 2, 3], "q, k, v; o; gate, up; down are prepared once"


def test_inference_mode_is_served_and_training_is_not(prepared):
    model = patched()
    with torch.inference_mode():
        model(input_ids=models.IDS[:1, :1], use_cache=False)
    assert len(prepared) == 4
    prepared.clear()
    models.run(model, models.IDS[:1, :2])
    assert prepared == []


def test_many_rows_are_not_prepared(prepared):
    model = patched()
    with torch.no_grad():
        model(input_ids=models.IDS, use_cache=False)
    assert prepared == []


def layer_of(model: nn.Module) -> nn.Module:
    return models.first(model)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        layer_of(model).lora_A["default"].weight.mul_(-2)


def _swap_data(model: nn.Module) -> None:
    weight = layer_of(model).lora_B["default"].weight
    weight.data = weight.data * 3


def _new_parameter(model: nn.Module) -> None:
    b = layer_of(model).lora_B["default"]
    b.weight = nn.Parameter(b.weight.detach() + 1)


def _transpose_in_place(model: nn.Module) -> None:
    weight = layer_of(model).lora_A["default"].weight
    weight.data = weight.data.t().contiguous().t()


def _scale(model: nn.Module) -> None:
    layer_of(model).set_scale("default", 3.0)


def _disable(model: nn.Module) -> None:
    layer_of(model).enable_adapters(False)


def _merge(model: nn.Module) -> None:
    layer_of(model).merge()


def _second_adapter(model: nn.Module) -> None:
    model.add_adapter("other", models.config(r=2))
    models.randomize(model)
    model.set_adapter("other")


def _two_adapters(model: nn.Module) -> None:
    model.add_adapter("other", models.config(r=2))
    models.randomize(model)
    model.base_model.set_adapter(["default", "other"])


def _hook(model: nn.Module) -> None:
    layer_of(model).lora_A["default"].register_forward_hook(lambda module, args, output: output * 5)


def _base_hook(model: nn.Module) -> None:
    layer_of(model).base_layer.register_forward_hook(lambda module, args, output: output * 5)


def _lora_bias(model: nn.Module) -> None:
    layer_of(model).lora_B["default"].bias = nn.Parameter(torch.ones(64))


def _base_bias(model: nn.Module) -> None:
    layer_of(model).base_layer.bias = nn.Parameter(torch.ones(64), requires_grad=False)


def _base_weight(model: nn.Module) -> None:
    new = models.linear_4bit(nn.Linear(64, 64, bias=False), compute_dtype=torch.float32)
    layer_of(model).base_layer.weight = new.weight


def _base_bytes(model: nn.Module) -> None:
    layer_of(model).base_layer.weight.data.bitwise_xor_(0x11)


def _absmax(model: nn.Module) -> None:
    state = layer_of(model).base_layer.weight.quant_state
    state.offset = state.offset + 1


def _compute_dtype(model: nn.Module) -> None:
    layer_of(model).base_layer.compute_dtype = torch.bfloat16


def _another_module(model: nn.Module) -> None:
    layer = layer_of(model)
    layer.lora_A["default"] = nn.Linear(64, 4, bias=False)


CHANGES = (
    _in_place,
    _swap_data,
    _new_parameter,
    _transpose_in_place,
    _scale,
    _disable,
    _merge,
    _second_adapter,
    _two_adapters,
    _hook,
    _base_hook,
    _lora_bias,
    _base_bias,
    _base_weight,
    _base_bytes,
    _absmax,
    _compute_dtype,
    _another_module,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_a_change_after_a_prepared_call_is_noticed(change: Callable[[nn.Module], None], prepared):
    model = patched()
    before = outputs(model)
    assert prepared
    change(model)
    got = outputs(model)
    with unprepared():
        assert same(got, outputs(model))
    if change is not _transpose_in_place:
        assert not torch.equal(got[3], before[3]), "the change makes a difference"


def test_dropout_left_in_training_mode_still_drops():
    model = models.lora(models.llama(layers=1), lora_dropout=0.5).eval()
    peftkern.patch(model)
    quiet = outputs(model)[3]
    model.train()
    torch.manual_seed(0)
    first, second = outputs(model)[3], outputs(model)[3]
    assert not torch.equal(first, quiet) and not torch.equal(first, second)


def test_autocast_is_followed():
    model = patched()
    before = outputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs(model)
        with unprepared():
            assert same(got, outputs(model))
    assert not torch.equal(got[3], before[3]) and same(outputs(model), before)


def test_another_backend_is_followed(prepared):
    model = patched()
    outputs(model)
    prepared.clear()
    with peftkern.runtime.backends.use_backend("reference"):
        got = outputs(model)
    assert prepared == []
    for a, b in zip(got, outputs(model), strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_adapters_are_followed():
    model = patched()
    model.add_adapter("other", models.config(r=2))
    models.randomize(model)
    outputs(model)
    layer, x = layer_of(model), torch.randn(2, 1, 64)
    with torch.no_grad():
        separate = []
        for name, row in zip(("default", "other"), x, strict=True):
            model.set_adapter(name)
            separate.append(layer(row[None]))
        with peftkern.mixed_adapters(model, ["default", "other"]):
            torch.testing.assert_close(layer(x), torch.cat(separate))


def test_unpatched_modules_are_not_served(prepared):
    model = patched()
    outputs(model)
    prepared.clear()
    peftkern.unpatch(model)
    outputs(model)
    assert prepared == []


@pytest.mark.parametrize("how", models.COPIES)
def test_a_copy_reads_its_own_weights(how):
    model = patched()
    before = outputs(model)
    other = models.copied(model, how)
    _in_place(other)
    assert find(layer_of(other))[1].ready.prepared[1] is None
    assert not torch.equal(outputs(other)[3], before[3])
    assert same(outputs(model), before)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_who_intercepts_or_profiles_sees_the_ops():
    model = patched()
    expected = outputs(model)
    with _Seen() as seen:
        assert same(outputs(model), expected)
    ops = ("qlora_group_fwd", "qlora_linear_fwd", "glu_fwd", "rms_norm_fwd", "add_rms_norm_fwd", "rope")
    for name in ops:
        assert any(found.startswith(f"peftkern.{name}") for found in seen.names), name
    with torch.profiler.profile() as profile:
        assert same(outputs(model), expected)
    assert {f"peftkern::{name}" for name in ops} <= {event.key for event in profile.key_averages()}


def test_threads_do_not_share_scratch():
    model, results = patched(), {}
    expected = outputs(model)

    def work(index: int) -> None:
        torch.set_num_threads(1)
        results[index] = all(same(outputs(model), expected) for _ in range(20))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True, 2: True}
