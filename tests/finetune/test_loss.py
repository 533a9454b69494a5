"""The frozen head's loss against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from peftkern.finetune.loss import frozen_head_loss, has_plain_head


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_loss_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # 3 * 99 targets: several slices and a ragged last one.
    hidden = torch.randn(3, 100, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(211, 32, generator=generator).to(dtype)
    labels = torch.randint(0, 211, (3, 100), generator=generator)
    labels[0, :40] = -100
    loss = frozen_head_loss(hidden, weight, labels)
    (loss / 7).backward()

    exact = hidden.detach().double().requires_grad_()
    logits = exact[:, :-1].reshape(-1, 32) @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    (expected / 7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (hidden.grad.double() - exact.grad).norm() <= tolerance * exact.grad.norm()
    assert hidden.grad[:, -1].abs().max() == 0 and hidden.grad[0, :39].abs().max() == 0


def test_no_target_at_all() -> None:
    hidden = torch.randn(1, 5, 8, requires_grad=True)
    loss = frozen_head_loss(hidden, torch.randn(11, 8), torch.full((1, 5), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0


def test_models_that_change_their_logits_are_left_to_trl(tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not has_plain_head(model)
    model.requires_grad_(False)
    assert has_plain_head(model)
    model.config.final_logit_softcapping = 30.0
    assert not has_plain_head(model)
