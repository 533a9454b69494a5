"""The C functions for groups of linears: what they refuse, that a group of one is the single linear, that
outputs are written whole."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import NF4Weight
from peftkern.runtime import backends

from ..ops.bounds import assert_as_accurate
from .compiled import CSRC, CLora, CWeight, c_lora, c_weight, i64, load, pointer

OK, NULL, SHAPE, DTYPE, BLOCKSIZE, SCRATCH = range(6)
M, K, R = 37, 192, 4
WIDTHS = (96, 33)
BYTES = 4 << 20


class CMember(ctypes.Structure):
    """pk_member."""

    _fields_ = [
        ("weight", CWeight),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
        ("y", ctypes.c_void_p),
    ]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in ("dy", "d_bias", "scale", "u", "norm", "squares", "magnitude", "d_scale")
    ]


class CAdapter(ctypes.Structure):
    """pk_adapter."""

    _fields_ = [("lora", CLora)] + [(name, ctypes.c_int64) for name in ("member", "row_begin", "row_end")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("xa", "dyb", "d_lora_a", "d_lora_b")]


@pytest.fixture
def lib(isa: str) -> ctypes.CDLL:
    lib = load(Path(backends.native().__file__))
    lib.pk_qlora_group_scratch_bytes.restype = ctypes.c_int64
    return lib


class Call:
    """Two members, an adapter each; a test replaces one argument. Outputs begin as NaN."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.weights = [NF4Weight.from_dense(torch.randn(n, K)) for n in WIDTHS]
        self.x, self.scratch = torch.randn(M, K), torch.empty(BYTES, dtype=torch.uint8)
        nan = lambda *shape: torch.full(shape, torch.nan)  # noqa: E731
        self.bias, self.y, self.dy = (
            torch.randn(WIDTHS[0]),
            [nan(M, n) for n in WIDTHS],
            [torch.randn(M, n) for n in WIDTHS],
        )
        self.d_bias, self.dx = [nan(n) for n in WIDTHS], nan(M, K)
        self.a, self.b = [torch.randn(R, K) for _ in WIDTHS], [torch.randn(n, R) for n in WIDTHS]
        self.xa, self.dyb = [nan(M, R) for _ in WIDTHS], [nan(M, R) for _ in WIDTHS]
        self.d_a, self.d_b = [nan(R, K) for _ in WIDTHS], [nan(n, R) for n in WIDTHS]

    def members(self, i: int = 0, count: int = 2, **changes: object) -> ctypes.Array:
        made = []
        for j, weight in enumerate(self.weights[:count]):
            member = CMember(
                c_weight(weight),
                pointer(self.bias if j == 0 else None).value,
                0,
                self.y[j].data_ptr(),
                self.dy[j].data_ptr(),
            )
            member.d_bias = self.d_bias[j].data_ptr()
            for name, value in changes.items() if j == i else ():
                target, _, field = name.rpartition("__")
                setattr(getattr(member, target) if target else member, field, value)
            made.append(member)
        return (CMember * count)(*made)

    def adapters(self, count: int = 2, **changes: object) -> ctypes.Array:
        made = []
        for j in range(count):
            parts = (t[j].data_ptr() for t in (self.xa, self.dyb, self.d_a, self.d_b))
            adapter = CAdapter(c_lora(self.a[j], self.b[j], 0.5), j, 0, M, *parts)
            for name, value in changes.items() if j == 0 else ():
                target, _, field = name.rpartition("__")
                setattr(getattr(adapter, target) if target else adapter, field, value)
            made.append(adapter)
        return (CAdapter * count)(*made)

    def forward(
        self,
        members=None,
        adapters=None,
        *,
        x: Tensor | None = None,
        dtype: int = 0,
        m: int = M,
        size: int = BYTES,
    ) -> int:
        members, adapters = (
            self.members() if members is None else members,
            self.adapters() if adapters is None else adapters,
        )
        head = (
            members,
            i64(len(members)),
            adapters,
            i64(len(adapters)),
            pointer(self.x if x is None else x),
            dtype,
            i64(m),
        )
        return self.lib.pk_qlora_group_fwd_cpu(*head, pointer(self.scratch), i64(size), 2)

    def backward(self, members=None, adapters=None, *, dtype: int = 0, m: int = M, size: int = BYTES) -> int:
        members, adapters = (
            self.members() if members is None else members,
            self.adapters() if adapters is None else adapters,
        )
        head = (
            members,
            i64(len(members)),
            adapters,
            i64(len(adapters)),
            pointer(self.x),
            dtype,
            i64(m),
            pointer(self.dx),
        )
        return self.lib.pk_qlora_group_bwd_cpu(*head, pointer(self.scratch), i64(size), 2)


@pytest.fixture
def call(lib: ctypes.CDLL) -> Call:
    return Call(lib)


def test_structs_match_the_header(tmp_path: Path) -> None:
    source = tmp_path / "sizes.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{CSRC / "include" / "peftkern.h"}"\n'
        'int main(void) { printf("%zu %zu\\n", sizeof(pk_member), sizeof(pk_adapter)); return 0; }\n'
    )
    subprocess.run(
        [os.environ.get("CC", "cc"), str(source), "-o", str(tmp_path / "sizes")], check=True, timeout=60
    )
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    assert list(map(int, printed)) == [ctypes.sizeof(CMember), ctypes.sizeof(CAdapter)]


def test_every_output_is_written_whole(call: Call) -> None:
    assert call.forward() == OK and call.backward() == OK
    for outputs in (call.y, call.xa, call.d_bias, call.d_a, call.d_b, [call.dx]):
        assert all(torch.isfinite(t).all() for t in outputs)
    assert (
        call.lib.pk_qlora_group_scratch_bytes(call.members(), i64(2), call.adapters(), i64(2), i64(M), 2)
        <= BYTES
    )


def test_a_group_of_one_is_the_single_linear(call: Call) -> None:
    """Forward and backward, bit for bit."""
    members, adapters = call.members(count=1), call.adapters(count=1)
    assert call.forward(members, adapters) == OK and call.backward(members, adapters) == OK
    lib, w, low = call.lib, c_weight(call.weights[0]), c_lora(call.a[0], call.b[0], 0.5)
    y, xa, dyb, dx = torch.empty(M, WIDTHS[0]), torch.empty(M, R), torch.empty(M, R), torch.empty(M, K)
    d_a, d_b, d_bias = torch.empty(R, K), torch.empty(WIDTHS[0], R), torch.empty(WIDTHS[0])
    end = (pointer(call.scratch), i64(BYTES), 2)
    forward = (pointer(call.x), 0, i64(M), pointer(call.bias), 0, pointer(y), pointer(xa), 0, *end)
    assert lib.pk_qlora_linear_fwd_cpu(ctypes.byref(w), ctypes.byref(low), *forward) == OK
    backward = map(pointer, (xa, dyb, dx, d_a, d_b, d_bias))
    head = (pointer(call.dy[0]), pointer(call.x), 0, i64(M))
    assert lib.pk_qlora_linear_bwd_cpu(ctypes.byref(w), ctypes.byref(low), *head, *backward, *end) == OK
    for ours, single in (
        (call.y[0], y),
        (call.xa[0], xa),
        (call.dx, dx),
        (call.d_a[0], d_a),
        (call.d_b[0], d_b),
        (call.d_bias[0], d_bias),
    ):
        assert torch.equal(ours, single)


def test_without_base_products_results_are_added_to(call: Call) -> None:
    members = call.members(0, weight__data=None)
    assert call.forward(members) == SHAPE, "a base product in all members or in none"
    for i, member in enumerate(members):
        member.weight = CWeight(n=WIDTHS[i], k=K)
        call.y[i].fill_(1.0)
    call.dx.fill_(2.0)
    assert call.forward(members) == OK and call.backward(members) == OK
    plain, exact = (_branches_alone(call, dtype) for dtype in (torch.float32, torch.float64))
    for name, ours, one, other in zip(("y0", "y1", "dx"), (*call.y, call.dx), plain, exact, strict=True):
        assert_as_accurate(name, ours, one, other)


def _branches_alone(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """y_0, y_1 and dx by plain PyTorch, added to ones and to twos."""
    x, bias, *rest = (t.to(dtype) for t in (call.x, call.bias, *call.a, *call.b, *call.dy))
    a, b, dy = rest[:2], rest[2:4], rest[4:]
    y = [1.0 + 0.5 * (x @ a[i].t() @ b[i].t()) for i in range(2)]
    return [y[0] + bias, y[1], 2.0 + sum(0.5 * dy[i] @ b[i] @ a[i] for i in range(2))]


def test_a_scaled_member(call: Call) -> None:
    """y = scale * u + bias and u beside it; dx, dA and dB of that; the other member is as ever."""
    scale, u = torch.rand(WIDTHS[0]) + 0.5, torch.full((M, WIDTHS[0]), torch.nan)
    assert call.forward() == OK and call.backward() == OK
    other = [t.clone() for t in (call.y[1], call.d_a[1], call.d_b[1], call.d_bias[1])]
    members = call.members(0, scale=scale.data_ptr(), u=u.data_ptr())
    assert call.forward(members) == OK and call.backward(members) == OK
    assert all(
        torch.equal(t, old)
        for t, old in zip((call.y[1], call.d_a[1], call.d_b[1], call.d_bias[1]), other, strict=True)
    )
    plain, exact = (_scaled(call, scale, dtype) for dtype in (torch.float32, torch.float64))
    for (name, one), ours in zip(
        plain.items(), (u, call.y[0], call.dx, call.d_a[0], call.d_b[0], call.d_bias[0]), strict=True
    ):
        assert_as_accurate(name, ours, one, exact[name])
    y = call.y[0].clone()
    assert call.forward(call.members(0, scale=scale.data_ptr())) == OK and torch.equal(call.y[0], y), (
        "u is not asked for"
    )
    members = call.members(0, scale=scale.data_ptr())
    for i, member in enumerate(members):
        member.weight = CWeight(n=WIDTHS[i], k=K)
    assert call.forward(members) == NULL, "a scale goes with a base product"


def test_a_member_whose_norm_is_made_on_the_way(call: Call) -> None:
    """The same bits as with its scale given; d_scale beside dB."""
    n = WIDTHS[0]
    w = [weight.dequantize(torch.float32).double() for weight in call.weights]
    squares, magnitude = w[0].square().sum(1).float(), torch.rand(n) + 0.5
    norm, scale, d_scale, u = (torch.full(shape, torch.nan) for shape in ((n,), (n,), (n,), (M, n)))
    of_dora = dict(scale=scale.data_ptr(), u=u.data_ptr())
    wanted = dict(norm=norm.data_ptr(), squares=squares.data_ptr(), magnitude=magnitude.data_ptr())
    assert call.forward(call.members(0, **of_dora, **wanted)) == OK
    exact = (w[0] + 0.5 * call.b[0].double() @ call.a[0].double()).norm(dim=1)
    assert ((norm - exact) / exact).norm() / n**0.5 < 2 * torch.finfo(torch.float32).eps and torch.equal(
        scale, magnitude / norm
    )
    y, seen = call.y[0].clone(), u.clone()
    assert (
        call.forward(call.members(0, **of_dora)) == OK and torch.equal(call.y[0], y) and torch.equal(u, seen)
    )
    assert call.backward() == OK
    d_bias = call.d_bias[0].clone()
    assert call.backward(call.members(0, **of_dora, d_scale=d_scale.data_ptr())) == OK and torch.equal(
        call.d_bias[0], d_bias
    )
    assert_as_accurate("d_scale", d_scale, (call.dy[0] * u).sum(0), (call.dy[0].double() * u.double()).sum(0))


def test_what_a_norm_needs(call: Call) -> None:
    values = torch.ones(WIDTHS[0])
    names = ("scale", "norm", "squares", "magnitude")
    every = dict.fromkeys(names, values.data_ptr())
    for name in ("scale", "squares", "magnitude"):
        assert call.forward(call.members(0, **{**every, name: None})) == NULL
    members = call.members(0, **every)
    assert call.forward(members) == OK
    assert call.forward(members, call.adapters(member=1)) == SHAPE, "no adapter to take the norm of"
    second = call.adapters()
    second[1].member = 0
    assert call.forward(call.members(0, **every, weight__n=WIDTHS[1]), second) == SHAPE, (
        "the norm is that of one"
    )
    assert call.forward(members, call.adapters(lora__r=0)) == SHAPE
    assert call.backward(call.members(0, scale=values.data_ptr(), d_scale=values.data_ptr())) == NULL, (
        "d_scale is made of u"
    )


def _scaled(call: Call, scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    x, bias, scale, *rest = (t.to(dtype) for t in (call.x, call.bias, scale, *call.a, *call.b, *call.dy))
    a, b, dy = rest[:2], rest[2:4], rest[4:]
    w = [weight.dequantize(torch.float32).to(dtype) for weight in call.weights]
    u, du = x @ w[0].t() + 0.5 * (x @ a[0].t() @ b[0].t()), [dy[0] * scale, dy[1]]
    dyb = [0.5 * du[i] @ b[i] for i in range(2)]
    dx = sum(du[i] @ w[i] + dyb[i] @ a[i] for i in range(2))
    d_b = 0.5 * du[0].t() @ (x @ a[0].t())
    return {
        "u": u,
        "y": u * scale + bias,
        "dx": dx,
        "d_a": dyb[0].t() @ x,
        "d_b": d_b,
        "d_bias": dy[0].sum(0),
    }


def test_the_norm_of_dora_refuses(lib: ctypes.CDLL) -> None:
    cross, gram, b, out = torch.ones(R, 5), torch.eye(R), torch.ones(5, R), torch.full((2, 5), torch.nan)
    ones = torch.ones(5)

    def call(n: int = 5, r: int = R, dtype: int = 0, squares: Tensor | None = ones) -> int:
        head = (pointer(cross), pointer(gram), pointer(b), dtype, i64(n), i64(r), ctypes.c_float(0.5))
        return lib.pk_dora_norm_cpu(
            *head, pointer(squares), pointer(ones), pointer(out[0]), pointer(out[1]), 1
        )

    assert [call(n=-1), call(r=0), call(r=257)] == [SHAPE] * 3
    assert call(dtype=3) == DTYPE and call(squares=None) == NULL and call(n=0) == OK
    assert not torch.isfinite(out).any() and call() == OK
    assert torch.equal(out[0], torch.full((5,), (1 + R + 0.25 * R) ** 0.5)) and torch.equal(
        out[1], 1 / out[0]
    )


def test_squares_of_rows_by_the_c_abi(lib: ctypes.CDLL) -> None:
    """Any number of threads, the same bits; what cannot be is refused before a kernel sees it."""
    weight, out = NF4Weight.from_dense(torch.randn(37, 1000)), torch.full((3, 37), torch.nan)
    w = c_weight(weight)
    assert (
        lib.pk_row_squares_cpu(ctypes.byref(w), pointer(None), 1) == NULL
        and lib.pk_row_squares_cpu(None, pointer(out), 1) == NULL
    )
    w.k = 0
    assert lib.pk_row_squares_cpu(ctypes.byref(w), pointer(out), 1) == SHAPE
    w.k, w.n = 1000, 0
    assert lib.pk_row_squares_cpu(ctypes.byref(w), pointer(None), 1) == OK and torch.isnan(out).all()
    w.n = 37
    for row, threads in zip(out, (1, 2, 5), strict=True):
        assert lib.pk_row_squares_cpu(ctypes.byref(w), pointer(row), threads) == OK
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    torch.testing.assert_close(
        out[0].double(), weight.dequantize(torch.float32).double().square().sum(1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("entry", ["forward", "backward"])
def test_bad_members_are_refused(call: Call, entry: str) -> None:
    use = getattr(call, entry)
    assert use(call.members(0, **{"y" if entry == "forward" else "dy": None})) == NULL
    assert use(call.members(1, weight__k=K - 64)) == SHAPE, "members share k"
    assert use(call.members(1, weight__n=-1)) == SHAPE
    assert use(call.members(0, weight__blocksize=48)) == BLOCKSIZE
    assert use(call.members(0, bias_dtype=9)) == DTYPE
    assert use((CMember * 0)()) == SHAPE
    assert use(dtype=9) == DTYPE and use(m=-1) == SHAPE and use(size=64) == SCRATCH


@pytest.mark.parametrize("entry", ["forward", "backward"])
def test_bad_adapters_are_refused(call: Call, entry: str) -> None:
    use = getattr(call, entry)
    assert [use(None, call.adapters(member=i)) for i in (-1, 2)] == [SHAPE] * 2
    assert [
        use(None, call.adapters(**{name: v}))
        for name, v in (("row_begin", -1), ("row_end", M + 1), ("row_begin", M + 1))
    ] == [SHAPE] * 3
    assert [use(None, call.adapters(lora__r=r)) for r in (-1, 257)] == [SHAPE] * 2
    assert use(None, call.adapters(lora__lora_a=None)) == NULL and use(None, call.adapters(xa=None)) == NULL
    if entry == "backward":
        assert use(None, call.adapters(dyb=None)) == NULL


def test_no_rows(call: Call) -> None:
    assert call.forward(None, call.adapters(row_begin=5, row_end=5)) == OK
    empty = call.adapters()
    for adapter in empty:
        adapter.row_end = 0
    assert call.forward(None, empty, m=0) == OK and call.backward(None, empty, m=0) == SHAPE
