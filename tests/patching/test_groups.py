"""Siblings computed together: when they are, what dissolves a group, and that nothing is kept or mistaken."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.patching.forwards import find

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


def test_members_with_inputs_of_their_own_dissolve_the_group_at_once(calls, x):
    """The keys and values of a cross attention."""
    q, k, v = siblings(patched())
    other = torch.randn(2, 7, 64)
    q(x), k(other), v(other)
    assert "different tensors" in group(q).dissolved
    calls.clear()
    assert [layer(t).shape[1] for layer, t in ((q, x), (k, other), (v, other))] == [5, 7, 7]
    assert calls == {"lora": 3} and calls.groups == 1, "only the first call was computed for all"


def test_a_member_called_alone_dissolves_the_group_after_a_while(calls):
    q, *_ = siblings(patched())
    for _ in range(5):
        q(torch.randn(2, 5, 64))
    assert "not called together" in group(q).dissolved and calls.groups == 3


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, x):
    q, k, v = siblings(patched())

    def run(t):
        return q(t).sum() + (k(t) * v(t)).sum()

    run(x).backward()
    expected, x.grad = x.grad, None
    checkpoint(run, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, expected)


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


def test_the_cross_attention_of_t5_dissolves_and_self_attention_does_not():
    config = transformers.T5Config(vocab_size=96, d_model=64, d_ff=96, num_layers=1, num_decoder_layers=1, num_heads=4, d_kv=16)
    config.decoder_start_token_id = config.pad_token_id = 0
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model = models.peft.get_peft_model(model, models.config(target_modules=["q", "k", "v"], task_type="SEQ_2_SEQ_LM")).eval()
    models.randomize(model)
    stock = model(input_ids=models.IDS, labels=models.IDS).logits
    peftkern.patch(model)
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=models.IDS, labels=models.IDS).logits, stock, rtol=1e-4, atol=1e-4)
    dissolved = {name: group(m.q).dissolved for name, m in model.named_modules() if hasattr(m, "q")}
    assert len(dissolved) == 3 and {name for name, why in dissolved.items() if why} == {name for name in dissolved if "EncDec" in name}
