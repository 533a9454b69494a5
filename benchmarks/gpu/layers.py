"""A QLoRA linear as every provider computes it: ours in each of its forms, PEFT + bitsandbytes, axolotl's
kernels, a frozen bf16 linear."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftkern import NF4Weight
from peftkern.functional import qlora_linear
from peftkern.ops.dequantize import reference
from peftkern.ops.linear import tuned
from peftkern.ops.philox import dropout_scale
from peftkern.runtime import backends

from ..harness import OURS
from ..peers import close, has, peft_linear, within_bound
from .forcing import NEVER, gpu_row
from .run import DENSE, NO_DROPOUT, Run
from .timing import Candidate, Factory, Unavailable

__all__ = [
    "SCALING",
    "Problem",
    "Weights",
    "bnb_linear",
    "forced",
    "linear_factories",
    "steps",
    "weights",
]

SCALING = 2.0
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """One frozen weight: dense [n, k], in a bitsandbytes layer (None, with the reason, where there is none),
    ours, and decoded to fp32."""

    dense: Tensor
    layer: nn.Module | None
    missing: str
    packed: NF4Weight
    decoded: Tensor

    @property
    def quant(self) -> tuple:
        """The ops' tuple."""
        w = self.packed
        return (
            w.code,
            w.absmax,
            w.absmax_8bit,
            w.absmax_code,
            w.nested_absmax,
            w.absmax_offset,
            w.blocksize,
            w.nested_blocksize,
        )


def bnb_linear(dense: Tensor, nested: bool = True) -> nn.Module:
    """A bitsandbytes Linear4bit (NF4) holding `dense`, quantized on its device."""
    if not has("bitsandbytes"):
        raise Unavailable("bitsandbytes is not installed")
    import bitsandbytes as bnb

    n, k = dense.shape
    options = dict(compress_statistics=nested, quant_type="nf4")
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dense.dtype, **options)
    layer.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, module=layer, **options)
    if not dense.is_cuda:
        return layer.to(dense.device).train()
    # bitsandbytes quantizes on the default stream, whatever torch's is: on another one it read a weight that
    # was not there yet.
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream()):
        layer = layer.to(dense.device).train()
    torch.cuda.synchronize()
    return layer


@functools.lru_cache(maxsize=1)
def weights(device: str, n: int, k: int, dtype: torch.dtype, nested: bool = True) -> Weights:
    torch.manual_seed(0)
    dense = (torch.randn(n, k, device=device) * 0.02).to(dtype)
    layer, missing = None, ""
    try:
        layer = bnb_linear(dense, nested)
    except Exception as error:  # ours is measured without it
        missing = f"{type(error).__name__}: {error}"
    packed = NF4Weight.from_dense(dense, nested=nested) if layer is None else NF4Weight.from_bnb(layer)
    absmax = (
        packed.absmax,
        packed.absmax_8bit,
        packed.absmax_code,
        packed.nested_absmax,
        packed.absmax_offset,
    )
    sizes = (packed.shape, packed.blocksize, packed.nested_blocksize)
    return Weights(
        dense,
        layer,
        missing,
        packed,
        reference.dequantize_4bit(packed.packed, packed.code, *absmax, *sizes, torch.float32),
    )


def forced(run: Run, **changes: object) -> Callable[[], AbstractContextManager]:
    """A context in which every GPU call follows the card's row with these changes."""
    _needs_gpu_path(run)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with (
            contextlib.nullcontext() if run.cuda else backends.use_backend("triton"),
            tuned.use_row(replace(gpu_row(), **changes)),
        ):
            yield

    return context


def triton_only(run: Run) -> Callable[[], AbstractContextManager]:
    _needs_gpu_path(run)
    return lambda: backends.use_backend("triton")


def _needs_gpu_path(run: Run) -> None:
    if not run.cuda and not run.interpret:
        raise Unavailable("needs a CUDA device (--interpret runs Triton's kernels on the CPU)")


class Problem:
    """Inputs of one QLoRA linear and its exact results. Adapters hold bf16 values, so that fp32 adapters have
    the same results."""

    def __init__(self, w: Weights, m: int, r: int, dropout_p: float) -> None:
        (n, k), dtype, device = w.dense.shape, w.dense.dtype, w.dense.device
        torch.manual_seed(1)
        self.w, self.m, self.n, self.k, self.r, self.dropout_p, self.dtype = w, m, n, k, r, dropout_p, dtype
        self.x, self.dy = (torch.randn(m, size, device=device).to(dtype) for size in (k, n))
        self.a = (torch.randn(r, k, device=device) / k**0.5).to(dtype)
        self.b = (torch.randn(n, r, device=device) * 0.05).to(dtype)
        self.seed = torch.tensor([12345], dtype=torch.int64, device=device)

    @functools.cached_property
    def undropped(self) -> Results:
        """fp64, without dropout."""
        return self._results(torch.float64, None)

    @functools.cached_property
    def exact(self) -> Results:
        """fp64, with the mask of `seed`."""
        return self._results(torch.float64, self._mask()) if self.dropout_p else self.undropped

    def plain(self, *, dropped: bool) -> Results:
        """What plain PyTorch returns at the inputs' dtype: factors and results rounded to it, sums in
        fp32."""
        mask = self._mask() if dropped else None
        return {name: value.to(self.dtype) for name, value in self._results(torch.float32, mask).items()}

    def _mask(self) -> Tensor | None:
        return dropout_scale(self.m, self.k, self.dropout_p, self.seed) if self.dropout_p else None

    def _results(self, dtype: torch.dtype, mask: Tensor | None) -> Results:
        """y, dx, d_lora_a, d_lora_b by the definition; fp64 takes the format's weight, fp32 its rounding to
        x's dtype."""
        weight = self.w.decoded if dtype == torch.float64 else self.w.decoded.to(self.dtype)
        x, dy, w, a, b = (t.to(dtype) for t in (self.x, self.dy, weight, self.a, self.b))
        dropped = x if mask is None else x * mask.to(dtype)
        xa, dyb = dropped @ a.t(), SCALING * (dy @ b)
        through = dyb @ a if mask is None else (dyb @ a) * mask.to(dtype)
        return {
            "y": x @ w.t() + SCALING * (xa @ b.t()),
            "dx": dy @ w + through,
            "d_lora_a": dyb.t() @ dropped,
            "d_lora_b": SCALING * (dy.t() @ xa),
        }

    def step(self, forward: Callable[[Tensor], Tensor], *trained: Tensor, autocast: bool = False) -> Results:
        """One forward and backward; the results by name."""
        x = self.x.detach().requires_grad_()
        with (
            torch.autocast(x.device.type, self.dtype, enabled=True) if autocast else contextlib.nullcontext()
        ):
            y = forward(x)
        grads = torch.autograd.grad(y, (x, *trained), self.dy.to(y.dtype))
        return dict(zip(("y", "dx", "d_lora_a", "d_lora_b"), (y, *grads), strict=False))


Step = Callable[[], Results]


def ours(
    p: Problem,
    dropout_p: float,
    *,
    adapters: torch.dtype | None = None,
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Callable[..., Results]:
    """Our linear, forward and backward; the mask is drawn anew each call unless a seed is given."""
    a, b = (t.to(adapters or p.dtype).detach().clone().requires_grad_() for t in (p.a, p.b))

    def call(seed: Tensor | None = None) -> Results:
        with context():
            return p.step(
                lambda x: qlora_linear(
                    x, p.w.packed, lora_a=a, lora_b=b, scaling=SCALING, dropout_p=dropout_p, seed=seed
                ),
                a,
                b,
            )

    return call


def peft(
    p: Problem, dropout_p: float, *, adapters: torch.dtype, autocast: bool = False, kind: str = "peft"
) -> Step:
    """PEFT on bitsandbytes; kind: "peft" (its own forward), "compiled" (by torch.compile), "axolotl"
    (axolotl's kernel on PEFT's layer)."""
    if p.w.layer is None:
        raise Unavailable(p.w.missing)
    if kind == "axolotl" and not p.x.is_cuda:
        raise Unavailable("axolotl's kernels need a GPU")
    for package in ("peft",) + ("axolotl",) * (kind == "axolotl"):
        if not has(package):
            raise Unavailable(f"{package} is not installed")
    lora = peft_linear(p.w.layer, p.r, dropout_p, p.a.to(adapters), p.b.to(adapters), SCALING)
    forward: Callable[[Tensor], Tensor] = lora
    if kind == "compiled":
        # layers share their code: another shape would count as a recompilation and turn dynamic
        torch.compiler.reset()
        forward = torch.compile(lora, dynamic=False)
    elif kind == "axolotl":
        from axolotl.kernels.lora import apply_lora_linear

        def forward(x: Tensor) -> Tensor:
            return apply_lora_linear(lora, x[None])[0]  # it takes [batch, tokens, features] alone

    trained = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)
    return lambda: p.step(forward, *trained, autocast=autocast)


def frozen(p: Problem) -> Step:
    """A frozen dense linear of x's dtype: forward and dx."""
    w = p.w.decoded.to(p.dtype)
    return lambda: p.step(lambda x: F.linear(x, w))


def steps(
    run: Run, p: Problem, *, compiled: bool = False
) -> dict[str, Callable[[float], Callable[..., Results]]]:
    """Every provider of a forward and backward, by name: a function of the dropout probability that builds
    it, or raises Unavailable."""
    fp32, bf16 = torch.float32, p.dtype
    found: dict[str, Callable[[float], Callable[..., Results]]] = {
        OURS: lambda q: ours(p, q),
        f"{OURS}, fp32 adapters": lambda q: ours(p, q, adapters=fp32),
        f"{OURS}, Triton only": lambda q: ours(p, q, context=triton_only(run)),
        f"{OURS}, slabs + cuBLAS": lambda q: ours(
            p, q, context=forced(run, gemv_max_m=NEVER, fused_max_m=NEVER, gemm="cublas")
        ),
        f"{OURS}, slabs + Triton GEMM": lambda q: ours(
            p, q, context=forced(run, gemv_max_m=NEVER, fused_max_m=NEVER, gemm="triton")
        ),
        "PEFT + bitsandbytes": lambda q: peft(p, q, adapters=fp32),
        "PEFT + bitsandbytes, autocast": lambda q: peft(p, q, adapters=fp32, autocast=True),
        "PEFT + bitsandbytes, bf16 adapters": lambda q: peft(p, q, adapters=bf16),
        "axolotl kernels, autocast": lambda q: peft(p, q, adapters=fp32, autocast=True, kind="axolotl"),
    }
    if compiled:
        found["compiled PEFT + bitsandbytes, bf16 adapters"] = lambda q: peft(
            p, q, adapters=bf16, kind="compiled"
        )
    return found


def linear_factories(run: Run, p: Problem, *, compiled: bool = False) -> Mapping[str, Factory]:
    """Candidates for `measure`: every provider of `steps`, a frozen dense linear, and with dropout our own
    linear without it."""
    flops = 4 * p.m * p.n * p.k
    factories: dict[str, Factory] = {}
    for name, build in steps(run, p, compiled=compiled).items():

        def factory(name: str = name, build: Callable = build) -> Candidate:
            call = build(p.dropout_p)
            moved = _planned_bytes(p) if name == OURS and run.cuda else 0
            return Candidate(name, call, _judge(p, call, build, name.startswith(OURS)), moved, flops)

        factories[name] = factory
    factories[DENSE] = lambda: Candidate(DENSE, frozen(p), close(_dense_results(p), p.dtype), 0, flops)
    if p.dropout_p:
        factories[NO_DROPOUT] = lambda: Candidate(
            NO_DROPOUT, ours(p, 0.0), within_bound(p.undropped, p.plain(dropped=False)), 0, flops
        )
    return factories


def _dense_results(p: Problem) -> Results:
    w = p.w.decoded.to(p.dtype).double()
    return {"y": p.x.double() @ w.t(), "dx": p.dy.double() @ w}


def _judge(p: Problem, call: Callable[..., Results], build: Callable, own: bool) -> Callable[[Results], None]:
    """Ours against fp64 within the contract's bound, with the seeded mask; a peer draws a mask of its own, so
    that its dropout-free twin is judged, and the timed result has to be finite."""
    judge = within_bound(p.exact, p.plain(dropped=True)) if own else close(p.undropped, p.dtype)

    def check(got: Results) -> None:
        for name, value in got.items():
            if not bool(torch.isfinite(value).all()):
                raise AssertionError(f"{name}: not finite")
        if not p.dropout_p:
            judge(got)
        elif own:
            judge(call(seed=p.seed))
        else:
            judge(build(0.0)())

    return check


def _planned_bytes(p: Problem) -> int:
    """Bytes of our launches on this device, forward and backward."""
    from peftkern.ops.linear import plan

    options = {"nested": p.w.packed.nested, "dropout": p.dropout_p > 0}
    shape = plan.Shape(p.m, p.n, p.k, p.r, p.dtype, **options)
    device = plan.device_for(p.x)
    launches = [*plan.forward_plan(shape, device), *plan.backward_plan(shape, device)]
    return sum(launch.reads + launch.writes for launch in launches)
