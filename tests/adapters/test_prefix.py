"""Prefix tuning inside attention: against PEFT's own where that is right, and against the base model that
reads the text itself.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor, nn

import peftkern
from peftkern.adapters.prefix import inside_attention, load_prefix, outside_attention, prefix_model

from ..patching.models import llama

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(1, 96, (7,), generator=torch.Generator().manual_seed(2))
PADDED = torch.ones_like(IDS)
PADDED[1, :4] = 0


def config(count: int = 5, **options: Any) -> peft.PrefixTuningConfig:
    return peft.PrefixTuningConfig(num_virtual_tokens=count, task_type="CAUSAL_LM", **options)


def dense(**options: Any) -> nn.Module:
    return llama(four_bit=False, **options).requires_grad_(False).eval()


def pair(base: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's prefix model and, of the same values, ours."""
    torch.manual_seed(3)
    stock = peft.get_peft_model(base, config(**options))
    for parameter in stock.prompt_encoder.parameters():
        parameter.data.mul_(0.5)
    ours = copy.deepcopy(stock)
    inside_attention(ours)
    return stock, ours


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def results(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """logits, loss and the gradients of the prefix."""
    inputs = {"input_ids": IDS, "labels": IDS} | inputs
    out = model(**inputs)
    model.zero_grad()
    out.loss.backward()
    return [out.logits.detach(), out.loss.detach(), *(parameter.grad for parameter in trained(model))]


def assert_same(got: list[Tensor], want: list[Tensor], **tolerances: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 24}], ids=str)
def test_values_and_gradients_are_pefts(implementation: str, options: dict[str, Any]) -> None:
    base = dense()
    base.set_attn_implementation(implementation)
    stock, ours = pair(base, **options)
    assert_same(results(ours), results(stock), rtol=1e-4, atol=1e-6)
    padded = {"attention_mask": PADDED, "labels": IDS.masked_fill(PADDED == 0, -100)}
    got, want = results(ours, **padded), results(stock, **padded)
    seen = PADDED.bool()
    assert_same([got[0][seen], *got[1:]], [want[0][seen], *want[1:]], rtol=1e-4, atol=1e-6)
    if version.parse(peft.__version__) < version.parse("0.21"):
        return  # it leaves given positions out, with a warning
    positions = torch.arange(3, 15)[None]
    assert_same(
        results(ours, position_ids=positions),
        results(stock, position_ids=positions),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("projection", [{}, {"prefix_projection": True, "encoder_hidden_size": 24}], ids=str)
def test_zero_keys_are_no_start_without_effect(projection: dict[str, Any]) -> None:
    """PEFT's init_weights="zero": five keys of logit 0 and value 0 take their part of each softmax."""
    base = dense()
    model = prefix_model(copy.deepcopy(base), config(**projection), init="zero")
    assert (model(IDS).logits - base(IDS).logits).abs().max() > 1e-2
    assert not model.get_prompt_embedding_to_save("default").any()


def test_a_text_prefix_is_the_base_after_that_text() -> None:
    base = dense()
    model = prefix_model(copy.deepcopy(base), config(), text=TEXT)
    want = base(torch.cat([TEXT[None, :5].expand(2, -1), IDS], 1)).logits[:, 5:]
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_start_is_the_base_bit_for_bit_and_learns(dtype: torch.dtype) -> None:
    base = dense(dtype=dtype)
    model = prefix_model(copy.deepcopy(base), config(), text=TEXT, init="gate")
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS, attention_mask=PADDED).logits, base(IDS, attention_mask=PADDED).logits)
    encoder = model.prompt_encoder["default"]
    embedding, gate = torch.autograd.grad(
        model(IDS, labels=IDS).loss,
        (encoder.embedding.weight, encoder.gate),
    )
    assert gate.abs().min() > 0 and not embedding.any()
    encoder.gate.data.fill_(0.5)
    assert not torch.equal(model(IDS).logits, base(IDS).logits)


def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Without a cache."""
    for _ in range(count):
        ids = torch.cat(
            [ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)],
            1,
        )
    return ids


@pytest.mark.parametrize("init", ["random", "text", "gate"])
@torch.no_grad()
def test_generation(init: str) -> None:
    model = prefix_model(dense(), config(), text=TEXT, init=init)
    if init == "gate":
        model.prompt_encoder["default"].gate.data.normal_()
    want = greedy(model, IDS, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **options), want)
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(IDS)], 1)
    padded = model.generate(input_ids=torch.cat([padding, IDS], 1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 15:], want[:, 12:])
    static = model.generate(input_ids=IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, want)
    beams = model.generate(input_ids=IDS, num_beams=2, **options)
    assert beams.shape == want.shape


@pytest.mark.parametrize("init", ["text", "gate", "projection"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["checkpointing first", "prefix first"])
def test_gradient_checkpointing(init: str, reentrant: bool, first: bool) -> None:
    def model(checkpointing: bool) -> nn.Module:
        torch.manual_seed(0)
        base, how = dense(), {"use_reentrant": reentrant}
        if checkpointing and first:
            base.gradient_checkpointing_enable(how)
        if init == "projection":
            made = prefix_model(base, config(prefix_projection=True, encoder_hidden_size=24), init="random")
        else:
            made = prefix_model(base, config(), text=TEXT, init=init)
        if checkpointing and not first:
            made.gradient_checkpointing_enable(how)
        if init == "gate":
            made.prompt_encoder["default"].gate.data.fill_(0.3)
        return made.train()

    assert_same(results(model(True)), results(model(False)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["random", "gate"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compiled_in_one_graph(init: str, implementation: str) -> None:
    base = dense()
    base.set_attn_implementation(implementation)
    model = prefix_model(base, config(), text=TEXT, init=init)
    want = results(model, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(input_ids=IDS, labels=IDS, use_cache=False)
    assert_same(
        [out.logits, out.loss, *torch.autograd.grad(out.loss, trained(model))],
        want,
        rtol=1e-4,
        atol=1e-6,
    )
    assert torch.equal(model(IDS).logits, want[0])
    with model.disable_adapter():  # recompiles
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, model(IDS).logits)


@pytest.mark.parametrize("order", ["patched first", "prefix first"])
@pytest.mark.parametrize("init", ["text", "gate"])
def test_four_bit_and_patched(order: str, init: str) -> None:
    base = llama(torch.float32).eval()
    plain = prefix_model(copy.deepcopy(base), config(), text=TEXT, init=init)
    if order == "patched first":
        peftkern.patch(base)
    model = prefix_model(base, config(), text=TEXT, init=init)
    if order == "prefix first":
        peftkern.patch(model)
    for each in (plain, model):
        if init == "gate":
            each.prompt_encoder["default"].gate.data.fill_(0.3)
    want = results(plain)
    assert_same(results(model), want, rtol=1e-3, atol=1e-5)
    peftkern.patch(model)
    assert_same(results(model), want, rtol=1e-3, atol=1e-5)
    assert peftkern.unpatch(model) > 0
    exact = order == "prefix first"  # else the text's keys and values are those of the patched base
    assert_same(results(model), want, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-5)
    assert peftkern.unpatch(model) == 0


def test_fused_loss_sees_the_prefix() -> None:
    model = prefix_model(llama(torch.float32), config(), text=TEXT).train()
    want = results(model)[1:]
    peftkern.patch(model, fused_loss=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert_same([loss.detach(), *torch.autograd.grad(loss, trained(model))], want, rtol=1e-3, atol=1e-5)


def test_several_prefixes() -> None:
    base = dense()
    model = prefix_model(copy.deepcopy(base), config(5), text=TEXT)
    model.add_adapter("other", config(3))
    first = model(IDS).logits
    model.set_adapter("other")
    alone = prefix_model(copy.deepcopy(base), config(3), init="random")
    alone.prompt_encoder["default"].load_state_dict(model.prompt_encoder["other"].state_dict())
    assert torch.equal(model(IDS).logits, alone(IDS).logits)
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
        assert torch.equal(model.get_base_model()(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS).logits, first)


def test_files_are_pefts(tmp_path: Path) -> None:
    base = dense()
    stock, ours = pair(copy.deepcopy(base))
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "ours/adapter_config.json").read_text() == (
        tmp_path / "stock/adapter_config.json"
    ).read_text()
    by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    by_us = load_prefix(copy.deepcopy(base), tmp_path / "stock")
    want = stock.eval()(input_ids=IDS).logits
    assert torch.equal(by_peft(input_ids=IDS).logits, want)
    torch.testing.assert_close(by_us(IDS).logits, want, rtol=1e-4, atol=1e-6)
    trainable = load_prefix(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    assert len(trained(trainable)) == 1


def test_a_gated_prefix_in_files(tmp_path: Path) -> None:
    base = dense()
    model = prefix_model(copy.deepcopy(base), config(), text=TEXT, init="gate")
    model.prompt_encoder["default"].gate.data.normal_()
    model.save_pretrained(tmp_path)
    again = load_prefix(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.prompt_encoder["default"].gate.data.zero_()
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(KeyError, match="prompt_embeddings"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match="has a gate"):
        outside_attention(model)


@pytest.mark.parametrize("init", ["text", "gate"])
def test_copies_and_pickles(init: str) -> None:
    model = prefix_model(dense(), config(), text=TEXT, init=init)
    if init == "gate":
        model.prompt_encoder["default"].gate.data.fill_(0.3)
    want = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(IDS).logits, want)
        twin.prompt_encoder["default"].embedding.weight.data.mul_(2)
        assert not torch.equal(twin(IDS).logits, want)
    assert torch.equal(model(IDS).logits, want)


def test_taken_out_again() -> None:
    base = dense()
    before = {name: dict(module.__dict__) for name, module in base.named_modules()}
    stock, ours = pair(base)
    keys = set(stock.state_dict())
    want = results(stock)
    assert set(ours.state_dict()) == keys
    outside_attention(ours)
    assert_same(results(ours), want, rtol=0, atol=0)
    for name, module in ours.get_base_model().named_modules():
        assert set(module.__dict__) == set(before[name]), name


def test_the_batch_is_no_copy_of_the_prefix() -> None:
    """Nothing of a sample's prefix is kept for backward: saved tensors grow with the batch by what the base
    saves alone.
    """

    def saved(model: nn.Module, batch: int) -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t,
            lambda t: t,
        ):
            model(IDS[:1].expand(batch, -1).contiguous(), use_cache=False)
        return sum(sizes.values())

    few, many = (prefix_model(dense(), config(count), init="random") for count in (1, 40))
    growth = [saved(model, 8) - saved(model, 4) for model in (few, many)]
    assert growth[0] == growth[1]
