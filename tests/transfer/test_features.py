"""Pooled features against the hidden states that transformers returns, pooled by hand in fp64."""

# ruff: noqa: E402

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.finetune.errors import InputError

transformers = pytest.importorskip(
    "transformers",
    reason="transformers is not installed: pip install 'peftkern[transfer]'",
)
peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peftkern[transfer]'")

from peftkern.transfer.features import adapters_disabled, layer_stack, pool_last, pool_mean, pooled_features

_SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=96)


def _llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, pad_token_id=0),
    )


def _bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**_SIZES, max_position_embeddings=64))


def _t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


class _Letters:
    """A tokenizer of one token a letter."""

    pad_token_id, eos_token_id = None, 1

    def __call__(
        self,
        texts: list[str],
        *,
        truncation: bool,
        max_length: int = 512,
        **_: object,
    ) -> dict[str, list[list[int]]]:
        length = max_length if truncation else None
        return {"input_ids": [[2 + ord(letter) % 90 for letter in text][:length] for text in texts]}


def _batch(*lengths: int, left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(2, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if left else slice(length)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _by_hand(hidden: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    means, lasts = [], []
    for states, tokens in zip(hidden.double(), mask.bool(), strict=True):
        real = states[tokens]
        means.append(real[1:].mean(0) if len(real) > 1 else real[0])
        lasts.append(real[-1])
    return torch.stack(means).detach().numpy(), torch.stack(lasts).detach().numpy()


@pytest.mark.parametrize("left", [False, True])
def test_pooling_is_over_tokens_alone(left: bool) -> None:
    mask = _batch(5, 1, 3, left=left)["attention_mask"]
    hidden = torch.randn(3, 5, 7, dtype=torch.float64)
    mean, last = _by_hand(hidden, mask)
    np.testing.assert_allclose(pool_mean(hidden, mask), mean, rtol=1e-12)
    np.testing.assert_array_equal(pool_last(hidden, mask), last)


def test_pooling_without_a_mask_and_with_virtual_tokens() -> None:
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(pool_mean(hidden, skip_first=False), hidden.mean(1))
    torch.testing.assert_close(pool_mean(hidden, torch.ones(2, 2)), hidden[:, 3])
    with pytest.raises(ValueError, match="mask: got shape"):
        pool_mean(hidden, torch.ones(2, 5))


def test_pooling_has_gradients() -> None:
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda h: pool_mean(h, mask) + pool_last(h, mask), hidden)


@pytest.mark.parametrize("make", [_llama, _bert])
def test_features_are_the_hidden_states_pooled(make) -> None:
    model = make()
    batches = [_batch(9, 4, 1), _batch(6, 6)]
    features = pooled_features(model, batches)
    assert features.depths == (0, 1, 2, 3) and len(features) == 5
    for start, batch in ((0, batches[0]), (3, batches[1])):
        with torch.no_grad():
            states = model.eval()(**batch, output_hidden_states=True).hidden_states
        rows = slice(start, start + len(batch["input_ids"]))
        for depth in range(3):  # transformers' last one is behind the final norm in Llama
            mean, last = _by_hand(states[depth], batch["attention_mask"])
            np.testing.assert_allclose(features.at(depth)[rows], mean, atol=1e-6)
            np.testing.assert_allclose(features.at(depth, "last")[rows], last, atol=1e-6)
        final = getattr(getattr(model, "model", None), "norm", nn.Identity())
        with torch.no_grad():
            got = final(torch.tensor(np.array(features.at(-1, "last")[rows])))
        np.testing.assert_allclose(got, _by_hand(states[3], batch["attention_mask"])[1], atol=1e-5)


def test_texts_come_back_in_their_order_and_padding_changes_nothing() -> None:
    model, texts = _llama(), ["a long one, in letters", "b", "some more", "cc"]
    together = pooled_features(model, texts, tokenizer=_Letters(), batch_size=3)
    for index, text in enumerate(texts):
        alone = pooled_features(model, [text], tokenizer=_Letters())
        np.testing.assert_allclose(together.at(2)[index], alone.at(2)[0], atol=1e-6)
    cut = pooled_features(model, texts, tokenizer=_Letters(), max_length=8)
    assert (together.truncated, cut.truncated) == (0, 2)


def test_the_encoder_of_an_encoder_decoder() -> None:
    model = _t5()
    assert layer_stack(model)[0] == "encoder.block"
    batch = _batch(5, 2)
    with torch.no_grad():
        states = model.eval().encoder(**batch, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(
        pooled_features(model, [batch]).at(1),
        _by_hand(states[1], batch["attention_mask"])[0],
        atol=1e-6,
    )


def test_layers_that_a_model_shares_count_as_often_as_they_are_called() -> None:
    config = transformers.AlbertConfig(**_SIZES, embedding_size=16, max_position_embeddings=64)
    model, batch = transformers.AlbertModel(config).eval(), _batch(5, 3)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    features = pooled_features(model, [batch])
    assert features.depths == (0, 1, 2, 3)
    for depth in features.depths:
        np.testing.assert_allclose(
            features.at(depth),
            _by_hand(states[depth], batch["attention_mask"])[0],
            atol=1e-6,
        )


def test_the_pass_ends_at_the_last_depth_and_leaves_the_model_as_it_was() -> None:
    model, ran = _llama().train(), []
    handles = [
        layer.register_forward_hook(
            lambda *_, i=i: ran.append(i),
        )
        for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    few = pooled_features(model, [_batch(5, 5)], depths=[1])
    assert ran == [0, 1, 2, "head", 0]  # once with a few tokens, to count
    assert few.depths == (1,) and all(module.training for module in model.modules())
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    np.testing.assert_array_equal(few.at(1), pooled_features(model, [_batch(5, 5)]).at(1))


def test_adapters_off_is_the_base() -> None:
    model, batch = _llama(), _batch(6, 3)
    base = pooled_features(model, [batch])
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    assert not np.allclose(pooled_features(tuned, [batch]).at(1), base.at(1), atol=1e-4)
    np.testing.assert_array_equal(pooled_features(tuned, [batch], adapters=False).at(3), base.at(3))
    inner = tuned.get_base_model()  # adapters are injected, there is no PeftModel around them
    np.testing.assert_array_equal(pooled_features(inner, [batch], adapters=False).at(3), base.at(3))
    with adapters_disabled(inner):
        pass
    assert not np.allclose(pooled_features(inner, [batch]).at(1), base.at(1), atol=1e-4)


def test_a_patched_model_gives_the_same() -> None:
    model, batch = _llama(), _batch(6, 3)
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    peftkern.patch(tuned)
    for adapters in (True, False):
        patched = pooled_features(tuned, [batch], adapters=adapters)
        peftkern.unpatch(tuned)
        stock = pooled_features(tuned, [batch], adapters=adapters)
        np.testing.assert_allclose(patched.at(3), stock.at(3), atol=2e-5)
        peftkern.patch(tuned)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_not_pooled(kind: str) -> None:
    model, batch = _llama(), _batch(6, 3, 1)
    base = pooled_features(model, [batch])
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    np.testing.assert_array_equal(pooled_features(tuned, [batch], adapters=False).at(3), base.at(3))
    features = pooled_features(tuned, [batch])
    np.testing.assert_allclose(features.at(0), base.at(0), atol=1e-6)  # the embeddings of the text alone
    assert not np.allclose(features.at(3), base.at(3), atol=1e-3)  # which see the virtual tokens in attention


def test_memory_is_bounded(tmp_path) -> None:
    model, batch = _llama(), _batch(6, 3, 4)
    features = pooled_features(model, [batch])
    with pytest.raises(InputError, match="give directory="):
        pooled_features(model, [batch], memory_limit=1000)
    mapped = pooled_features(model, [batch], memory_limit=1000, directory=tmp_path)
    assert isinstance(mapped.arrays["mean"], np.memmap)
    np.testing.assert_array_equal(mapped.at(2), features.at(2))
    small = pooled_features(model, [batch], project=8)
    assert small.at(0).shape == (3, 8)
    projection = np.linalg.lstsq(features.at(0), small.at(0), rcond=None)[0]
    np.testing.assert_allclose(features.at(0) @ projection, small.at(0), atol=1e-4)


def test_bad_input_is_named() -> None:
    model = _llama()
    with pytest.raises(InputError, match="no texts"):
        pooled_features(model, [])
    with pytest.raises(InputError, match="text 1 is empty"):
        pooled_features(model, ["a", ""], tokenizer=_Letters())
    with pytest.raises(ValueError, match="tokenizer: got None"):
        pooled_features(model, ["a"])
    with pytest.raises(ValueError, match="pools: got"):
        pooled_features(model, [_batch(2)], pools=("max",))
    with pytest.raises(ValueError, match="depths: got"):
        pooled_features(model, [_batch(2)], depths=[4])
    with pytest.raises(ValueError, match="no nn.ModuleList"):
        layer_stack(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pool: got 'first'"):
        pooled_features(model, [_batch(2)]).at(0, "first")
