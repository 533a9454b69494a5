"""What the options of a LoRA linear cost, forward + backward: dropout, DoRA, mixed adapters and a group of
three, each against the call without it, on the linears of a SmolLM2-135M layer and on one 4096x4096."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.functional import Adapter, Member, dora_linear, qlora_group, qlora_linear, row_squares

from .harness import OURS, Provider, Spec, main
from .peers import DTYPES, close

__all__ = ["build", "specs"]

R, SCALING, DROPOUT, MIXED = 16, 2.0, 0.1, 4
# q, k, v, o, gate, up, down of SmolLM2-135M, (N, K); a shape of one linear stands for itself.
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
# The option, and the name of what it is compared with.
BASELINES = {
    "dropout 0.1": "without dropout",
    "DoRA": "LoRA",
    "4 mixed adapters": "1 adapter",
    "q, k, v": "single linears",
}


def specs(small: bool) -> list[Spec]:
    """n x k: of one linear, or the hidden size twice for the linears of a layer; small: fewer rows."""
    m = 64 if small else 512
    found = [
        Spec("options layer", mode, d, 576, 576, m) for mode in BASELINES for d in ("bfloat16", "float32")
    ]
    n = 256 if small else 4096
    single = [mode for mode in BASELINES if mode != "q, k, v"]
    return found + [
        Spec("options linear", mode, d, n, n, m) for mode in single for d in ("bfloat16", "float32")
    ]


class _Linear:
    """A frozen 4-bit linear, its adapters, an input and a gradient; every call gives the gradients of x and
    of all adapters."""

    def __init__(self, n: int, k: int, m: int, dtype: torch.dtype) -> None:
        self.weight = NF4Weight.from_dense(torch.randn(n, k) * 0.02)
        self.x, self.dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
        self.a = [(torch.randn(R, k) / k**0.5).to(dtype).requires_grad_() for _ in range(MIXED)]
        self.b = [(torch.randn(n, R) * 0.05).to(dtype).requires_grad_() for _ in range(MIXED)]
        self.squares = row_squares(self.weight)
        self.magnitude = self.squares.sqrt().to(dtype).requires_grad_()
        self.seed = torch.tensor([5])

    def lora(self, dropout_p: float = 0.0) -> dict[str, Tensor]:
        options = dict(scaling=SCALING, dropout_p=dropout_p, seed=self.seed if dropout_p else None)
        return self._gradients(qlora_linear(self.x, self.weight, None, self.a[0], self.b[0], **options), 1)

    def dora(self) -> dict[str, Tensor]:
        member = Member(self.weight, None, [Adapter(self.a[0], self.b[0], SCALING)])
        return self._gradients(dora_linear(self.x, member, self.magnitude, self.squares), 1, self.magnitude)

    def mixed(self, count: int) -> dict[str, Tensor]:
        step = len(self.x) // count
        found = [
            Adapter(self.a[i], self.b[i], SCALING, rows=(i * step, (i + 1) * step)) for i in range(count)
        ]
        return self._gradients(qlora_group(self.x, [Member(self.weight, None, found)])[0], count)

    def _gradients(self, y: Tensor, count: int, *more: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, [self.x, *self.a[:count], *self.b[:count], *more], self.dy)
        return {"y": y.detach()} | {f"d{i}": g for i, g in enumerate(grads)}


def _together(linears: list[_Linear]) -> dict[str, Tensor]:
    """q, k and v as one call on one input."""
    members = [
        Member(linear.weight, None, [Adapter(linear.a[0], linear.b[0], SCALING)]) for linear in linears
    ]
    x = linears[0].x
    trained = [x, *(linear.a[0] for linear in linears), *(linear.b[0] for linear in linears)]
    outputs = qlora_group(x, members)
    return _named(outputs, torch.autograd.grad(outputs, trained, [linear.dy for linear in linears]))


def _one_by_one(linears: list[_Linear]) -> dict[str, Tensor]:
    x = linears[0].x
    trained = [x, *(linear.a[0] for linear in linears), *(linear.b[0] for linear in linears)]
    outputs = [
        qlora_linear(x, linear.weight, None, linear.a[0], linear.b[0], scaling=SCALING) for linear in linears
    ]
    return _named(outputs, torch.autograd.grad(outputs, trained, [linear.dy for linear in linears]))


def _named(outputs, grads) -> dict[str, Tensor]:
    return {
        f"{prefix}{i}": t.detach()
        for prefix, many in (("y", outputs), ("d", grads))
        for i, t in enumerate(many)
    }


def _calls(mode: str, linears: list[_Linear]) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """With the option, and without it."""
    if mode == "q, k, v":
        return lambda: _together(linears[:3]), lambda: _one_by_one(linears[:3])
    option, without = {
        "dropout 0.1": (lambda one: one.lora(DROPOUT), _Linear.lora),
        "DoRA": (_Linear.dora, _Linear.lora),
        "4 mixed adapters": (lambda one: one.mixed(MIXED), lambda one: one.mixed(1)),
    }[mode]
    return lambda: _each(option, linears), lambda: _each(without, linears)


def _each(run: Callable[[_Linear], dict[str, Tensor]], linears: list[_Linear]) -> dict[str, Tensor]:
    return {f"{i} {name}": value for i, linear in enumerate(linears) for name, value in run(linear).items()}


def _finite(got: dict[str, Tensor]) -> None:
    wrong = [name for name, value in got.items() if not torch.isfinite(value).all()]
    if wrong:
        raise AssertionError(f"not finite: {wrong}")


def _exact(mode: str, linears: list[_Linear]) -> dict[str, Tensor] | None:
    """What the option gives computed without it, where that can be: a group's parts are the single linears,
    mixed rows each adapter's."""
    if mode == "q, k, v":
        return _one_by_one(linears[:3])
    if mode != "4 mixed adapters":
        return None
    found = {}
    for i, one in enumerate(linears):
        step = len(one.x) // MIXED
        parts = [
            qlora_linear(x, one.weight, None, a, b, scaling=SCALING)
            for x, a, b in zip(one.x.split(step), one.a, one.b, strict=True)
        ]
        found |= {f"{i} {name}": value for name, value in one._gradients(torch.cat(parts), MIXED).items()}
    return found


def build(spec: Spec) -> list[Provider]:
    torch.manual_seed(0)
    dtype = DTYPES[spec.dtype]
    shapes = LAYER if spec.kernel == "options layer" else ((spec.n, spec.k),)
    linears = [_Linear(n, k, spec.m, dtype) for n, k in shapes]
    option, without = _calls(spec.mode, linears)
    exact = _exact(spec.mode, linears)
    return [
        Provider(OURS, option, close(exact, dtype) if exact else _finite),
        Provider(BASELINES[spec.mode], without, _finite),
    ]


if __name__ == "__main__":
    raise SystemExit(main(specs, build, __doc__))
