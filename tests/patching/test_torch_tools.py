"""torch's own tools on a patched model see what they see of the stock one: torch.func, forward-mode AD,
second derivatives, tracing, export, compiled checkpointing, FLOP counting, the profiler."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import peftkern

from ..cases import nightly
from . import models

pytestmark = pytest.mark.any_isa
OTHER = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A stock model and its patched copy."""
    stock = models.lora(models.llama(four_bit=False))
    # torch's fused attention has neither tangents nor second derivatives
    stock.set_attn_implementation("eager")
    model = copy.deepcopy(stock)
    peftkern.patch(model)
    return stock, model


def compare(function: Callable[[nn.Module], Tensor], pair: tuple[nn.Module, nn.Module]) -> None:
    expected, got = (function(copy.deepcopy(model)) for model in pair)
    assert got.shape == expected.shape and (got - expected).norm() <= 1e-4 * expected.norm()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def loss(model: nn.Module, params: dict[str, Tensor], ids: Tensor) -> Tensor:
    logits = functional_call(model, params, (ids[None],), {"use_cache": False}).logits
    return nn.functional.cross_entropy(logits[0, :-1], ids[1:])


def flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([tree[name].detach().flatten() for name in sorted(tree)])


@pytest.mark.parametrize("batched", [False, True], ids=["one sample", "every sample"])
def test_gradients_by_torch_func(pair, batched):
    def run(model):
        by_params = grad(lambda params, ids: loss(model, params, ids))
        return flat(
            vmap(by_params, in_dims=(None, 0))(trained(model), models.IDS)
            if batched
            else by_params(trained(model), models.IDS[0])
        )

    compare(run, pair)


def test_vmap_over_adapters(pair):
    def run(model):
        stacked = {name: torch.stack([p, 2 * p]) for name, p in trained(model).items()}
        return vmap(lambda params: loss(model, params, models.IDS[0]))(stacked).detach()

    compare(run, pair)


@pytest.mark.parametrize("recorded", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("duals", [True, False], ids=["dual numbers", "jvp"])
def test_forward_mode_loses_no_tangent(pair, duals, recorded):
    def run(model):
        params = trained(model)
        tangents = {name: torch.full_like(p, 0.01) for name, p in params.items()}
        with torch.set_grad_enabled(recorded):
            if not duals:
                return torch.stack(
                    jvp(lambda q: loss(model, q, models.IDS[0]), (params,), (tangents,))
                ).detach()
            with fwad.dual_level():
                params = {name: fwad.make_dual(p, tangents[name]) for name, p in params.items()}
                return torch.stack(tuple(fwad.unpack_dual(loss(model, params, models.IDS[0])))).detach()

    compare(run, pair)


def test_a_product_with_the_hessian(pair):
    def run(model):
        params = [p for p in model.parameters() if p.requires_grad]
        logits = model(input_ids=models.IDS, use_cache=False).logits
        value = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), models.IDS[:, 1:].flatten())
        first = torch.autograd.grad(value, params, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(sum(g.sum() for g in first), params)])

    compare(run, pair)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("how", ["trace", "export"])
def test_programs_run_without_this_package(pair, how, merged):
    model = copy.deepcopy(pair[1]).eval().requires_grad_(False)
    model = Logits(model.merge_and_unload() if merged else model)
    with torch.no_grad():
        if how == "trace":
            program = torch.jit.trace(model, (models.IDS,), check_trace=False)
            operators = str(program.inlined_graph)
        else:
            try:
                torch.export.export(
                    Logits(copy.deepcopy(pair[0]).eval().requires_grad_(False)), (models.IDS,)
                )
            except Exception as error:
                pytest.skip(f"the stock model cannot be exported: {type(error).__name__}: {str(error)[:80]}")
            exported = torch.export.export(model, (models.IDS,))
            program, operators = exported.module(), str(exported.graph)
        torch.testing.assert_close(program(OTHER), model(OTHER), rtol=1e-4, atol=1e-5)
    assert "peftkern" not in operators


@pytest.mark.parametrize("blocks", nightly([True, False], quick=[True]))
def test_one_compiled_graph_with_checkpointing(pair, blocks):
    """Its gradients are those of the stock model, which is not compiled: that would take as long again."""
    counter = CompileCounterWithBackend("aot_eager")

    def gradients(model, call):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.base_model.model.disable_input_require_grads()  # its hook breaks the stock model's graph too
        call(input_ids=models.IDS, labels=models.IDS, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    stock, ours = copy.deepcopy(pair[0]), copy.deepcopy(pair[0])
    expected = gradients(stock, stock)
    peftkern.patch(ours, blocks=blocks)
    torch._dynamo.reset()
    got = gradients(ours, torch.compile(ours, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert got.shape == expected.shape and (got - expected).norm() <= 1e-4 * expected.norm()


def test_flops_of_every_module(pair):
    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            models.run(model)
        counts.append(
            {
                name: {str(op): n for op, n in by_op.items()}
                for name, by_op in counter.get_flop_counts().items()
            }
        )
    assert counts[0] == counts[1] and sum(counts[0]["Global"].values()) > 0


def test_the_profiler_names_what_ran_with_its_shapes(pair):
    with (
        torch.profiler.profile(
            record_shapes=True, with_flops=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as profile,
        torch.no_grad(),
    ):
        pair[1](input_ids=models.IDS[:1, :1], use_cache=False)
    seen = {
        event.key: event.input_shapes
        for event in profile.key_averages(group_by_input_shape=True)
        if "peftkern::" in event.key
    }
    assert {"peftkern::qlora_group_fwd", "peftkern::qlora_linear_fwd"} <= seen.keys()
    assert [1, 64] in seen["peftkern::qlora_group_fwd"] or [1, 64] in seen["peftkern::qlora_linear_fwd"]


def test_symbolic_tracing_reaches_the_stock_forward():
    linear = nn.Linear(8, 8).requires_grad_(False)
    peftkern.patch(linear, dense=True)
    graph = torch.fx.symbolic_trace(nn.Sequential(linear, nn.ReLU()))
    x = torch.randn(3, 8)
    torch.testing.assert_close(graph(x), linear(x).relu())
    assert torch.fx.symbolic_trace(linear)(x).shape == x.shape
