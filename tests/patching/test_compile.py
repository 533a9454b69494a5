"""torch.compile of patched models: one graph, no recompilation over steps, the values of eager."""

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

import peftkern

from ..cases import each_choice, nightly
from . import models, zoo

pytestmark = pytest.mark.any_isa
BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model, forward, seeds=(1, 2, 3)):
    """Loss and gradients of some steps of SGD; the seed is set before each, so that dropout draws the same in
    eager and compiled."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = {}
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad(set_to_none=True)
        losses = zoo.losses(forward(model))
        losses.mean().backward()
        seen |= {f"{seed}/{name}": grad for name, grad in models.grads(model).items()} | {
            f"{seed}/losses": losses.detach()
        }
        optimizer.step()
    return seen


def compare(make, backend, graphs=1):
    """The compiled model trains as the eager one, in `graphs` graphs compiled once; what the first of them
    calls."""
    eager, model = make(), make()
    expected = steps(eager, zoo.output)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = {}
    for index, seed in enumerate((1, 2, 3)):
        # Inductor draws the seed of the mask by a generator of its own unless told to take eager's.
        with (
            torch._dynamo.config.patch(error_on_recompile=index > 0),
            torch._inductor.config.patch(fallback_random=True),
        ):
            seen |= steps(model, lambda _: zoo.output(compiled), (seed,))
    assert counter.frame_count == graphs
    assert seen.keys() == expected.keys() and len(seen) > 6
    for name, value in expected.items():
        torch.testing.assert_close(
            seen[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    return [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]


def patched(name, **options):
    model = zoo.build(name, **options)
    peftkern.patch(model)
    return model


LLAMA = [("nf4", 0.2, "aot_eager"), ("dense", 0.0, "aot_eager")]


@pytest.mark.parametrize(
    "base, dropout, backend",
    each_choice(["nf4", "dense"], [0.0, 0.2], BACKENDS, quick=LLAMA, nightly=["inductor"]),
)
def test_llama(base, dropout, backend):
    called = compare(lambda: patched("llama", four_bit=base == "nf4", lora_dropout=dropout), backend)
    # A layer left to its stock forward would be as right: its base and its adapter would be three calls in
    # the graph.
    # the head
    assert called.count(torch._C._nn.linear) <= 1 and not any(
        "bitsandbytes" in str(target) for target in called
    )


@pytest.mark.parametrize(
    "name, backend",
    each_choice(["gpt2", "falcon"], BACKENDS, quick=[("gpt2", "aot_eager")], nightly=["falcon", "inductor"]),
)
def test_branches_on_stock_bases(name, backend):
    compare(lambda: patched(name, lora_dropout={"gpt2": 0.2, "falcon": 0.0}[name]), backend)


@pytest.mark.parametrize(
    "name", nightly(["phi3", "qwen3", "gemma2", "bert", "t5", "mistral"], quick=["gemma2"])
)
def test_other_architectures(name):
    compare(lambda: patched(name, four_bit=True), "aot_eager")
