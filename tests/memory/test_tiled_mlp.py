"""MLPs in tiles: the numbers of the whole MLP, its input saved and nothing else, no product computed a third
time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.memory.count import MemoryCount
from peftkern.memory.tiled_mlp import TiledMLP, tile_mlps, untile_mlps
from peftkern.memory.tiles import mlp_tile_bytes
from peftkern.ops import flops

from ..patching import models, zoo
from ..patching.test_values import SEEDS, UNIT, rms
from ..patching.versions import exact

# Architecture, 4-bit base, patched, dtype.
CASES = [
    ("llama", True, True, torch.float32),
    ("llama", True, True, torch.bfloat16),
    pytest.param("llama", True, False, torch.float32, marks=pytest.mark.slow),
    pytest.param("phi3", False, True, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param("gemma2", True, True, torch.float32, marks=pytest.mark.slow),
    pytest.param("gpt-neox", False, False, torch.float32, marks=pytest.mark.slow),
]


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), TiledMLP)]


def train(model: nn.Module) -> dict[str, Tensor]:
    return models.run(model, zoo.TEXT)


@pytest.mark.parametrize(("name", "four_bit", "patched", "dtype"), CASES)
@exact
def test_a_tiled_model_errs_no_more_than_a_whole_one(
    name: str, four_bit: bool, patched: bool, dtype: torch.dtype
) -> None:
    whole, tiled = [], []
    for seed in SEEDS[:2]:
        model = zoo.build(name, four_bit=four_bit, seed=seed, dtype=dtype)
        truth = zoo.train_exactly(model)
        if patched:
            peftkern.patch(model)
        whole.append(models.errors(zoo.train(copy.deepcopy(model)), truth))
        assert len(tile_mlps(model, tile=7).tiled) == 2
        tiled.append(models.errors(zoo.train(model), truth))
    for key in whole[0]:
        bound = 1.5 * rms(whole, key) + UNIT[dtype] / 32
        assert rms(tiled, key) <= bound, f"{key}: {rms(tiled, key):.2e} > {bound:.2e}"


# ---- what runs, and how often


class Rows:
    """Counts the rows that a model's MLPs compute."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        for module in mlps(model):
            blocks = module.forward.blocks
            blocks.call = self._counted(blocks.call)

    def _counted(self, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counted(x: Tensor) -> Tensor:
            self.count += x.numel() // x.shape[-1]
            return call(x)

        return counted


def checkpointed(model: nn.Module) -> nn.Module:
    model.enable_input_require_grads()
    for layer in model.get_base_model().model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    return model


@pytest.mark.parametrize("patched", [True, False])
def test_no_row_is_computed_a_third_time_in_a_checkpointed_layer(patched: bool) -> None:
    model = models.lora(models.llama())
    if patched:
        peftkern.patch(model)
    tile_mlps(model, tile=7)
    without = train(model)
    rows, tokens = Rows(checkpointed(model)), zoo.TEXT.numel()
    for _ in range(2):  # the first call finds out the output's dtype besides
        rows.count = 0
        got = train(model)
        assert rows.count == 2 * 2 * tokens, "two layers, once forward and once in backward"
    assert all(torch.equal(got[key], value) for key, value in without.items())


class Products(TorchDispatchMode):
    """Floating-point operations of matrix products, by torch's formulas and ours. torch's own mode puts hooks
    on modules, for which the fused functions step aside."""

    def __init__(self) -> None:
        super().__init__()
        flops.register()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_counter.flop_registry.get(func._overloadpacket)
        self.count += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_plain_checkpointing(dtype: torch.dtype) -> None:
    counts = []
    for tiled in (False, True):
        model = models.lora(models.llama(dtype))
        peftkern.patch(model)
        if tiled:
            tile_mlps(model, tile=5)
        checkpointed(model)
        with Products() as products:
            train(model)
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


def test_a_norm_behind_the_mlp_has_its_output_computed_again() -> None:
    """Its backward reads what it normalizes: rows run three times, and the gradients are right."""
    model = zoo.build("gemma2", four_bit=True)
    tile_mlps(model, tile=7)
    without = train(model)
    rows = Rows(checkpointed(model))
    got = train(model)
    assert rows.count == 3 * 2 * zoo.TEXT.numel()
    assert all(torch.equal(got[key], value) for key, value in without.items())


def test_without_early_stopping_the_numbers_are_the_same() -> None:
    model = models.lora(models.llama())
    tile_mlps(model, tile=7)
    without = train(model)
    rows = Rows(checkpointed(model))
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        got = train(model)
    assert rows.count == 3 * 2 * zoo.TEXT.numel()
    assert all(torch.equal(got[key], value) for key, value in without.items())


def test_the_input_alone_is_saved() -> None:
    model = models.lora(models.llama())
    peftkern.patch(model)
    tile_mlps(model, tile=7)
    mlp, saved = mlps(model)[0], []
    x = torch.randn(2, 12, 64, requires_grad=True)
    mlp(x)
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = mlp(x)
    assert [tuple(t.shape) for t in saved] == [(24, 64)]
    assert saved[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert y.shape == x.shape and y.requires_grad


# ---- gradients


class Wide(nn.Module):
    """A linear pair whose parameters' gradients are easily told."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, dtype=dtype), nn.Linear(8, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def test_sums_over_tiles_are_kept_in_fp32() -> None:
    """1 a tile, 1,000 times: a sum in bf16 stays at 256."""
    model = Wide(torch.bfloat16)
    tile_mlps(model, tile=1)
    model(torch.zeros(1, 1000, 4, dtype=torch.bfloat16)).sum().backward()
    assert model.down.bias.grad.dtype == torch.bfloat16
    assert model.down.bias.grad.tolist() == [1000.0] * 4


def test_hooks_on_parameters_see_one_gradient() -> None:
    model, seen = Wide(torch.float32), []
    model.up.weight.register_hook(lambda grad: seen.append("grad") or grad * 2)
    model.up.weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    whole, x = copy.deepcopy(model), torch.randn(1, 10, 4)
    whole(x).square().sum().backward()
    tile_mlps(model, tile=3)
    model(x).square().sum().backward()
    assert seen == ["grad", "accumulated"]
    torch.testing.assert_close(model.up.weight.grad, 2 * whole.up.weight.grad)
    assert model._parameters.keys() == whole._parameters.keys()


def test_only_what_is_asked_for_has_a_gradient() -> None:
    model = Wide(torch.float32)
    model.up.requires_grad_(False)
    tile_mlps(model, tile=3)
    x = torch.randn(1, 10, 4)
    model(x).sum().backward()
    assert model.up.weight.grad is None and model.down.weight.grad is not None
    model.requires_grad_(False)
    assert not model(x).requires_grad
    x.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, (model.down.weight @ model.up.weight).sum(0).expand(1, 10, 4))


@pytest.mark.parametrize("patched", [True, False])
def test_dropout_draws_the_same_masks_in_backward(patched: bool) -> None:
    """Against autograd through the same tiles, one after the other, from the same state of the generator."""
    model = models.lora(models.llama(), lora_dropout=0.5)
    if patched:
        peftkern.patch(model)
    tile_mlps(model, tile=8)
    mlp, x = mlps(model)[0], torch.randn(1, 24, 64)
    results = []
    for tiled in (True, False):
        model.zero_grad(set_to_none=True)
        own = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = mlp(own) if tiled else torch.cat([mlp.forward.whole(part) for part in own.split(8, dim=1)], 1)
        state = torch.get_rng_state()
        torch.manual_seed(99)
        y.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(99).get_state())
        results.append({"y": y.detach(), "x": own.grad, "state": state} | models.grads(mlp))
    tiled, expected = results
    assert tiled.keys() == expected.keys() and len(tiled) == 9
    for key, value in expected.items():
        torch.testing.assert_close(tiled[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_autocast_is_the_same_in_backward() -> None:
    model = models.lora(models.llama(four_bit=False))
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 12, 64)

    def run() -> dict[str, Tensor]:
        mlp.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = mlp(x)
        y.float().square().sum().backward()
        return {"y": y.detach()} | models.grads(mlp)

    whole = run()
    tile_mlps(model, tile=4)
    tiled = run()
    assert tiled["y"].dtype == whole["y"].dtype == torch.bfloat16
    for key, value in whole.items():
        torch.testing.assert_close(tiled[key], value, rtol=0, atol=0.02 * value.abs().max().item(), msg=key)


def test_a_second_derivative_is_refused() -> None:
    model = Wide(torch.float32)
    tile_mlps(model, tile=3)
    x = torch.randn(1, 10, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_parameter_written_to_in_between_is_noticed() -> None:
    model = Wide(torch.float32)
    tile_mlps(model, tile=3)
    loss = model(torch.randn(1, 10, 4)).sum()
    with torch.no_grad():
        model.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"weight \(8, 4\) was written to between forward and backward"):
        loss.backward()


def test_a_trained_tensor_that_is_no_parameter_is_noticed() -> None:
    model = Wide(torch.float32)
    scale, inner = torch.ones((), requires_grad=True), model.down.forward
    tile_mlps(model, tile=3)
    model.down.forward = lambda x: inner(x) * scale
    with pytest.raises(RuntimeError, match=r"Wide: its output depends on a trained tensor \(\)"):
        model(torch.randn(1, 10, 4)).sum().backward()


def test_another_dtype_than_before_is_found_out_anew() -> None:
    model = Wide(torch.float32)
    tile_mlps(model, tile=3)
    x, inner = torch.randn(1, 10, 4, requires_grad=True), model.down.forward
    model(x)
    model.down.forward = lambda x: inner(x).double()
    y = model(x)
    assert y.dtype == torch.float64
    y.sum().backward()
    torch.testing.assert_close(x.grad, (model.down.weight @ model.up.weight).sum(0).expand(1, 10, 4))


# ---- per instance, reversible


def test_untiling_gives_every_forward_back() -> None:
    model = models.lora(models.llama())
    peftkern.patch(model)
    before = [dict(module.__dict__) for module in model.modules()]
    tile_mlps(model, tile=7)
    assert tile_mlps(model, tile=9).rows[0].tile == 9 and mlps(model)[0].forward.blocks.tile == 9
    assert untile_mlps(model) == 2 and untile_mlps(model) == 0
    after = [module.__dict__ for module in model.modules()]
    assert all(was.get("forward") is now.get("forward") for was, now in zip(before, after, strict=True))


def test_unpatching_beneath_tiles_leaves_the_stock_mlp_in_tiles() -> None:
    model = models.lora(models.llama())
    stock = train(copy.deepcopy(model))
    peftkern.patch(model)
    tile_mlps(model, tile=7)
    peftkern.unpatch(model)
    got = train(model)
    for key, value in stock.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize("how", models.COPIES)
def test_a_copy_is_tiled_by_itself(how: str) -> None:
    model = models.lora(models.llama())
    peftkern.patch(model)
    tile_mlps(model, tile=7)
    expected, twin = train(model), models.copied(model, how)
    assert all(module.forward.module is module for module in mlps(twin)) and len(mlps(twin)) == 2
    model.zero_grad(set_to_none=True)
    got = train(twin)
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert not models.grads(model)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_samples_with_adapters_of_their_own_run_whole() -> None:
    model = models.lora(models.llama())
    model.add_adapter("other", models.config())
    models.randomize(model)
    peftkern.patch(model)
    expected: dict[str, Any] = {}
    for tiled in (False, True):
        if tiled:
            tile_mlps(model, tile=7)
        with peftkern.mixed_adapters(model, ["default", "other"]):
            got = train(model)
        expected = expected or got
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_generation_is_that_of_the_whole_model() -> None:
    model = models.lora(models.llama()).eval()
    peftkern.patch(model)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=zoo.TEXT, **options)
    tile_mlps(model, tile=7)
    assert torch.equal(model.generate(input_ids=zoo.TEXT, **options), expected)


# ---- the report, and what is refused


def test_the_report_names_tile_and_bytes() -> None:
    model = models.lora(models.llama(torch.bfloat16))
    report = tile_mlps(model, budget=200_000)
    row = report.rows[0]
    assert (row.name, row.hidden, row.intermediate) == ("base_model.model.model.layers.0.mlp", 64, 80)
    assert (row.tile, row.bytes) == (128, 128 * 2 * (64 + 6 * 80))
    assert str(report) == "peftkern: 2 of 2 MLPs in tiles (2 of 128 rows, 0.1 MB a tile)"
    (row,) = tile_mlps(models.lora(models.llama()), tile=7, exclude=["layers.0"]).refused
    assert row.reason == "excluded by 'layers.0'"


def test_a_block_of_experts_is_refused_and_all_else_is_tiled() -> None:
    model = zoo.build("qwen3-moe")
    with pytest.raises(ValueError, match="none of its 2 MLPs could be tiled: 2 x a block of experts"):
        tile_mlps(model, tile=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"tile": 64, "budget": 1 << 30}, "exactly one"),
        ({"tile": 0}, "tile: got 0"),
        ({"tile": 2.5}, "tile: got 2.5"),
        ({"budget": 1000}, "64 rows of an MLP of 64 x 80 take"),
        ({"tile": 64, "exclude": ["nowhere"]}, "'nowhere' names no module"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = models.lora(models.llama())
    with pytest.raises(ValueError, match=message):
        tile_mlps(model, **options)
    assert not mlps(model)


def test_a_replaced_forward_is_refused() -> None:
    model = models.lora(models.llama())
    first = model.get_base_model().model.layers[0].mlp
    first.forward = lambda x: x
    report = tile_mlps(model, tile=7)
    assert [row.reason is None for row in report.rows] == [False, True]
    assert "its forward was replaced" in report.refused[0].reason and "1 whole" in str(report)


# ---- bytes


class Gated(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_temporaries_are_those_of_one_tile() -> None:
    """The peak is a line of the tokens: what is h wide a token, and the tile, which its formula holds."""
    model = Gated(64, 320).bfloat16().requires_grad_(False)
    tile_mlps(model, tile=128)
    peaks: dict[str, list[int]] = {"forward": [], "backward": []}
    for tokens in (512, 1024):
        x = torch.randn(1, tokens, 64).bfloat16().requires_grad_()
        dy = torch.randn(1, tokens, 64).bfloat16()
        model(x)  # what the output is like is known then
        with MemoryCount(phase="forward", classify=None) as count:
            y = model(x)
            with count.enter("backward"):
                y.backward(dy)
        for phase, found in peaks.items():
            found.append(count.peaks[phase])
    h, tile = 2 * 64, mlp_tile_bytes(128, 64, 320)
    for phase, widths in (("forward", 1), ("backward", 2)):  # the output; beside it dx
        short, long = peaks[phase]
        assert (long - short) / 512 == widths * h
        rest = short - 512 * widths * h
        assert 0.4 * tile < rest <= tile, f"{phase}: {rest} bytes, a tile has {tile}"
