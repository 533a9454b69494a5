"""Adapters however they were initialized and optimized: two steps of training, patched against stock, judged
by the same steps in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import peftkern

from ..cases import each_choice, nightly
from ..ops.bounds import products_of_many_rows
from . import models
from .test_values import UNIT, further, over
from .versions import COUNTED

peft = models.peft
Make = Callable[[int], nn.Module]
Optimize = Callable[[nn.Module], torch.optim.Optimizer]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STARTS = {
    "pissa": dict(init_lora_weights="pissa"),
    "pissa-niter": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora"),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "rslora": dict(use_rslora=True),
    "patterns": dict(
        rank_pattern={"q_proj": 7, "layers.1.mlp.up_proj": 1}, alpha_pattern={"v_proj": 3, "down_proj": 16}
    ),
}
SEEDS = range(8)
# their lora_B starts at zero, where lora_A has no gradient to compare
ZERO_B = ("gaussian", "rslora", "patterns")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def steps(model: nn.Module, optimize: Optimize = sgd) -> dict[str, Tensor]:
    """Logits, loss and gradients of two steps, the second after an update by the first's gradients."""
    optimizer, found = optimize(model), {}
    for step in range(2):
        found |= {f"step {step}: {name}": value for name, value in models.run(model).items()}
        optimizer.step()
    return found


def adapted(
    start: str, dtype: torch.dtype = torch.float32, *, four_bit: bool = False, seed: int = 0
) -> nn.Module:
    model = peft.get_peft_model(
        models.llama(dtype, four_bit=four_bit, seed=seed), models.config(**STARTS[start])
    )
    if start in ZERO_B:
        models.randomize(model)
    return model.train()


def follow(
    make: Make,
    dtype: torch.dtype,
    counts: dict[str, int],
    optimize: Optimize = sgd,
    exact_form=models.in_fp64,
) -> None:
    """The patched model errs, root mean square over the seeds, at most 1.5 times what stock errs, plus a
    small part of a rounding."""
    stock, patched = [], []
    for seed in (*SEEDS, *further(SEEDS)):
        if seed == len(SEEDS) and not over(stock, patched, UNIT[dtype]):
            break
        model = make(seed)
        exact = steps(exact_form(model), optimize)
        stock.append(models.errors(products_of_many_rows(steps)(copy.deepcopy(model), optimize), exact))
        report = peftkern.patch(model)
        # beside them, in bf16 and fp16, the head
        assert not COUNTED or (counts.items() <= report.counts.items() and not report.fallbacks)
        patched.append(models.errors(steps(model, optimize), exact))
    assert not over(stock, patched, UNIT[dtype])


# of two Llama layers, every linear adapted
FUSED = {"qlora_linear": 14, "gated_mlp": 2, "rms_norm": 5, "rope": 2, "add_rms_norm": 2}


# Other draws of lora_A, and PiSSA by its iteration, walk the same code: in the nightly run.
@pytest.mark.parametrize("start", nightly(STARTS, quick=["pissa", "olora", "rslora", "patterns"]))
def test_every_initialization_is_fused_and_trains_as_stock(start: str, calls) -> None:
    follow(lambda seed: adapted(start, seed=seed), torch.float32, FUSED)
    assert calls["lora"] >= 14 * 2 * len(SEEDS) and calls["lora"] % (14 * 2) == 0


@pytest.mark.parametrize(
    "start", nightly(["olora", "gaussian", "rslora", "patterns"], quick=["olora", "patterns"])
)
def test_the_initializations_of_a_4_bit_base(start: str) -> None:
    """PiSSA and orthogonal change a dense base."""
    follow(lambda seed: adapted(start, four_bit=True, seed=seed), torch.float32, FUSED)


def loftq(seed: int, four_bit: bool) -> nn.Module:
    """LoftQ of one iteration: an NF4 base, or its dequantized values, and the best low-rank form of what
    quantization took. PEFT computes it on CUDA alone."""
    dense = models.llama(four_bit=False, seed=seed)
    quantized = models.in_fp64(models.llama(seed=seed))
    model = peft.get_peft_model(models.llama(four_bit=four_bit, seed=seed), models.config()).train()
    for name, layer in models.lora_layers(model).items():
        short = name.removeprefix("base_model.model.")
        kept = quantized.get_submodule(short).weight
        lost = (dense.get_submodule(short).weight.double() - kept) / layer.scaling["default"]
        u, s, vh = torch.linalg.svd(lost.detach(), full_matrices=False)
        layer.lora_A["default"].weight.data = (s[:4].sqrt()[:, None] * vh[:4]).float()
        layer.lora_B["default"].weight.data = (u[:, :4] * s[:4].sqrt()).float()
        if not four_bit:
            layer.base_layer.weight.data = kept.detach().float()
    return model


@pytest.mark.parametrize("base", nightly(["nf4", "dense"], quick=["nf4"]))
def test_adapters_that_start_from_the_quantization_error(base: str) -> None:
    follow(lambda seed: loftq(seed, base == "nf4"), torch.float32, FUSED)


# In fp32 they are among test_every_initialization_is_fused_and_trains_as_stock.
@pytest.mark.parametrize(
    "start, dtype",
    each_choice(
        ["pissa", "patterns"],
        DTYPES,
        quick=[("pissa", DTYPES[1]), ("patterns", DTYPES[2])],
        nightly=[torch.float32],
    ),
)
def test_dense_bases_in_every_dtype(start: str, dtype: torch.dtype) -> None:
    follow(lambda seed: adapted(start, dtype, seed=seed), dtype, FUSED)


@pytest.mark.parametrize("base", nightly(["nf4", "dense"], quick=["nf4"]))
def test_loraplus(base: str) -> None:
    """LoRA+ is two learning rates: parameter groups must find the patched model's lora_B by name."""

    def optimize(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.01, loraplus_lr_ratio=8.0)
        sizes = {
            round(group["lr"], 6): len(group["params"]) for group in optimizer.param_groups if group["params"]
        }
        assert sizes == {0.01: 14, 0.08: 14}
        return optimizer

    follow(lambda seed: adapted("rslora", four_bit=base == "nf4", seed=seed), torch.float32, FUSED, optimize)


def beside_stock(
    model: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[peftkern.PatchReport, dict[str, Tensor]]:
    """Two steps of the patched model, each value within roundings of stock's; for bases that have no fp64
    form here."""
    expected = steps(copy.deepcopy(model))
    report = peftkern.patch(model)
    got = steps(model)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = ((got[name].double() - value.double()).norm() / value.double().norm()).item()
        assert error <= 64 * UNIT[dtype], f"{name}: {error:.2e}"
    return report, got


def test_trainable_tokens_of_the_embedding_are_left_alone_and_trained() -> None:
    model = models.lora(models.llama(four_bit=False), trainable_token_indices=[1, 5, 7]).train()
    report, got = beside_stock(model)
    assert models.linears(report) == {"qlora_linear": 14}
    assert not any("embed_tokens" in row.name for row in report.rows)
    (delta,) = [name for name in got if name.startswith("step 1") and "trainable_tokens_delta" in name]
    assert got[delta].shape == (3, 64) and got[delta].abs().max() > 0


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_modules_to_save_are_left_alone_and_trained(four_bit: bool) -> None:
    model = models.lora(models.llama(four_bit=four_bit), modules_to_save=["lm_head", "embed_tokens"]).train()
    report, got = beside_stock(model)
    assert models.linears(report) == {"qlora_linear": 14}
    assert not any("lm_head" in row.name or "embed_tokens" in row.name for row in report.rows)
    saved = [name for name in got if name.startswith("step 1") and "modules_to_save" in name]
    assert len(saved) == 2 and all(got[name].abs().max() > 0 for name in saved)


def in_8bit(model: nn.Module) -> nn.Module:
    """The same Llama with bitsandbytes Linear8bitLt projections."""
    for name, old in list(model.named_modules()):
        if type(old) is nn.Linear and name.endswith("_proj"):
            new = models.bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=False, has_fp16_weights=False
            )
            new.load_state_dict(old.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.is_loaded_in_8bit = True
    return model.requires_grad_(False)


def exact_8bit(model: nn.Module) -> nn.Module:
    """In fp64 on the exact values of the 8-bit weights, the activations not rounded to 8 bits."""
    double = copy.deepcopy(model)
    for old in list(double.modules()):
        if isinstance(old, peft.tuners.lora.bnb.Linear8bitLt):
            base = old.base_layer
            new = nn.Linear(base.in_features, base.out_features, bias=False)
            scales = base.state.SCB if base.weight.SCB is None else base.weight.SCB
            new.weight = nn.Parameter(
                base.weight.data.double() * scales.double()[:, None] / 127, requires_grad=False
            )
            old.base_layer = new
    return models.in_fp64(double)


@pytest.mark.parametrize(
    "start, dtype",
    each_choice(
        ZERO_B, DTYPES[:2], quick=[("rslora", DTYPES[0]), ("patterns", DTYPES[1])], nightly=["gaussian"]
    ),
)
def test_8bit_bases_get_the_branch_added(start: str, dtype: torch.dtype) -> None:
    """The base rounds its input to 8 bits, by far the largest error, on both sides; ours must not add to
    it."""

    def make(seed: int) -> nn.Module:
        model = peft.get_peft_model(
            in_8bit(models.llama(dtype, four_bit=False, seed=seed)), models.config(**STARTS[start])
        )
        models.randomize(model)
        return model.train()

    follow(make, dtype, {"lora_add": 14, "rms_norm": 5, "rope": 2, "add_rms_norm": 2}, exact_form=exact_8bit)
