"""What the planner says of operators' insides, against what their GPU launchers allocate. No kernel runs:
launches and products are left out, the tensors are memory that nobody touches.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from peftkern.memory.count import MemoryCount
from peftkern.memory.planner.cards import CARDS, Card
from peftkern.memory.planner.scratch import Member, Operators
from peftkern.ops.linear.group.spec import Adapters

pytest.importorskip("triton", reason="Triton is not installed")

LLAMA = {
    "qkv": [(4096, 4096), (1024, 4096), (1024, 4096)],
    "o": [(4096, 4096)],
    "gate_up": [(14336, 4096)] * 2,
}
LARGE = {"gate_up": [(28672, 8192)] * 2, "o": [(8192, 8192)]}
BF16 = torch.bfloat16


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU launchers on the CPU, as on a given card."""
    import peftkern.ops.linear.glu.gpu
    import peftkern.ops.linear.group.gpu as group
    import peftkern.ops.linear_cross_entropy.triton  # noqa: F401  # whatever launches is left out
    from peftkern.ops.linear import gpu as single
    from peftkern.runtime import plan

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    for name, module in list(sys.modules.items()):
        if name.startswith("peftkern.ops.") and "run" in vars(module):
            monkeypatch.setattr(module, "run", nothing)
    monkeypatch.setattr(single, "multiply", nothing)
    monkeypatch.setattr(single, "dequantize_slice", lambda *args: args[-1])

    def on(card: Card) -> Any:
        monkeypatch.setattr(plan, "INTERPRETED", plan.Device(card.arch, card.sms, card.l2))
        return group

    return on


def group_arguments(sizes: list[tuple[int, int]], rank: int) -> tuple[list, list]:
    """weights, quants, block sizes; and lora_a, lora_b, members."""
    weights, quants, blocks, a, b = [], [], [], [], []
    for n, k in sizes:
        weights.append(torch.empty(n * k // 2, dtype=torch.uint8))
        quants += [torch.empty(16), torch.empty(n * k // 64), None, None, None, None]
        blocks += [64, 256]
        a.append(torch.empty(rank, k))
        b.append(torch.empty(n, rank))
    return [weights, quants, blocks], [a, b, list(range(len(sizes)))]


def peak_inside(call: Any) -> int:
    """The most bytes at once, without those of the results."""
    with MemoryCount(classify=None) as count:
        results = call()
        kept = count.current
    del results
    return count.peaks["forward"] - kept


@pytest.mark.parametrize("card", ["rtx 4090", "rtx 3090", "h100"])
@pytest.mark.parametrize("tokens", [2048, 16384])
@pytest.mark.parametrize("part", ["qkv", "o", "gate_up", "large gate_up", "large o"])
def test_groups_on_a_gpu(launchers: Any, card: str, tokens: int, part: str) -> None:
    found, rank = CARDS[card], 32
    group, sizes = launchers(found), LARGE[part[6:]] if part.startswith("large") else LLAMA[part]
    frozen, (a, b, members) = group_arguments(sizes, rank)
    rows, options = [0, tokens] * len(sizes), ([2.0] * len(sizes), [0.0] * len(sizes), [None] * len(sizes))
    adapters = Adapters(a, b, members, rows, *options)
    k, operators = sizes[0][1], Operators(found)
    as_planned = [Member(n, k, rank) for n, _ in sizes]

    x = torch.empty(tokens, k, dtype=BF16)
    n = [size[0] for size in sizes]
    inside = peak_inside(
        lambda: group.forward(x, *frozen, n, [None] * len(sizes), a, b, members, rows, *options)
    )
    assert operators.forward(as_planned, tokens) == pytest.approx(inside, rel=0.02, abs=1 << 20)

    dy = [torch.empty(tokens, size, dtype=BF16) for size in n]
    xa, needs = (
        [torch.empty(tokens, rank) for _ in sizes],
        [True, *[False] * len(sizes), *[True] * 2 * len(sizes)],
    )
    inside = peak_inside(lambda: group.backward(dy, x, *frozen, tokens, k, adapters, xa, needs))
    assert operators.backward(as_planned, tokens) == pytest.approx(inside, rel=0.02, abs=1 << 20)


@pytest.mark.parametrize("card", ["rtx 4090", "rtx 3090", "h100"])
@pytest.mark.parametrize("tokens", [2048, 16384])
def test_the_second_half_of_a_gated_mlp_on_a_gpu(
    launchers: Any, card: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkern.ops.linear.glu import gpu as glu

    found, rank, inner = CARDS[card], 32, 14336
    launchers(found)
    frozen, (a, b, members) = group_arguments([(4096, inner)], rank)
    dy, xa = torch.empty(tokens, 4096, dtype=BF16), [torch.empty(tokens, rank)]
    gate, up, d_gate, d_up = (torch.empty(tokens, inner, dtype=BF16) for _ in range(4))
    adapters = Adapters(a, b, members, [0, tokens], [2.0], [0.0], [None])
    state = adapters, xa, [True, False, True, True]
    inside = peak_inside(
        lambda: glu.backward(dy, gate, up, "silu", d_gate, d_up, *frozen, tokens, inner, *state)[1:]
    )
    planned = Operators(found).glu_backward(Member(4096, inner, rank), tokens)
    assert planned == pytest.approx(inside, rel=0.02, abs=1 << 20)


def test_the_loss_on_a_gpu(launchers: Any) -> None:
    from peftkern.ops.linear_cross_entropy import triton as loss

    launchers(CARDS["rtx 4090"])
    tokens, words, width = 4096, 128_256, 64
    x, labels = torch.empty(tokens, width, dtype=BF16), torch.zeros(tokens, dtype=torch.int64)
    weight = torch.empty(words, width, dtype=BF16)
    needs = (True, False, False, False, False)
    arguments = (None,) * 6, words, labels, None, None, None, 1.0, -100, 0.0, 0.0, None, None, needs
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_multiply", "_add_gradients"):
            patch.setattr(loss, name, lambda *args: None)
        inside = peak_inside(lambda: loss.linear_cross_entropy(x, weight, *arguments))
    planned = Operators(CARDS["rtx 4090"]).loss(tokens, words)
    assert planned == pytest.approx(inside, rel=0.01)


@pytest.mark.parametrize("isa", ["avx512", None])
@pytest.mark.parametrize("part", ["qkv", "o", "gate_up"])
def test_groups_on_the_cpu(part: str, isa: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.memory.planner.cards import CPU
    from peftkern.ops.linear import config, cpu_rows
    from peftkern.ops.linear.group import cpu as group
    from peftkern.runtime.backends import native

    pytest.importorskip("peftkern._C", reason="the native kernels are not built")
    if isa is not None:  # without tiles the vendor multiplies decoded slices
        other = {"tiles": False, "isa": isa}
        monkeypatch.setattr(cpu_rows, "choose", lambda **sizes: config.choose(**sizes | other))
    sizes, rank, tokens = [(n // 8, k // 8) for n, k in LLAMA[part]], 8, 1024
    frozen, (a, b, members) = group_arguments(sizes, rank)
    for tensor in (*frozen[0], *(t for t in frozen[1] if t is not None), *a, *b):
        tensor.zero_()
    rows, options = [0, tokens] * len(sizes), ([2.0] * len(sizes), [0.0] * len(sizes), [None] * len(sizes))
    adapters = Adapters(a, b, members, rows, *options)
    k, n, operators = sizes[0][1], [size[0] for size in sizes], Operators(CPU, isa=isa or native().isa())
    as_planned = [Member(n, k, rank) for n, _ in sizes]
    x = torch.zeros(tokens, k, dtype=BF16)
    dy, xa = [torch.zeros(tokens, size, dtype=BF16) for size in n], [torch.zeros(tokens, rank) for _ in sizes]
    needs = [True, *[False] * len(sizes), *[True] * 2 * len(sizes)]

    def forward() -> Any:
        return group.forward(x, *frozen, n, [None] * len(sizes), a, b, members, rows, *options)

    def backward() -> Any:
        return group.backward(dy, x, *frozen, tokens, k, adapters, xa, needs)

    forward(), backward()  # whose reused buffers, of some megabytes, are there from now on
    assert operators.forward(as_planned, tokens) == pytest.approx(peak_inside(forward), rel=0.05, abs=1 << 12)
    assert operators.backward(as_planned, tokens) == pytest.approx(
        peak_inside(backward), rel=0.05, abs=1 << 12
    )
