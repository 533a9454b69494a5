"""Siblings computed together: who they are, when they are, and that nothing is kept or mistaken."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.patching.forwards import find
from peftkern.patching.sharing import called_together

from . import models

transformers = models.transformers


def siblings(model: nn.Module) -> list[nn.Module]:
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def group(module: nn.Module):
    return find(module)[1].group


def patched(**options) -> nn.Module:
    model = models.lora(models.llama(**options))
    peftkern.patch(model)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 64, requires_grad=True)


def test_one_call_computes_all(calls, x):
    q, k, v = siblings(patched())
    outputs = [layer(x) for layer in (q, k, v)]
    assert calls == {"lora": 3} and calls.groups == 1 and group(q).stash is None
    peftkern.unpatch(q), peftkern.unpatch(k), peftkern.unpatch(v)
    for layer, output in zip((q, k, v), outputs, strict=True):
        torch.testing.assert_close(layer(x), output)


def test_any_member_may_come_first(calls, x):
    q, k, v = siblings(patched())
    first, second, third = v(x), q(x), k(x)
    assert calls.groups == 1
    assert (first.shape, second.shape, third.shape) == ((2, 5, 32), (2, 5, 64), (2, 5, 32))


def test_a_tensor_written_to_between_the_calls_is_another_one():
    q, k, _ = siblings(patched())
    x = torch.randn(2, 5, 64)
    q(x)
    with torch.no_grad():
        x.mul_(2)
    late = k(x)
    peftkern.unpatch(k)
    torch.testing.assert_close(late, k(x))


def test_grad_mode_counts(x):
    q, k, _ = siblings(patched())
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad


def test_members_called_with_other_tensors_than_their_code_has_compute_the_same(calls, x):
    """Whoever calls the children by himself: what was computed for siblings in vain is dropped, and each call
    decides as any other."""
    q, k, v = siblings(patched())
    other = torch.randn(2, 7, 64)
    for _ in range(4):
        calls.clear()
        calls.groups = 0
        outputs = [layer(t) for layer, t in ((q, x), (k, other), (v, other))]
        assert calls.groups == 2 and group(q).stash.parts.keys() == {0}
    peftkern.unpatch(q), peftkern.unpatch(k), peftkern.unpatch(v)
    for layer, t, output in zip((q, k, v), (x, other, other), outputs, strict=True):
        torch.testing.assert_close(layer(t), output)


def test_an_exception_between_two_calls_harms_nothing(calls, x):
    q, k, v = siblings(patched())
    hook = k.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    q(x)
    with pytest.raises(RuntimeError, match="stop"):
        k(x)
    hook.remove()
    again = torch.randn(2, 5, 64)
    q(again), k(again), v(again)
    assert group(q).dissolved is None and group(q).stash is None


def test_nothing_outlives_the_calls(x):
    q, k, v = siblings(patched())
    outputs = [layer(x) for layer in (q, k, v)]
    seen = [weakref.ref(output) for output in outputs]
    sum(output.sum() for output in outputs).backward()
    del outputs
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_unpatching_one_member_leaves_the_others_alone(calls, x):
    q, k, v = siblings(patched())
    peftkern.unpatch(k)
    q(x), k(x), v(x)
    assert "unpatched" in group(q).dissolved and calls.groups == 0


CHECKPOINTING = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


@CHECKPOINTING
def test_checkpointing(reentrant, x):
    q, k, v = siblings(patched())

    def run(t):
        return q(t).sum() + (k(t) * v(t)).sum()

    run(x).backward()
    expected, x.grad = x.grad, None
    checkpoint(run, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, expected)


@CHECKPOINTING
def test_checkpointing_where_keys_come_from_elsewhere(reentrant, x):
    """Masks too are drawn again as in the first pass, at the first step and at later ones."""
    q, k, v = siblings(patched_training(0.3))
    other = torch.randn(2, 5, 64)

    def run(t):
        return q(t).sum() + (k(other) * v(other)).sum()

    for seed in range(3):
        gradients = []
        for call in (run, lambda t: checkpoint(run, t, use_reentrant=reentrant)):
            q.zero_grad(), k.zero_grad()
            torch.manual_seed(seed)
            call(x).backward()
            gradients.append([layer.lora_B["default"].weight.grad.clone() for layer in (q, k)])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)


def patched_training(dropout: float) -> nn.Module:
    model = models.lora(models.llama(four_bit=False), lora_dropout=dropout).train()
    peftkern.patch(model)
    return model


def test_regions_that_are_checkpointed_apart_leave_each_other_nothing(x):
    q, k, v = siblings(patched())
    (q(x).sum() + (k(x) * v(x)).sum()).backward()
    expected, x.grad = x.grad, None
    y = [checkpoint(layer, x, use_reentrant=False) for layer in (q, k, v)]
    (y[0].sum() + (y[1] * y[2]).sum()).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("make, targets", [("t5", ["q", "k", "v"]), ("bart", ["q_proj", "k_proj", "v_proj"])])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@CHECKPOINTING
def test_encoder_decoders_under_checkpointing(make, targets, dropout, reentrant):
    """Against the same patched model without checkpointing, over two steps."""
    plain = encoder_decoder(make, targets, dropout)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for seed in range(2):
        torch.manual_seed(seed)
        plain(input_ids=models.IDS, labels=models.IDS).loss.backward()
        torch.manual_seed(seed)
        model(input_ids=models.IDS, labels=models.IDS).loss.backward()
        torch.testing.assert_close(models.grads(model), models.grads(plain), rtol=1e-4, atol=1e-6)


def encoder_decoder(make: str, targets: list[str], dropout: float) -> nn.Module:
    torch.manual_seed(0)
    if make == "t5":
        sizes = dict(
            vocab_size=96, d_model=64, d_ff=96, num_layers=1, num_decoder_layers=1, num_heads=4, d_kv=16
        )
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        )
    else:
        sizes = dict(
            vocab_size=96,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
        )
        sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0)
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    # Without a task: what PEFT before 0.19 does for one asks for a method that transformers 5.24 no longer
    # has.
    options = dict(target_modules=targets, lora_dropout=dropout, task_type=None)
    model = models.peft.get_peft_model(model, models.config(**options)).train()
    models.randomize(model)
    peftkern.patch(model)
    return model


def test_members_that_cannot_take_part_run_alone(calls, x):
    """A merged layer runs stock, the others together."""
    model = patched(four_bit=False)
    q, k, v = siblings(model)
    k.merge()
    q(x), k(x), v(x)
    assert calls.groups == 1 and calls["lora"] == 2


def test_inference_mode(x):
    q, k, v = siblings(patched())
    with torch.inference_mode():
        t = torch.randn(2, 5, 64)
        outputs = [layer(t) for layer in (q, k, v)]
        peftkern.unpatch(q), peftkern.unpatch(k), peftkern.unpatch(v)
        for layer, output in zip((q, k, v), outputs, strict=True):
            torch.testing.assert_close(layer(t), output)


@pytest.mark.parametrize("make, targets", [("t5", ["q", "k", "v"]), ("bart", ["q_proj", "k_proj", "v_proj"])])
def test_an_attention_whose_keys_may_come_from_an_encoder_groups_keys_and_values(make, targets):
    model = encoder_decoder(make, targets, 0.0)
    grouped = {name: group(module) for name, module in models.lora_layers(model).items()}
    for name, held in grouped.items():
        path, child = name.rsplit(".", 1)
        assert (held is None) if child == targets[0] else (held is grouped[f"{path}.{targets[1]}"]), name


class Attention(nn.Module):
    """Calls of children as codes have them."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcdefgh":
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x, y=None):
        first = self.a(x) + self.b(x)
        third = self.c(x) if y is None else self.d(y)
        x = x * 2
        e = self.e(x).relu()
        return self.g(first + third) + self.f(x) + e + self.helper(x)

    def helper(self, x):
        return self.h(x)


def test_siblings_are_what_the_code_calls_with_one_variable():
    assert called_together(Attention(), "abcdefgh") == [("a", "b"), ("e", "f")]
    assert called_together(Attention(), "acegh") == []
    without_source = type("Built", (nn.Module,), {"forward": eval("lambda self, x: self.a(x) + self.b(x)")})
    assert called_together(without_source(), "ab") == []


def test_threads_leave_each_other_nothing(calls):
    """Two threads take turns between the calls of one group's members."""
    q, k, v = siblings(patched())
    turns, outputs = threading.Barrier(2), {}
    x = torch.randn(2, 5, 64)

    def work(name: str, t: torch.Tensor) -> None:
        outputs[name] = []
        for layer in (q, k, v):
            turns.wait()
            outputs[name].append(layer(t))

    threads = [
        threading.Thread(target=work, args=item) for item in (("own", torch.randn(2, 5, 64)), ("other", x))
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert calls.groups == 2 and group(q).dissolved is None and group(q).stash is None
    for layer, output in zip((q, k, v), outputs["other"], strict=True):
        peftkern.unpatch(layer)
        torch.testing.assert_close(layer(x), output)
