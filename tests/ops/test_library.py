"""The ops as torch sees them: schemas, fakes, autograd, compile; and what the public functions refuse."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import library

import peftkern
from peftkern import NF4Weight, functional, use_backend
from peftkern.formats import nf4
from peftkern.ops.linear import config


def _quant(w: NF4Weight) -> tuple:
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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("nested", [True, False])
def test_opcheck(backend: str, nested: bool) -> None:
    w = NF4Weight.from_dense(torch.randn(20, 64), nested=nested)
    x, dy, a, b = torch.randn(5, 64), torch.randn(5, 20), torch.randn(3, 64), torch.randn(20, 3)
    ops, seed = torch.ops.peftkern, torch.tensor([3])
    with use_backend(backend):
        library.opcheck(ops.quantize_4bit.default, (x, 64, w.code))
        library.opcheck(ops.quantize_absmax.default, (torch.randn(300), nf4.dynamic_map(), 256))
        library.opcheck(
            ops.dequantize_4bit.default, (w.packed, *_quant(w)[:6], [20, 64], 64, 256, torch.bfloat16)
        )
        library.opcheck(ops.dequantize_4bit_out.default, (w.packed, *_quant(w), torch.empty(20, 64)))
        library.opcheck(
            ops.qlora_linear_fwd.default, (x, w.packed, *_quant(w), 20, torch.randn(20), a, b, 0.5, 0.1, seed)
        )
        library.opcheck(
            ops.qlora_linear_fwd.default, (x, w.packed, *_quant(w), 20, None, None, None, 1.0, 0.0, None)
        )
        xa = torch.randn(5, 3)
        for needs in ([True] * 4, [True, False, False, False], [False, True, True, True]):
            library.opcheck(
                ops.qlora_linear_bwd.default,
                (dy, x, w.packed, *_quant(w), 64, a, b, xa, 0.5, 0.1, seed, needs),
            )


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compile_fullgraph_forward_and_backward(dropout_p: float) -> None:
    w = NF4Weight.from_dense(torch.randn(20, 64))
    x, bias, a, b = (torch.randn(*s, requires_grad=True) for s in ((2, 5, 64), (20,), (3, 64), (20, 3)))
    seed = torch.tensor([3]) if dropout_p else None

    def f(x, bias, a, b):
        return (
            functional.qlora_linear(x, w, bias, a, b, scaling=0.5, dropout_p=dropout_p, seed=seed)
            .square()
            .sum()
        )

    eager = torch.autograd.grad(f(x, bias, a, b), (x, bias, a, b))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(
            torch.autograd.grad(compiled(x, bias, a, b), (x, bias, a, b)), eager, strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    w = NF4Weight.from_dense(torch.randn(20, 64))
    x, a, b = (torch.randn(*s, requires_grad=True) for s in ((7, 64), (3, 64), (20, 3)))

    def f(x, a, b):
        return functional.qlora_linear(torch.sin(x), w, lora_a=a, lora_b=b).cos().sum()

    eager = torch.autograd.grad(f(x, a, b), (x, a, b))
    for got, expected in zip(
        torch.autograd.grad(torch.compile(f, fullgraph=True)(x, a, b), (x, a, b)), eager, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_compile_does_not_recompile_for_new_row_counts() -> None:
    w = NF4Weight.from_dense(torch.randn(20, 64))
    compiled = torch.compile(
        lambda x: functional.linear_4bit(x, w), fullgraph=True, backend="aot_eager", dynamic=True
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 9, 33):
            assert compiled(torch.randn(m, 64)).shape == (m, 20)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dense", [True, False])
def test_autocast_leaves_the_op_alone(backend: str, dense: bool) -> None:
    w = torch.randn(20, 64) if dense else NF4Weight.from_dense(torch.randn(20, 64))
    x = torch.randn(5, 64, requires_grad=True)
    with use_backend(backend):
        plain = functional.linear_4bit(x, w)
        with torch.autocast("cpu", torch.bfloat16):
            cast = functional.linear_4bit(x, w)
            (dx,) = torch.autograd.grad(cast.sum(), x)
        assert torch.equal(cast, plain) and torch.equal(dx, torch.autograd.grad(plain.sum(), x)[0])


def test_checkpointing_repeats_the_dropout_mask() -> None:
    w = NF4Weight.from_dense(torch.randn(20, 64))
    x, a, b = (torch.randn(*s, requires_grad=True) for s in ((40, 64), (3, 64), (20, 3)))

    def f(x):
        return functional.qlora_linear(x, w, lora_a=a, lora_b=b, dropout_p=0.5).square()

    torch.manual_seed(11)
    plain = torch.autograd.grad(f(x).sum(), (x, a, b))
    for reentrant in (True, False):
        torch.manual_seed(11)
        for p in (x, a, b):
            p.grad = None
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant).sum().backward()
        for got, expected in zip((x.grad, a.grad, b.grad), plain, strict=True):
            assert torch.equal(got, expected)


def test_dropout_statistics_and_seeds() -> None:
    from peftkern.ops.philox import dropout_scale

    mask = dropout_scale(512, 1000, 0.1, torch.tensor([1]))
    kept = (mask > 0).double().mean().item()
    assert abs(kept - 0.9) < 4 * (0.09 / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - 1.0) < 0.003
    assert not torch.equal(mask, dropout_scale(512, 1000, 0.1, torch.tensor([2])))
    # a function of (row, column, seed) alone
    assert torch.equal(mask[:100, :64], dropout_scale(100, 64, 0.1, torch.tensor([1])))


def test_philox_known_answer() -> None:
    """Random123's published vectors for philox4x32-10."""
    from peftkern.ops.philox import philox_4x32

    zero, ones = torch.zeros((), dtype=torch.int64), torch.tensor(0xFFFFFFFF)
    assert [int(v) for v in philox_4x32([zero] * 4, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(v) for v in philox_4x32([ones] * 4, torch.tensor(-1))] == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]


def test_native_mask_equals_the_reference(isa: str) -> None:
    from peftkern.ops.philox import dropout_scale

    for m, k, seed in ((3, 1, 5), (40, 257, -7), (5, 1000, 2**62)):
        mask, key = torch.full((m, k), float("nan")), torch.tensor([seed])
        peftkern.backends.native().dropout_mask(m, k, round(0.3 * 65536), key.data_ptr(), mask.data_ptr())
        assert torch.equal(mask, dropout_scale(m, k, 0.3, key))


def test_threads_have_their_own_scratch() -> None:
    w = NF4Weight.from_dense(torch.randn(64, 128))
    xs = [torch.randn(40, 128) for _ in range(4)]
    expected, got = [functional.linear_4bit(x, w) for x in xs], [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            got[i] = functional.linear_4bit(xs[i], w)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(5, 20)}, ValueError, "transposed"),
        ({"x": torch.randn(5, 63)}, ValueError, "x: got shape"),
        ({"x": torch.randn(5, 64).double()}, TypeError, "x: got torch.float64"),
        ({"x": torch.randn(5, 64, device="meta")}, ValueError, "x: is on meta"),
        ({"bias": torch.randn(21)}, ValueError, "bias"),
        ({"lora_a": None}, ValueError, "lora_a: is missing"),
        ({"lora_b": None}, ValueError, "lora_b: is missing"),
        ({"lora_a": torch.randn(3, 63)}, ValueError, "lora_a: got shape"),
        ({"lora_b": torch.randn(20, 4)}, ValueError, "lora_b: got shape"),
        ({"lora_a": torch.randn(300, 64), "lora_b": torch.randn(20, 300)}, ValueError, "r from 1 to 256"),
        ({"lora_b": torch.randn(20, 3).bfloat16()}, ValueError, "one dtype"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1.0])}, ValueError, "seed"),
        ({"weight": torch.randn(20, 64, requires_grad=True)}, ValueError, "frozen"),
        ({"weight": torch.zeros(20, 64, dtype=torch.int8)}, TypeError, "weight"),
        ({"weight": torch.randn(64)}, ValueError, "weight"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_are_checked(change: dict, error: type, message: str) -> None:
    good = dict(
        x=torch.randn(5, 64),
        weight=NF4Weight.from_dense(torch.randn(20, 64)),
        lora_a=torch.randn(3, 64),
        lora_b=torch.randn(20, 3),
    )
    with pytest.raises(error, match=message):
        functional.qlora_linear(**(good | change))


def test_choice_is_data() -> None:
    assert config.choose(dtype="bfloat16", isa="avx512", m=2048, n=4096, k=4096).regime == "vendor"
    assert config.choose(dtype="float32", isa="avx2", m=2048, n=4096, k=4096, dense=True).regime == "vendor"
    assert config.choose(dtype="bfloat16", isa="avx2", m=2048, n=4096, k=4096, dense=True).regime == "gemm"
    for isa in ("avx512bf16", "amx"):
        large = dict(dtype="bfloat16", isa=isa, m=2048, n=4096)
        assert config.choose(k=4096, **large).regime == "gemm"
        # What tiles do not take: rows of half blocks, small blocks, DoRA, dense weights.
        for other in (
            dict(k=4096 + 32),
            dict(k=4096, blocksize=32),
            dict(k=4096, tiles=False),
            dict(k=4096, dense=True),
        ):
            assert config.choose(**large, **other).regime == "vendor"
    for isa, row in config.TABLE.items():
        assert config.choose(dtype="float32", isa=isa, m=row.gemv_max_m, n=64, k=64).regime == "gemv"
        assert config.choose(dtype="float32", isa=isa, m=row.gemv_max_m + 1, n=64, k=64).regime == "gemm"
    assert config.choose(dtype="float32", isa="never heard of", m=1, n=64, k=64).regime == "gemv"


def test_explain_names_the_kernel() -> None:
    assert "gemv" in peftkern.explain(torch.randn(1, 64), 20, 64)
    with use_backend("reference"):
        assert "reference" in peftkern.explain(torch.randn(1, 64), 20, 64)


def test_import_is_cheap_and_needs_no_extras() -> None:
    import subprocess
    import sys

    code = (
        "import sys, peftkern; print(sorted({'peft', 'transformers', 'bitsandbytes', 'triton'} & "
        "sys.modules.keys()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert out == "[]", out
