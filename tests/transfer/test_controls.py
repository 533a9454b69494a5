"""Twins of a network: their moments, their seeds, what they keep; and what lies below a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftkern.finetune.errors import InputError
from peftkern.transfer.controls import copy_first, matched_random, shuffled
from peftkern.transfer.depth import below

transformers = pytest.importorskip(
    "transformers",
    reason="transformers is not installed: pip install 'peftkern[transfer]'",
)


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=40,
    )
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, max_position_embeddings=16),
    )


def test_a_random_twin_has_the_moments_and_nothing_else() -> None:
    model = _model()
    twin = matched_random(model, seed=1, keep=("classifier",))
    for (name, old), new in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name.startswith("classifier"):
            torch.testing.assert_close(new, old)
            continue
        torch.testing.assert_close(new.mean(), old.mean(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(new.norm(), old.norm(), rtol=1e-5, atol=1e-6)
        if old.std() > 0:
            assert (
                abs(
                    torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1],
                )
                < 4 / old.numel() ** 0.5
            )
    again, other = matched_random(model, seed=1), matched_random(model, seed=2)
    weight = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(again.get_parameter(weight), twin.get_parameter(weight))
    assert not torch.equal(other.get_parameter(weight), twin.get_parameter(weight))


def test_a_shuffled_twin_has_the_same_entries() -> None:
    model = _model()
    twin = shuffled(model, seed=3)
    for old, new in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    weight = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(model.get_parameter(weight), twin.get_parameter(weight))


def test_what_lies_below_a_cut() -> None:
    model = _model()
    assert list(below(model, 0)) == []
    names = [name for name, _ in below(model, 2)]
    assert (
        "bert.embeddings.word_embeddings.weight" in names
        and "bert.encoder.layer.1.output.dense.bias" in names
    )
    assert not any(name.startswith(("bert.encoder.layer.2", "bert.pooler", "classifier")) for name in names)
    for _, parameter in below(model, 2):
        parameter.requires_grad_(False)
    loss = model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss
    loss.backward()
    assert all((parameter.grad is None) == (name in names) for name, parameter in model.named_parameters())
    with pytest.raises(ValueError, match="first: got 4"):
        list(below(model, 4))


def test_copying_the_first_layers() -> None:
    source, target = _model(0), _model(1)
    before = {name: value.clone() for name, value in target.named_parameters()}
    copy_first(source, target, 1)
    names = {name for name, _ in below(target, 1)}
    for name, value in target.named_parameters():
        assert torch.equal(value, source.get_parameter(name) if name in names else before[name])


def test_packed_weights_have_no_twin() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(InputError, match="packed is quantized"):
        shuffled(model)
