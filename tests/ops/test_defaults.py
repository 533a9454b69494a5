"""torch's defaults are the caller's: no op takes a temporary's dtype or device from them (a kernel would then
write past its end)."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import functional as F
from peftkern import ops

N, K, M, R = 70, 64, 5, 4
Call = Callable[[], Tensor | tuple[Tensor, ...]]


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float32) * scale).to(dtype).requires_grad_()


def member(n: int = N, k: int = K, *, dense: bool = False, dropout: float = 0.0) -> F.Member:
    weight = draw(n, k, scale=0.1).detach()
    seed = torch.tensor([7]) if dropout else None
    adapter = F.Adapter(draw(R, k, scale=0.1), draw(n, R, scale=0.1), 0.5, dropout, seed)
    return F.Member(weight if dense else F.quantize_4bit(weight), draw(n), [adapter])


def leaves(*values: object) -> list[Tensor]:
    """The tensors that want a gradient, in members too."""
    found = [v for v in values if isinstance(v, Tensor)]
    for m in (v for v in values if isinstance(v, F.Member)):
        found += [m.bias, *(t for a in m.adapters for t in (a.lora_a, a.lora_b))]
    return [t for t in found if t is not None and t.requires_grad]


def quantization(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    w = draw(N, K, dtype=dtype).detach()

    def call() -> tuple[Tensor, ...]:
        nested, flat = (F.quantize_4bit(w, nested=n) for n in (True, False))
        return nested.packed, flat.packed, nested.dequantize(), flat.dequantize(dtype=torch.float32)

    return call, []


def linears(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """A batch and a row of decoding, without gradients too, on a 4-bit and on a dense weight."""
    x, kinds = draw(M, K, dtype=dtype), [member(dropout=0.1), member(dense=True)]
    singles = [(m.weight, m.bias, m.adapters[0]) for m in kinds]

    def call() -> tuple[Tensor, ...]:
        ys = []
        for weight, bias, a in singles:
            options = dict(scaling=a.scaling, dropout_p=a.dropout_p, seed=a.seed)
            ys += [F.qlora_linear(part, weight, bias, a.lora_a, a.lora_b, **options) for part in (x, x[:1])]
            ys.append(F.lora_add(ys[0], x, a.lora_a, a.lora_b, **options))
            with torch.no_grad():
                ys.append(F.qlora_linear(x[:1], weight, bias, a.lora_a, a.lora_b))
        return tuple(ys)

    return call, leaves(x, *kinds)


def groups(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    x, members = draw(M, K, dtype=dtype), [member(dropout=0.1), member(24), member(24, dense=True)]
    mixed = [
        replace(m, adapters=[replace(m.adapters[0], rows=(0, 2)), replace(m.adapters[0], rows=(2, M))])
        for m in members
    ]
    return lambda: (*F.qlora_group(x, members), *F.qlora_group(x, mixed)), leaves(x, *members)


def mlps(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    x, gate, up, down, packed = (
        draw(M, K, dtype=dtype),
        member(),
        member(dropout=0.1),
        member(K, N),
        member(2 * N),
    )

    def call():
        return (
            F.gated_mlp(x, gate, up, down),
            F.gated_mlp_packed(x, packed, down, activation="gelu_tanh"),
        )

    return call, leaves(x, gate, up, down, packed)


def dora(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """Few rows and more of them; a group."""
    x, kinds, magnitude = (
        draw(M, K, dtype=dtype),
        [member(), member(dense=True)],
        draw(N).detach().abs().requires_grad_(),
    )

    def call() -> tuple[Tensor, ...]:
        parts = (x, x[:1], x.repeat(4, 1))
        ys = [F.dora_linear(part, m, magnitude) for m in kinds for part in parts]
        return *ys, *(y for part in parts for y in F.dora_group(part, kinds, [magnitude, magnitude]))

    return call, leaves(x, *kinds, magnitude)


def elementwise(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    x, gate, weight = draw(M, K, dtype=dtype), draw(M, K, dtype=dtype), draw(K)
    q, k = draw(1, 3, M, 16, dtype=dtype), draw(1, 2, M, 16, dtype=dtype)
    angles = draw(1, M, 16).detach()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def call():
        return (
            F.rms_norm(x, weight),
            *F.add_rms_norm(x, gate, weight),
            F.glu(x, gate),
            *F.rope(q, k, cos, sin),
        )

    return call, [x, gate, weight, q, k]


def losses(dtype: torch.dtype) -> tuple[Call, list[Tensor]]:
    """Frozen in 4 bits with an adapter, and trained; by the row, with a bias, too."""
    x, m, head, labels = (
        draw(M, K, dtype=dtype),
        member(),
        draw(N, K, scale=0.1),
        torch.tensor([1, 0, -100, 5, N - 1]),
    )
    a = m.adapters[0]

    def call() -> tuple[Tensor, ...]:
        adapted = dict(bias=m.bias, lora_a=a.lora_a, lora_b=a.lora_b)
        means = [
            F.linear_cross_entropy(x, w, labels, **more) for w, more in ((m.weight, adapted), (head, {}))
        ]
        return *means, F.linear_cross_entropy(x, head, labels, bias=m.bias, reduction="none")

    return call, leaves(x, m, head)


CASES = [quantization, linears, groups, mlps, dora, elementwise, losses]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def results(case: Callable, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    call, wanted = case(dtype)

    def run() -> list[Tensor]:
        outputs = call()
        differentiable = [y for y in outputs if y.requires_grad]
        grads = (
            torch.autograd.grad(differentiable, wanted, [y.detach() * 0.5 + 1 for y in differentiable])
            if wanted
            else ()
        )
        return [*(y.detach() for y in outputs), *grads]

    return run


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_torchs_defaults_change_no_bit(case: Callable, dtype: torch.dtype, default: str) -> None:
    run = results(case, dtype)
    expected = run()
    with DEFAULTS[default]():
        got = run()
    for ours, before in zip(got, expected, strict=True):
        assert (ours.dtype, ours.device) == (before.dtype, before.device) and torch.equal(ours, before)


FACTORIES = {
    "empty",
    "empty_strided",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
    "tensor",
    "arange",
    "linspace",
    "eye",
}


def _relying_on_defaults(source: str) -> list[int]:
    """Lines that call a factory of torch without naming dtype and device; **options are taken to name
    them."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    made = [
        c
        for c in calls
        if c.func.attr in FACTORIES and isinstance(c.func.value, ast.Name) and c.func.value.id == "torch"
    ]
    named = [{keyword.arg for keyword in call.keywords} for call in made]
    return [
        c.lineno
        for c, names in zip(made, named, strict=True)
        if None not in names and not {"dtype", "device"} <= names
    ]


def test_every_tensor_the_ops_make_names_its_dtype_and_device() -> None:
    files = sorted(Path(ops.__file__).parent.rglob("*.py"))
    found = {f"{file}:{line}" for file in files for line in _relying_on_defaults(file.read_text())}
    assert len(files) > 30 and not found
    assert _relying_on_defaults(
        "torch.empty(3)\ntorch.zeros(1, **o)\ntorch.ones(1, dtype=d)\nx.new_empty(2)"
    ) == [1, 3]
