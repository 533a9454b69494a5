"""Attention's backward by groups of key/value heads: the whole's numbers, and whole where it cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.memory.attention_groups import (
    GroupedAttention,
    _ByGroups,
    attention_by_groups,
    attention_whole,
    grouped_sdpa,
)
from peftkern.patching.attention import around_of, surround

from ..ops.bounds import assert_as_accurate
from ..patching import models, zoo

# B, query heads, key/value heads, S, d
SHAPES = [(2, 4, 2, 33, 16), (1, 8, 2, 130, 64), (2, 6, 6, 70, 32), (3, 9, 3, 1, 64)]


def operands(b: int, heads: int, kv: int, s: int, d: int, **options) -> list[Tensor]:
    """q, k, v as a decoder layer has them: heads beside each other in a row."""
    return [torch.randn(b, s, n, d, **options).transpose(1, 2).requires_grad_() for n in (heads, kv, kv)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of few heads torch leaves the threads to MKL, which then cuts its sums otherwise than for many
    heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_whole_bit_for_bit(
    shape: tuple[int, ...], causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = operands(*shape, dtype=dtype)
    d_out, options = torch.randn_like(q), {"is_causal": causal, "scale": 0.3}
    whole = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    expected = torch.autograd.grad(whole, (q, k, v), d_out)
    for groups in {1, shape[2]}:
        out = grouped_sdpa(q, k, v, groups=groups, **options)
        assert torch.equal(out, whole) and out.stride() == whole.stride()
        for got, value in zip(torch.autograd.grad(out, (q, k, v), d_out), expected, strict=True):
            assert torch.equal(got, value)


def test_gradients_with_every_thread_round_as_torch_does() -> None:
    """Against fp64, no further than the whole errs."""
    q, k, v = operands(1, 8, 2, 130, 64)
    d_out = torch.randn_like(q)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = F.scaled_dot_product_attention(*wide, enable_gqa=True, is_causal=True)
    exact = torch.autograd.grad(exact_out, wide, d_out.double())
    whole = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
    plain = torch.autograd.grad(whole, (q, k, v), d_out)
    ours = torch.autograd.grad(grouped_sdpa(q, k, v, groups=2, is_causal=True), (q, k, v), d_out)
    for name, *values in zip(("dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_as_accurate(name, *values)


def test_gradients_are_right() -> None:
    q, k, v = (t.detach().double().requires_grad_() for t in operands(1, 4, 2, 9, 8))
    torch.autograd.gradcheck(lambda *t: grouped_sdpa(*t, groups=2, is_causal=True), (q, k, v))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for_has_a_gradient(needed: tuple[int, ...]) -> None:
    tensors = operands(*SHAPES[0])
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in needed)
    grouped_sdpa(*tensors, groups=2).sum().backward()
    assert [t.grad is not None for t in tensors] == [index in needed for index in range(3)]


def test_the_same_tensors_are_saved() -> None:
    counts = []
    for call in (F.scaled_dot_product_attention, lambda *t, **o: grouped_sdpa(*t, groups=2)):
        saved, tensors = {}, operands(*SHAPES[0])
        with saved_tensors_hooks(lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t):
            call(*tensors, enable_gqa=True)
        counts.append(sorted(t.untyped_storage().nbytes() for t in saved.values()))
    assert counts[0] == counts[1] and len(counts[0]) == 5


class Kernels(TorchDispatchMode):
    """The heads that each call of a flash attention backward gets, of the queries and of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention" in func.name() and "backward" in func.name():
            self.heads.append((args[1].shape[1], args[2].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("groups", "heads"), [(1, [(8, 4)]), (2, [(4, 2)] * 2), (4, [(2, 1)] * 4)])
def test_a_kernel_gets_the_heads_of_one_group(groups: int, heads: list[tuple[int, int]]) -> None:
    out = grouped_sdpa(*operands(1, 8, 4, 16, 8), groups=groups)
    with Kernels() as kernels:
        out.sum().backward()
    assert kernels.heads == heads


def test_the_operators_of_a_gpu_take_the_arguments() -> None:
    """By their shape functions, on tensors without memory: what they compute is for the test on a GPU."""
    q, k, v = (torch.empty(t.shape, device="meta", requires_grad=True) for t in operands(2, 8, 2, 64, 32))
    with Kernels() as kernels:
        out = _ByGroups.apply(q, k, v, True, None, 2)
        out.sum().backward()
    assert out.shape == q.shape and kernels.heads == [(4, 1)] * 2
    assert [t.grad.shape for t in (q, k, v)] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 32, 8, 512, 128), (1, 8, 2, 1000, 64), (2, 6, 6, 257, 96)], ids=str)
def test_on_a_gpu_it_errs_no_more_than_the_whole(shape: tuple[int, ...]) -> None:
    q, k, v = operands(*shape, dtype=torch.bfloat16, device="cuda")
    d_out = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        plain = torch.autograd.grad(whole, (q, k, v), d_out)
        out = grouped_sdpa(q, k, v, groups=shape[2], is_causal=True)
        ours = torch.autograd.grad(out, (q, k, v), d_out)
    with sdpa_kernel(SDPBackend.MATH):
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        exact = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
        truth = torch.autograd.grad(exact, wide, d_out.double())
    assert torch.equal(out, whole)
    for got, stock, true in zip(ours, plain, truth, strict=True):
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (got, stock))
        assert error <= 1.1 * allowed


# ---- in models


def grouped(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(around_of(module), GroupedAttention)]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "phi3", "gpt-neox")),
    ],
)
def test_a_model_has_the_gradients_it_had(name: str, patched: bool) -> None:
    model = zoo.build(name)
    if patched:
        peftkern.patch(model)
    expected = models.run(model, zoo.TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gemma's sliding windows
        report = attention_by_groups(model)
        with Kernels() as kernels:
            got = models.run(model, zoo.TEXT)
    assert len(report.grouped) == 2 and not report.refused
    heads = 4 if name == "gpt-neox" else 2  # of keys
    layers = 1 if name == "gemma3" else 2
    assert kernels.heads.count((4 // heads, 1)) == layers * heads
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert sum(report.whole.values()) == 2 - layers
    assert attention_whole(model) == 2 and not grouped(model)
    assert all(around_of(module) is None for module in model.modules())


def test_it_stays_through_patch_and_unpatch_and_checkpointing() -> None:
    model = models.lora(models.llama())
    attention_by_groups(model, groups=2)
    peftkern.patch(model)
    without = models.run(model)
    model.enable_input_require_grads()
    for layer in model.get_base_model().model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    with Kernels() as kernels:
        got = models.run(model)
    assert kernels.heads == [(2, 1)] * 4
    assert all(torch.equal(got[key], value) for key, value in without.items())
    peftkern.unpatch(model)
    assert len(grouped(model)) == 2 and attention_whole(model) == 2


@pytest.mark.parametrize("how", models.COPIES)
def test_a_copy_runs_by_groups(how: str) -> None:
    model = models.lora(models.llama())
    attention_by_groups(model)
    twin = models.copied(model, how)
    with Kernels() as kernels:
        models.run(twin)
    assert kernels.heads == [(2, 1)] * 4
    attention_whole(twin)
    assert len(grouped(model)) == 2


def test_autocast_casts_as_torch_does() -> None:
    model = zoo.build("llama")
    results = []
    for by_groups in (False, True):
        if by_groups:
            attention_by_groups(model)
        with torch.autocast("cpu", torch.bfloat16), Kernels() as kernels:
            results.append(models.run(model, zoo.TEXT))
    assert len(kernels.heads) == 4
    assert all(torch.equal(results[1][key], value) for key, value in results[0].items())


def test_a_mask_is_served_by_the_whole_and_reported() -> None:
    model = models.lora(models.llama())
    mask = torch.ones_like(models.IDS)
    mask[0, :3] = 0
    expected = model(input_ids=models.IDS, attention_mask=mask).logits
    report = attention_by_groups(model)
    with pytest.warns(UserWarning, match="attention's backward runs whole: a mask is given"):
        got = model(input_ids=models.IDS, attention_mask=mask).logits
    assert torch.equal(got, expected)
    assert sum(report.whole.values()) == 2 and "2 calls whole: a mask is given" in str(report)


def test_what_torch_does_not_run_by_flash_attention_is_refused() -> None:
    tensors = operands(*SHAPES[0])
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.raises(ValueError, match="torch runs its math attention here"),
    ):
        grouped_sdpa(*tensors, groups=2)
    with pytest.raises(ValueError, match="3 groups do not divide its 2 key/value heads"):
        grouped_sdpa(*tensors, groups=3)


def test_eager_attention_runs_by_tiles() -> None:
    """tests/memory/test_attention_eager.py says with what numbers."""
    model = models.lora(models.llama())
    model.get_base_model().set_attn_implementation("eager")
    report = attention_by_groups(model)
    models.run(model)
    assert len(report.tiled) == 2 and not report.whole
    assert "2 of them, and their masks, by tiles of queries" in str(report)


def test_what_stood_around_attention_stays_there() -> None:
    model, seen = models.lora(models.llama()), []
    layers = [module for name, module in model.named_modules() if name.endswith("self_attn")]

    def watch(function, kind, *args, **kwargs):
        seen.append(kind)
        return function(*args, **kwargs)

    for layer in layers:
        surround(layer, watch)
    attention_by_groups(model)
    with Kernels() as kernels:
        models.run(copy.copy(model))
    assert seen == ["sdpa"] * 2 and kernels.heads == [(2, 1)] * 4
    attention_whole(model)
    assert all(around_of(layer) is watch for layer in layers)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention module can run by groups: it has none"):
        attention_by_groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="groups: got 0"):
        attention_by_groups(models.llama(), groups=0)
    model = models.llama()
    report = attention_by_groups(model, exclude=["layers.0"])
    assert report.refused == {"model.layers.0.self_attn": "excluded by 'layers.0'"}
