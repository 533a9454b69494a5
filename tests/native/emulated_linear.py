"""One linear on a level that is emulated: inputs, a run through the C functions, and what that is compared
with."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from peftkern import NF4Weight

from ..ops.bounds import FACTOR, assert_as_accurate, products_of_many_rows, relative_norm
from .compiled import DTYPES, c_lora, c_weight, i64, pointer

__all__ = ["FORMATS", "LEVELS", "SHAPES", "THREADS", "Case", "check_case", "dropout_mask", "use_level"]

LEVELS = ("baseline", "avx512")
THREADS = 1  # the emulation is slow enough; test_two_threads takes two
FORMATS = [
    {},
    {"nested": False},
    {"quant_type": "fp4"},
    {"blocksize": 32},
    {"blocksize": 4096},
    {"blocksize": 128, "nested": False},
]


def use_level(lib: ctypes.CDLL, name: str) -> None:
    assert lib.pk_set_isa(name.encode()) == 0 and lib.pk_isa() == name.encode()


def dropout_mask(lib: ctypes.CDLL, level: str, m: int, k: int, threshold: int, seed: int) -> Tensor:
    use_level(lib, level)
    mask = torch.empty(m, k)
    assert (
        lib.pk_dropout_mask_cpu(i64(m), i64(k), threshold, ctypes.c_uint64(seed), pointer(mask), THREADS) == 0
    )
    return mask


class Case:
    """One linear with every input; `dropout` is a threshold out of 65536."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype,
        *,
        dropout: int = 0,
        bias: bool = True,
        dense: bool = False,
        **quant,
    ) -> None:
        w = torch.randn(n, k) * 0.05
        self.m, self.n, self.k, self.r, self.dtype, self.dropout, self.seed = (
            m,
            n,
            k,
            r,
            dtype,
            dropout,
            2**33 + 5,
        )
        self.weight = w.to(dtype) if dense else NF4Weight.from_dense(w, **quant)
        self.x, self.dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        self.a, self.b = (torch.randn(r, k) / k**0.5).to(dtype), (torch.randn(n, r) * 0.1).to(dtype)
        self.bias = torch.randn(n).to(dtype) if bias else None
        self.scaling, self.threads = 0.75, THREADS

    def scratch(self, lib: ctypes.CDLL) -> tuple[Tensor, ctypes.c_int64]:
        """Exactly what the library asks for, poisoned, with a guard behind it."""
        size = lib.pk_qlora_linear_scratch_bytes(
            i64(self.m), i64(self.n), i64(self.k), i64(self.r), self.threads
        )
        buffer = torch.full((size // 4 + 16,), float("nan"))
        buffer[size // 4 :] = -777.0
        return buffer, ctypes.c_int64(size)

    def run(self, lib: ctypes.CDLL, level: str, *, gemv: bool) -> dict[str, Tensor]:
        use_level(lib, level)
        lora = c_lora(self.a, self.b, self.scaling, self.dropout, self.seed)
        weight, number = c_weight(self.weight), DTYPES[self.dtype]
        y, dx = (
            torch.full((self.m, self.n), float("nan"), dtype=self.dtype),
            torch.full((self.m, self.k), float("nan"), dtype=self.dtype),
        )
        xa, dyb = torch.full((self.m, self.r), float("nan")), torch.full((self.m, self.r), float("nan"))
        d_a, d_b, d_bias = (
            torch.full_like(self.a, float("nan")),
            torch.full_like(self.b, float("nan")),
            torch.full((self.n,), float("nan")),
        )
        scratch, size = self.scratch(lib)
        refs = (ctypes.byref(weight), ctypes.byref(lora))
        args = (
            pointer(self.x),
            number,
            i64(self.m),
            pointer(self.bias),
            number,
            pointer(y),
            pointer(xa),
            int(gemv),
            pointer(scratch),
            size,
            self.threads,
        )
        assert lib.pk_qlora_linear_fwd_cpu(*refs, *args) == 0
        grads = map(pointer, (xa, dyb, dx, d_a, d_b, d_bias, scratch))
        assert (
            lib.pk_qlora_linear_bwd_cpu(
                *refs, pointer(self.dy), pointer(self.x), number, i64(self.m), *grads, size, self.threads
            )
            == 0
        )
        assert (scratch[size.value // 4 :] == -777.0).all(), "wrote past its scratch"
        return {"y": y, "xa": xa, "dyb": dyb, "dx": dx, "d_lora_a": d_a, "d_lora_b": d_b, "d_bias": d_bias}

    @products_of_many_rows
    def plain(self, lib: ctypes.CDLL, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition in plain PyTorch: `dtype` fp64 is exact, any other is the yardstick."""
        w = (self.weight if isinstance(self.weight, Tensor) else self.weight.dequantize(torch.float32)).to(
            dtype
        )
        x, dy, a, b = (t.to(dtype) for t in (self.x, self.dy, self.a, self.b))
        keep = (
            dropout_mask(lib, "baseline", self.m, self.k, self.dropout, self.seed).to(dtype)
            if self.dropout
            else torch.ones(())
        )
        keep = keep.to(dtype)
        xa, dyb = (x * keep) @ a.t(), self.scaling * (dy @ b)
        y = x @ w.t() + self.scaling * (xa @ b.t()) + (0 if self.bias is None else self.bias.to(dtype))
        dx = dy @ w + keep * (dyb @ a)
        grads = {
            "d_lora_a": dyb.t() @ (x * keep),
            "d_lora_b": self.scaling * (dy.t() @ xa),
            "d_bias": dy.sum(0),
        }
        return {"y": y, "xa": xa, "dyb": dyb, "dx": dx, **grads}


def check_case(lib: ctypes.CDLL, *shape_and_dtype, gemv: bool, level: str = "avx512", **options) -> None:
    """Within the contract's bound of plain PyTorch's error, over enough draws that no handful of errors is
    judged. (The baseline level passes the same in tests/ops.)"""
    m, r = shape_and_dtype[0], shape_and_dtype[3]
    draws = max(1, min(256, -(-1024 // (m * r))))
    cases = [Case(*shape_and_dtype, **options) for _ in range(draws)]
    exact = [case.plain(lib, torch.float64) for case in cases]
    plain = [case.plain(lib, case.dtype) for case in cases]
    fp32 = [case.plain(lib, torch.float32) for case in cases]
    ours = [case.run(lib, level, gemv=gemv) for case in cases]
    for name in exact[0]:
        yardstick = plain if ours[0][name].dtype != torch.float32 else fp32
        got, plainly, exactly = (
            torch.cat([run[name].flatten() for run in runs]) for runs in (ours, yardstick, exact)
        )
        # By the norm: xa and dyb, on their way into the gradients; and adapter gradients over few rows,
        # nearly products of two Gaussian
        # draws, whose worst error says little. All else by element too.
        if name in ("xa", "dyb") or (name.startswith("d_lora") and m < 16):
            assert relative_norm(got, exactly) <= FACTOR * relative_norm(plainly, exactly), name
        elif name != "d_bias" or m < 100:  # over many rows: test_bias_gradient_of_many_rows
            assert_as_accurate(name, got, plainly, exactly)


SHAPES = [
    (1, 64, 64, 1),
    (5, 33, 100, 3),
    (7, 70, 192, 8),
    (9, 50, 257, 5),
    (33, 97, 130, 16),
    (64, 60, 320, 64),
    (70, 200, 576, 16),
    (20, 45, 40, 256),
]
