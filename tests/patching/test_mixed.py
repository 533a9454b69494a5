"""Batches of mixed adapters in training: each sample as with its adapter alone, each adapter with the
gradients of its samples."""

from __future__ import annotations

import pytest
import torch

import peftkern

from . import models

IDS = torch.randint(0, 96, (4, 9), generator=torch.Generator().manual_seed(5))


def adapted(four_bit: bool = True, **options):
    """A model with adapters of different ranks and scalings: "default" of 4, "second" of 8, "third" of 2 and
    rsLoRA."""
    model = models.lora(models.llama(four_bit=four_bit), **options)
    model.add_adapter("second", models.config(r=8, lora_alpha=4, **options))
    model.add_adapter("third", models.config(r=2, use_rslora=True, **options))
    models.randomize(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    "names",
    [
        ["default", "second", "third", "__base__"],
        ["second", "second", "default", "default"],
        ["third"] * 4,
        ["second", "default"] * 2,
    ],
)
def test_every_sample_as_with_its_adapter_alone(four_bit, names, calls):
    model = adapted(four_bit)
    expected, grads = [], {}
    for i, name in enumerate(names):
        model.zero_grad(set_to_none=True)
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                expected.append(model(input_ids=IDS[i : i + 1]).logits)
            continue
        model.set_adapter(name)
        logits = model(input_ids=IDS[i : i + 1]).logits
        logits.square().mean().backward()
        expected.append(logits.detach())
        for key, grad in gradients(model).items():
            grads[key] = grads.get(key, 0) + grad
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    peftkern.patch(model)
    calls.clear()
    with peftkern.mixed_adapters(model, names):
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits.detach(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    trained = [i for i, name in enumerate(names) if name != "__base__"]
    sum(logits[i].square().mean() for i in trained).backward()
    found = {key: grad for key, grad in gradients(model).items() if grad.any()}
    assert set(found) == {key for key, grad in grads.items() if grad.any()} and found
    for key, grad in found.items():
        torch.testing.assert_close(
            grad, grads[key], rtol=2e-3, atol=2e-5 * grads[key].abs().max().item() + 1e-7, msg=key
        )
    assert calls["lora"] == 14 and calls["linear"] == 0


def test_dropout_is_drawn_for_each_adapter():
    model = adapted(lora_dropout=0.5)
    peftkern.patch(model)
    with peftkern.mixed_adapters(model, ["default", "second", "__base__", "third"]):
        first, second = model(input_ids=IDS).logits, model(input_ids=IDS).logits
        model.eval()
        third, fourth = model(input_ids=IDS).logits, model(input_ids=IDS).logits
    changed = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert changed == [True, True, False, True] and torch.equal(third, fourth)


def test_it_ends_with_the_block():
    model = adapted()
    peftkern.patch(model)
    before = model(input_ids=IDS).logits
    with pytest.raises(KeyError), peftkern.mixed_adapters(model, ["second"] * 4):
        assert not torch.equal(model(input_ids=IDS).logits, before)
        raise KeyError
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_checkpointing_within_the_block_and_its_end_before_the_backward_pass():
    model = adapted()
    peftkern.patch(model)
    names = ["second", "second", "default", "third"]
    with peftkern.mixed_adapters(model, names):
        model(input_ids=IDS).logits.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with peftkern.mixed_adapters(model, names):
        model(input_ids=IDS).logits.square().mean().backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-7, msg=key)
    with peftkern.mixed_adapters(model, names):
        loss = model(input_ids=IDS).logits.square().mean()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_errors():
    model = adapted()
    with (
        pytest.raises(ValueError, match=r"call peftkern\.patch\(model\) first"),
        peftkern.mixed_adapters(model, ["default"] * 4),
    ):
        pass
    peftkern.patch(model)
    with pytest.raises(ValueError, match="'other' unknown; the model has __base__, default, second, third"):
        peftkern.mixed_adapters(model, ["other"] * 4).__enter__()
    with (
        pytest.raises(ValueError, match="got 3 names for a batch of 4"),
        peftkern.mixed_adapters(model, ["default"] * 3),
    ):
        model(input_ids=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"), peftkern.mixed_adapters(model, ["default"] * 4):
        pass


def test_layers_without_a_fused_form_mix_too(calls):
    """A hook on the base, another variant of LoRA: PEFT's own forward runs, with the names."""
    model = adapted(four_bit=False).eval()
    names = ["second", "default", "third", "__base__"]
    expected = model(input_ids=IDS, adapter_names=names).logits
    peftkern.patch(model)
    handles = [
        layer.base_layer.register_forward_hook(lambda *_: None)
        for layer in models.lora_layers(model).values()
    ]
    with peftkern.mixed_adapters(model, names):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    with peftkern.mixed_adapters(model, names), model.disable_adapter():
        disabled = model(input_ids=IDS).logits
    peftkern.unpatch(model)
    with model.disable_adapter():
        torch.testing.assert_close(disabled, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
