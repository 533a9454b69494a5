"""The parts that measure one kernel: ceilings, dequantize, quantize, decode, and the fused products of medium
M."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern import NF4Weight
from peftkern.functional import dequantize_4bit, linear_4bit, quantize_4bit
from peftkern.ops.dequantize import reference as dequantize_reference
from peftkern.ops.quantize import reference as quantize_reference

from ..harness import OURS
from ..peers import DTYPES, close, equal, within_bound
from ..shapes import GATE_8B, Q_8B, Shape
from .forcing import ALWAYS, NEVER
from .layers import Weights, bnb_linear, forced, triton_only, weights
from .run import Case, Run
from .timing import Candidate, Factory, Unavailable, ceilings, measure, rotating

__all__ = ["DOWN_8B", "baseline", "decode", "dequantize", "quantize", "shapes", "small_m"]

DOWN_8B = Shape(4096, 14336, "Llama-3.1-8B down_proj")
TINY = Shape(128, 192, "no model's: proves the script")
DECODE_M, SMALL_M = (1, 2, 4, 8, 16), (16, 32, 64, 128, 256, 512)
BNB, DENSE = "bitsandbytes", "dense bf16"


def shapes(run: Run) -> tuple[Shape, ...]:
    return (TINY,) if run.small else (Q_8B, GATE_8B, DOWN_8B)


def copied(weight: NF4Weight) -> NF4Weight:
    """The same weight at other addresses."""
    tensors = {f.name: v.clone() for f in fields(weight) if isinstance(v := getattr(weight, f.name), Tensor)}
    return replace(weight, **tensors)


def baseline(run: Run) -> None:
    """Ceilings by size: copies within and beyond the L2, bf16 products from tall and thin to square."""
    ceilings(run)
    for size in (1 << 16, 1 << 18) if run.small else (1 << 24, 1 << 26, 1 << 28, 1 << 30, 1 << 32):
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=run.device)
        target = torch.empty_like(source)
        copying = Candidate("torch", lambda: target.copy_(source), equal(source), 2 * size)  # noqa: B023 (measured within the loop's turn)
        measure(run, Case("copy", "read and written", "uint8", m=size), {"torch": lambda: copying}, ours="")  # noqa: B023
    for shape in shapes(run):
        w = torch.randn(shape.n, shape.k, device=run.device).bfloat16()
        for m in (16, 64) if run.small else (16, 64, 256, 512, 2048, 8192):
            x = torch.randn(m, shape.k, device=run.device).bfloat16()
            check = _named(close({"y": x.double() @ w.double().t()}, torch.bfloat16))
            candidate = Candidate(
                "torch", functools.partial(F.linear, x, w), check, 0, 2 * m * shape.n * shape.k
            )
            measure(
                run,
                Case("GEMM", "bf16", "bfloat16", shape.n, shape.k, m),
                {"torch": lambda c=candidate: c},
                ours="",
            )


def _named(check: Callable[[dict], None]) -> Callable[[Tensor], None]:
    """A check of one tensor, y."""
    return lambda y: check({"y": y})


def _within(
    context: Callable[[], contextlib.AbstractContextManager], call: Callable[..., Any]
) -> Callable[..., Any]:
    def run_within(*args: Any) -> Any:
        with context(), torch.no_grad():
            return call(*args)

    return run_within


def dequantize(run: Run) -> None:
    """A whole weight to a dense tensor: ours, Triton's, bitsandbytes', and copying the result as the
    yardstick."""
    dtypes = ("bfloat16",) if run.small else ("bfloat16", "float16", "float32")
    for shape in shapes(run):
        for dtype, nested in [(d, True) for d in dtypes] + [("bfloat16", False)]:
            for timed in run.modes():
                case = Case("dequantize", "nested" if nested else "plain", dtype, shape.n, shape.k, 0, timed)
                if run.wanted(case):
                    measure(
                        run,
                        case,
                        _dequantize_factories(
                            run, weights(run.device, shape.n, shape.k, DTYPES[dtype], nested)
                        ),
                    )


def _dequantize_factories(run: Run, w: Weights) -> Mapping[str, Factory]:
    dtype = w.dense.dtype
    absmax = (
        w.packed.absmax,
        w.packed.absmax_8bit,
        w.packed.absmax_code,
        w.packed.nested_absmax,
        w.packed.absmax_offset,
    )
    sizes = (w.packed.shape, w.packed.blocksize, w.packed.nested_blocksize)
    expected = dequantize_reference.dequantize_4bit(w.packed.packed, w.packed.code, *absmax, *sizes, dtype)
    moved, count = w.packed.nbytes + expected.nbytes, run.copies(w.packed.nbytes + expected.nbytes)
    inputs = [copied(w.packed) for _ in range(count)]
    outputs = [torch.full_like(expected, math.nan) for _ in range(count)]

    def own(context: Callable[[], contextlib.AbstractContextManager], name: str) -> Candidate:
        call = _within(context, lambda i: dequantize_4bit(inputs[i], out=outputs[i]))
        return rotating(name, [functools.partial(call, i) for i in range(count)], equal(expected), moved)

    def bnb() -> Candidate:
        if w.layer is None:
            raise Unavailable(w.missing)
        import bitsandbytes.functional as functional

        layers = [copy.deepcopy(w.layer) for _ in range(count)]
        calls = [
            functools.partial(functional.dequantize_4bit, layer.weight.data, layer.weight.quant_state)
            for layer in layers
        ]
        return rotating(BNB, calls, _named(close({"y": expected}, dtype)), moved)

    def copying() -> Candidate:
        sources = [expected.clone() for _ in range(count)]
        calls = [
            functools.partial(output.copy_, source) for output, source in zip(outputs, sources, strict=True)
        ]
        return rotating("copy", calls, equal(expected), 2 * expected.nbytes)

    triton = f"{OURS}, Triton only"
    return {
        OURS: lambda: own(contextlib.nullcontext, OURS),
        triton: lambda: own(triton_only(run), triton),
        BNB: bnb,
        "copy": copying,
    }


def quantize(run: Run) -> None:
    """A dense weight to NF4 with nested absmax."""
    for shape in shapes(run):
        for dtype in ("bfloat16", "float32"):
            for timed in run.modes():
                case = Case("quantize", "nested", dtype, shape.n, shape.k, 0, timed)
                if run.wanted(case):
                    torch.manual_seed(0)
                    measure(
                        run,
                        case,
                        _quantize_factories(
                            run, (torch.randn(shape.n, shape.k, device=run.device) * 0.02).to(DTYPES[dtype])
                        ),
                    )


def _quantize_factories(run: Run, dense: Tensor) -> Mapping[str, Factory]:
    first = quantize_4bit(dense)
    moved = dense.nbytes + first.nbytes
    inputs = [dense.clone() for _ in range(run.copies(moved))]
    codes, absmax = quantize_reference.quantize_4bit(dense, first.blocksize, first.code)

    def check(got: NF4Weight) -> None:
        """Codes and absmax bit for bit the definition's; the nested absmax that of the offset it says."""
        equal(codes.reshape(-1))(got.packed.reshape(-1))
        nested = quantize_reference.quantize_absmax(
            absmax - got.absmax_offset, got.absmax_code, got.nested_blocksize
        )
        for expected, value in zip(nested, (got.absmax_8bit, got.nested_absmax), strict=True):
            equal(expected)(value)

    def check_peer(got: tuple) -> None:
        same = (got[0].view(torch.uint8).reshape(-1) == codes.reshape(-1)).float().mean().item()
        if same < 0.9999:
            raise AssertionError(f"only {same:.2%} of its bytes are the definition's")

    def own(context: Callable[[], contextlib.AbstractContextManager], name: str) -> Candidate:
        call = _within(context, quantize_4bit)
        return rotating(name, [functools.partial(call, w) for w in inputs], check, moved)

    def bnb() -> Candidate:
        bnb_linear(dense[:64, :64])  # says why where it is missing
        import bitsandbytes.functional as functional

        call = functools.partial(functional.quantize_4bit, compress_statistics=True, quant_type="nf4")
        return rotating(BNB, [functools.partial(call, w) for w in inputs], check_peer, moved)

    triton = f"{OURS}, Triton only"
    return {
        OURS: lambda: own(contextlib.nullcontext, OURS),
        triton: lambda: own(triton_only(run), triton),
        BNB: bnb,
    }


def decode(run: Run) -> None:
    """Few rows through a frozen 4-bit linear, without gradients; weights rotate beyond the L2."""
    for shape in shapes(run):
        for m in (1, 4) if run.small else DECODE_M:
            for timed in run.modes():
                case = Case("decode", "nested", "bfloat16", shape.n, shape.k, m, timed)
                if run.wanted(case):
                    gemv = functools.partial(forced, run, gemv_max_m=ALWAYS, mma_min_m=ALWAYS)
                    variants = {
                        "gemv": gemv,
                        "mma": _variants(run)["mma"],
                        "Triton only": lambda: triton_only(run),
                    }
                    measure(
                        run,
                        case,
                        _forward_factories(
                            run, weights(run.device, shape.n, shape.k, torch.bfloat16), m, variants
                        ),
                    )


def _variants(run: Run) -> dict[str, Callable[[], Callable[[], contextlib.AbstractContextManager]]]:
    """Our linear forced onto one kernel."""
    return {
        "Triton only": lambda: triton_only(run),
        "fused": lambda: forced(run, gemv_max_m=NEVER, mma_min_m=ALWAYS, fused_max_m=ALWAYS),
        "mma": lambda: forced(run, gemv_max_m=NEVER, mma_min_m=0, fused_max_m=ALWAYS),
        "slabs": lambda: forced(run, gemv_max_m=NEVER, fused_max_m=NEVER),
    }


def _forward_factories(
    run: Run, w: Weights, m: int, variants: Mapping[str, Callable]
) -> Mapping[str, Factory]:
    n, k = w.dense.shape
    torch.manual_seed(1)
    x = torch.randn(m, k, device=run.device).to(w.dense.dtype)
    exact, rounded = {"y": x.double() @ w.decoded.double().t()}, w.decoded.to(x.dtype)
    plain = {"y": (x.float() @ rounded.float().t()).to(x.dtype)}
    activations, flops = (m * k + m * n) * x.element_size(), 2 * m * n * k
    moved, dense_moved = w.packed.nbytes + activations, rounded.nbytes + activations

    def own(context: Callable[[], contextlib.AbstractContextManager], name: str) -> Candidate:
        call = _within(context, linear_4bit)
        calls = [functools.partial(call, x, copied(w.packed)) for _ in range(run.copies(moved))]
        return rotating(name, calls, _named(within_bound(exact, plain)), moved, flops)

    def bnb() -> Candidate:
        if w.layer is None:
            raise Unavailable(w.missing)
        layers = [copy.deepcopy(w.layer).eval() for _ in range(run.copies(moved))]
        calls = [functools.partial(_within(contextlib.nullcontext, layer), x) for layer in layers]
        return rotating(BNB, calls, _named(close(exact, x.dtype)), moved, flops)

    def dense() -> Candidate:
        copies = [rounded.clone() for _ in range(run.copies(dense_moved))]
        return rotating(
            DENSE,
            [functools.partial(F.linear, x, c) for c in copies],
            _named(close(exact, x.dtype)),
            dense_moved,
            flops,
        )

    factories: dict[str, Factory] = {OURS: lambda: own(contextlib.nullcontext, OURS), BNB: bnb, DENSE: dense}
    for suffix, make in variants.items():
        factories[f"{OURS}, {suffix}"] = lambda suffix=suffix, make=make: own(make(), f"{OURS}, {suffix}")
    return factories


def small_m(run: Run) -> None:
    """M = 16 ... 512: the forward without gradients, and dx alone."""
    for direction, build in (("forward", _forward_factories), ("dx", _dx_factories)):
        for shape in shapes(run):
            for m in (16, 33) if run.small else SMALL_M:
                for timed in run.modes():
                    case = Case("small", direction, "bfloat16", shape.n, shape.k, m, timed)
                    if run.wanted(case):
                        measure(
                            run,
                            case,
                            build(
                                run, weights(run.device, shape.n, shape.k, torch.bfloat16), m, _variants(run)
                            ),
                        )


def _dx_factories(run: Run, w: Weights, m: int, variants: Mapping[str, Callable]) -> Mapping[str, Factory]:
    """The backward alone: each forward was run when its provider was built."""
    n, k = w.dense.shape
    torch.manual_seed(1)
    x, dy = (torch.randn(m, size, device=run.device).to(w.dense.dtype) for size in (k, n))
    exact, rounded = {"y": dy.double() @ w.decoded.double()}, w.decoded.to(x.dtype)
    plain = {"y": (dy.float() @ rounded.float()).to(x.dtype)}
    activations, flops = (m * k + m * n) * x.element_size(), 2 * m * n * k
    moved = w.packed.nbytes + activations

    def gradient(
        forward: Callable[[Tensor], Tensor], context: Callable = contextlib.nullcontext
    ) -> Callable[[], Tensor]:
        leaf = x.detach().requires_grad_()
        with context():
            y = forward(leaf)

        def call() -> Tensor:
            with context():
                return torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

        return call

    def own(context: Callable[[], contextlib.AbstractContextManager], name: str) -> Candidate:
        packs = [copied(w.packed) for _ in range(run.copies(moved))]
        calls = [gradient(functools.partial(linear_4bit, weight=pack), context) for pack in packs]
        return rotating(name, calls, _named(within_bound(exact, plain)), moved, flops)

    def bnb() -> Candidate:
        if w.layer is None:
            raise Unavailable(w.missing)
        calls = [gradient(copy.deepcopy(w.layer).train()) for _ in range(run.copies(moved))]
        return rotating(BNB, calls, _named(close(exact, x.dtype)), moved, flops)

    def dense() -> Candidate:
        size = rounded.nbytes + activations
        calls = [
            gradient(functools.partial(F.linear, weight=rounded.clone())) for _ in range(run.copies(size))
        ]
        return rotating(DENSE, calls, _named(close(exact, x.dtype)), size, flops)

    factories: dict[str, Factory] = {OURS: lambda: own(contextlib.nullcontext, OURS), BNB: bnb, DENSE: dense}
    for suffix, make in variants.items():
        factories[f"{OURS}, {suffix}"] = lambda suffix=suffix, make=make: own(make(), f"{OURS}, {suffix}")
    return factories
