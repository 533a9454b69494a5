"""Patched against stock: logits, loss and every gradient, judged by the error of each against the same model
in fp64."""

import contextlib

import peft
import pytest
import torch

import peftkern

from ..cases import each_choice
from ..ops.bounds import products_of_many_rows
from . import models

SEEDS = range(4)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rms(rows, name):
    return (sum(row[name] ** 2 for row in rows) / len(rows)) ** 0.5


def further(seeds):
    """Three times as many seeds more, by which a figure is judged that is over its bound: of few draws it is
    uncertain by a third."""
    return range(len(seeds), 4 * len(seeds))


def over(stock, patched, unit):
    """What errs, root mean square over the seeds, more than 1.5 times what stock errs and a small part of a
    rounding."""
    bounds = {name: 1.5 * rms(stock, name) + unit / 32 for name in stock[0]}
    found = {name: rms(patched, name) for name in bounds}
    wrong = [name for name in bounds if not found[name] <= bounds[name]]
    return [f"{n}: {found[n]:.2e} > {bounds[n]:.2e}, stock {rms(stock, n):.2e}" for n in wrong]


def compare(make, dtype, calls, seeds=SEEDS):
    """Root mean square over the seeds of each tensor's relative error: patched at most 1.5 times stock, plus
    a small part of a rounding."""
    stock, patched = [], []
    for seed in (*seeds, *further(seeds)):
        if seed == len(seeds) and not over(stock, patched, UNIT[dtype]):
            break
        model = make(seed)
        exact = models.run(models.in_fp64(model))
        stock.append(models.errors(products_of_many_rows(models.run)(model), exact))
        report = peftkern.patch(model)
        assert not report.fallbacks
        before = calls["lora"]
        patched.append(models.errors(models.run(model), exact))
        assert calls["lora"] - before == len(models.lora_layers(model)) == 14
    assert {"logits", "loss"} < stock[0].keys() and len(stock[0]) >= 2 + 2 * 14
    assert not over(stock, patched, UNIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "dense"])
def test_default_recipe(four_bit, dtype, calls):
    compare(lambda seed: models.lora(models.llama(dtype, four_bit=four_bit, seed=seed)), dtype, calls)


def test_prepared_for_kbit_training(calls):
    """Norms and embeddings in fp32: fp32 activations beside bf16 compute."""

    def make(seed):
        model = peft.prepare_model_for_kbit_training(
            models.llama(torch.bfloat16, seed=seed), use_gradient_checkpointing=False
        )
        return models.lora(model)

    compare(make, torch.bfloat16, calls)


@pytest.mark.parametrize(
    "options",
    [dict(nested=False), dict(quant_type="fp4"), dict(storage=torch.float32), dict(bias=True)],
    ids=["plain-absmax", "fp4", "quant-storage", "bias"],
)
def test_formats(options, calls):
    compare(lambda seed: models.lora(models.llama(seed=seed, **options)), torch.float32, calls)


OPTIONS = {
    "rslora": dict(use_rslora=True),
    "lora-bias": dict(lora_bias=True),
    "trainable-bias": dict(bias="lora_only"),
}


@pytest.mark.parametrize("base, option", each_choice(["nf4", "dense"], OPTIONS))
def test_lora_options(base, option, calls):
    options, four_bit = OPTIONS[option], base == "nf4"

    def make(seed):
        model = models.lora(models.llama(seed=seed, four_bit=four_bit, bias=True), **options)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    compare(make, torch.float32, calls)


@pytest.mark.parametrize("four_bit, dtype", each_choice([True, False], [torch.float32, torch.bfloat16]))
def test_several_active_adapters(four_bit, dtype, calls):
    def make(seed):
        model = models.lora(models.llama(dtype, four_bit=four_bit, seed=seed))
        model.add_adapter("second", models.config(r=3, lora_alpha=6))
        models.randomize(model)
        model.base_model.set_adapter(["default", "second"])
        return model

    compare(make, dtype, calls)


def test_adapters_in_bf16(calls):
    """autocast_adapter_dtype=False keeps the adapters in the model's bf16."""

    def make(seed):
        model = peft.get_peft_model(
            models.llama(torch.bfloat16, seed=seed), models.config(), autocast_adapter_dtype=False
        )
        models.randomize(model)
        return model

    compare(make, torch.bfloat16, calls)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_dtypes_of_a_4bit_layer(x_dtype, compute, autocast, calls):
    """Output, dtype of the output and of each gradient are stock's for every mix of input, compute dtype and
    autocast."""
    model = models.llama()
    models.set_compute_dtype(model, compute)
    check_layer(models.lora(model), x_dtype, autocast, calls)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", ["autocast's", "fp32"])
def test_dtypes_of_a_dense_layer(weight, x_dtype, autocast, calls):
    dtype = torch.float32 if autocast and weight == "fp32" else autocast or x_dtype
    check_layer(models.lora(models.llama(dtype, four_bit=False)), x_dtype, autocast, calls)


def check_layer(model, x_dtype, autocast, calls):
    layer = models.first(model)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(x_dtype)
    results = []
    for step in (lambda: None, lambda: peftkern.patch(model)):
        step()
        model.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            y = layer(leaf)
        y.float().square().sum().backward()
        results.append((y.detach(), leaf.grad, *models.grads(layer).values()))
    compute = getattr(layer.base_layer, "compute_dtype", None) or x_dtype
    assert calls["lora"] == 1 and calls.dtype == (autocast or compute)
    worst = max(UNIT[t] for t in (x_dtype, autocast or x_dtype, compute))
    for stock, patched in zip(*results, strict=True):
        assert patched.dtype == stock.dtype
        assert (patched.double() - stock.double()).norm() <= 8 * worst * stock.double().norm()


def test_cuda_autocast_promotes_the_output_as_stock_does(calls):
    """PEFT's 4-bit layer asks torch.is_autocast_enabled() without a device, which is CUDA's switch; there it
    adds the low-rank part uncast. Both switches on, with one dtype, act on CPU tensors as CUDA's acts on CUDA
    tensors."""
    model = models.lora(models.llama(torch.bfloat16))
    layer, x = models.first(model), torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stock = layer(x)
            peftkern.patch(model)
            patched = layer(x)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert calls["lora"] == 1
    assert stock.dtype == patched.dtype == torch.float32
    torch.testing.assert_close(patched, stock, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["native or reference", "reference"])
def test_the_kernels_own_arithmetic_is_not_autocast(backend):
    """The reference accumulates in fp32 by torch's own products, which autocast would turn into bf16 ones."""
    model = models.lora(models.llama(torch.bfloat16))
    layer, x = models.first(model), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    peftkern.patch(model)
    with peftkern.use_backend("reference") if backend == "reference" else contextlib.nullcontext():
        expected = layer(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer(x)
    assert torch.equal(got, expected.float())
