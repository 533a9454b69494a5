"""The C ABI: its header in both languages, its status codes, and what it answers to bad arguments."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkern import NF4Weight
from peftkern.runtime import backends
from peftkern.runtime.native import on_huge_pages

from .compiled import COMMON, CSRC, CXX, CLora, CWeight, c_lora, c_weight, i64, load, pointer

HEADER = CSRC / "include" / "peftkern.h"
OK, NULL, SHAPE, DTYPE, BLOCKSIZE, SCRATCH, ISA = range(7)
M, N, K, R = 5, 48, 128, 4
BYTES = 1 << 22


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    """The built extension's own C functions: a shared library like any other."""
    return load(Path(backends.native().__file__))


@pytest.mark.parametrize("language", ["c11", "c17", "c++17", "c++20"])
def test_header_compiles_without_a_warning(tmp_path: Path, language: str) -> None:
    compiler = CXX if "+" in language else [os.environ.get("CC", "cc")]
    source = tmp_path / ("use.cpp" if "+" in language else "use.c")
    source.write_text(
        f'#include "{HEADER}"\n#include "{HEADER}"\nint main(void) {{ return pk_abi_version() == '
        f"PEFTKERN_ABI_VERSION; }}\n"
    )
    command = [
        *compiler,
        f"-std={language}",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "use.o"),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr


def _declared_statuses() -> dict[str, int]:
    return {
        name: int(value) for name, value in re.findall(r"\b(PK_OK|PK_ERR_\w+) = (\d+)", HEADER.read_text())
    }


def test_every_status_has_a_text_of_its_own(lib: ctypes.CDLL) -> None:
    statuses = _declared_statuses()
    assert sorted(statuses.values()) == list(range(len(statuses))) and len(statuses) >= 7
    texts = [lib.pk_status_string(value).decode() for value in statuses.values()]
    assert len(set(texts)) == len(texts)
    assert all(text and text != "unknown status" for text in texts)
    assert {lib.pk_status_string(value) for value in (-1, len(statuses), 1000)} == {b"unknown status"}


def test_version_and_structs_match_the_header(lib: ctypes.CDLL, tmp_path: Path) -> None:
    """The sizes ctypes lays out here are the compiler's: these tests pass the structs they think they
    pass."""
    source = tmp_path / "sizes.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{HEADER}"\n'
        'int main(void) { printf("%zu %zu %d\\n", sizeof(pk_weight), sizeof(pk_lora), '
        "PEFTKERN_ABI_VERSION); return 0; }\n"
    )
    subprocess.run(
        [os.environ.get("CC", "cc"), str(source), "-o", str(tmp_path / "sizes")], check=True, timeout=60
    )
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split()
    assert list(map(int, printed)) == [ctypes.sizeof(CWeight), ctypes.sizeof(CLora), lib.pk_abi_version()]


class Call:
    """A call with good arguments, of which a test replaces one."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.w4 = NF4Weight.from_dense(torch.randn(N, K))
        self.a, self.b, self.x, self.dy = (
            torch.randn(R, K),
            torch.randn(N, R),
            torch.randn(M, K),
            torch.randn(M, N),
        )
        self.xa, self.dyb, self.out = torch.randn(M, R), torch.empty(M, R), torch.empty(N * K)
        self.scratch = torch.empty(BYTES, dtype=torch.uint8)

    def weight(self, **changes: object) -> CWeight:
        w = c_weight(self.w4)
        for name, value in changes.items():
            setattr(w, name, value)
        return w

    def lora(self, **changes: object) -> CLora:
        lora = c_lora(self.a, self.b)
        for name, value in changes.items():
            setattr(lora, name, value)
        return lora

    def dequantize(
        self, weight: CWeight | None = None, window=(0, N, 0, K), dtype: int = 0, out: bool = True
    ) -> int:
        w = weight or self.weight()
        return self.lib.pk_dequantize_4bit_cpu(
            ctypes.byref(w), *map(i64, window), pointer(self.out if out else None), dtype, 1
        )

    def forward(
        self,
        weight=None,
        lora=None,
        *,
        m: int = M,
        dtype: int = 0,
        gemv: int = 0,
        size: int = BYTES,
        **absent: None,
    ) -> int:
        w, low = weight or self.weight(), lora or self.lora()
        x, y, xa, scratch = (
            pointer(absent.get(n, t))
            for n, t in dict(x=self.x, y=self.out, xa=self.xa, scratch=self.scratch).items()
        )
        args = (x, dtype, i64(m), pointer(None), 0, y, xa, gemv, scratch, i64(size), 1)
        return self.lib.pk_qlora_linear_fwd_cpu(ctypes.byref(w), ctypes.byref(low), *args)

    def backward(
        self, weight=None, lora=None, *, m: int = M, dtype: int = 0, size: int = BYTES, **absent: None
    ) -> int:
        w, low = weight or self.weight(), lora or self.lora()
        named = dict(
            dy=self.dy,
            x=self.x,
            xa=self.xa,
            dyb=self.dyb,
            dx=self.out,
            d_a=self.a.clone(),
            d_b=self.b.clone(),
            scratch=self.scratch,
        )
        dy, x, xa, dyb, dx, d_a, d_b, scratch = (pointer(absent.get(n, t)) for n, t in named.items())
        args = (dy, x, dtype, i64(m), xa, dyb, dx, d_a, d_b, pointer(None), scratch, i64(size), 1)
        return self.lib.pk_qlora_linear_bwd_cpu(ctypes.byref(w), ctypes.byref(low), *args)

    def quantize(self, *, w: bool = True, dtype: int = 0, numel: int = 256, blocksize: int = 64) -> int:
        packed, absmax, code = torch.empty(128, dtype=torch.uint8), torch.empty(8), self.w4.code
        return self.lib.pk_quantize_4bit_cpu(
            pointer(self.out if w else None),
            dtype,
            i64(numel),
            blocksize,
            pointer(code),
            pointer(packed),
            pointer(absmax),
            1,
        )


@pytest.fixture
def call(lib: ctypes.CDLL) -> Call:
    return Call(lib)


def test_good_arguments_are_ok(call: Call) -> None:
    call.out.normal_()
    assert (call.quantize(), call.dequantize(), call.forward(), call.forward(gemv=1), call.backward()) == (
        OK,
    ) * 5
    assert call.lib.pk_qlora_linear_scratch_bytes(i64(M), i64(N), i64(K), i64(R), 1) <= BYTES


def test_quantize_refuses(call: Call) -> None:
    assert call.quantize(w=False) == NULL
    assert (call.quantize(numel=0), call.quantize(numel=-2)) == (SHAPE, SHAPE)
    assert (call.quantize(dtype=3), call.quantize(dtype=-1)) == (DTYPE, DTYPE)
    assert [call.quantize(blocksize=b) for b in (0, 16, 48, 8192, -64)] == [BLOCKSIZE] * 5


@pytest.mark.parametrize("entry", ["dequantize", "forward", "backward"])
def test_a_bad_weight_is_refused_everywhere(call: Call, entry: str) -> None:
    use = getattr(call, entry)
    assert [
        use(call.weight(**{part: None}))
        for part in ("data", "absmax_8bit", "absmax_code", "nested_absmax", "absmax_offset")
    ] == [NULL] * 5
    assert [use(call.weight(k=k)) for k in (0, -1)] == [SHAPE] * 2
    assert use(call.weight(n=-1)) == SHAPE
    assert [use(call.weight(blocksize=b)) for b in (0, 31, 96, 8192)] == [BLOCKSIZE] * 4
    assert [use(call.weight(nested_blocksize=b)) for b in (0, 100, -256)] == [BLOCKSIZE] * 3


def test_dequantize_refuses(call: Call) -> None:
    assert call.dequantize(out=False) == NULL
    assert call.dequantize(call.weight(code=None, dtype=0)) == NULL, "a dense weight has nothing to decode"
    windows = [
        (-1, 2, 0, K),
        (0, N + 1, 0, K),
        (N, 1, 0, K),
        (0, 1, -1, 2),
        (0, 1, 1, K),
        (0, -1, 0, K),
        (0, 1, 0, -1),
    ]
    assert [call.dequantize(window=window) for window in windows] == [SHAPE] * len(windows)
    assert call.dequantize(dtype=7) == DTYPE


def test_forward_refuses(call: Call) -> None:
    assert [call.forward(**{name: None}) for name in ("x", "y", "xa", "scratch")] == [NULL] * 4
    assert call.forward(m=-1) == SHAPE
    assert call.forward(gemv=1, m=65) == SHAPE
    assert call.forward(dtype=3) == DTYPE
    assert call.forward(size=64) == SCRATCH
    assert call.forward(m=0) == OK


def test_backward_refuses(call: Call) -> None:
    assert [call.backward(**{name: None}) for name in ("dy", "x", "xa", "dyb", "scratch")] == [NULL] * 5
    assert call.backward(m=-1) == SHAPE
    assert call.backward(dtype=3) == DTYPE
    assert call.backward(size=64) == SCRATCH


@pytest.mark.parametrize("entry", ["forward", "backward"])
def test_a_bad_adapter_is_refused(call: Call, entry: str) -> None:
    use = getattr(call, entry)
    assert [use(None, call.lora(**{part: None})) for part in ("lora_a", "lora_b")] == [NULL] * 2
    assert [use(None, call.lora(r=r)) for r in (-1, 257)] == [SHAPE] * 2
    assert use(None, call.lora(dropout_threshold=65537)) == SHAPE
    assert use(None, call.lora(dtype=3)) == DTYPE


def test_scratch_one_byte_short_is_refused(call: Call) -> None:
    size = call.lib.pk_qlora_linear_scratch_bytes(i64(M), i64(N), i64(K), i64(R), 1)
    assert (call.forward(size=size - 1), call.backward(size=size - 1)) == (SCRATCH, SCRATCH)
    assert (call.forward(size=size), call.backward(size=size)) == (OK, OK)


def test_advice_on_huge_pages_is_a_hint(lib: ctypes.CDLL) -> None:
    """Any buffer may be named, also one that holds no whole huge page; what it holds stays."""
    small = torch.arange(1000)
    assert lib.pk_advise_huge_pages(pointer(small), i64(small.nbytes)) == OK and torch.equal(
        small, torch.arange(1000)
    )
    assert lib.pk_advise_huge_pages(None, i64(0)) == OK
    assert lib.pk_advise_huge_pages(None, i64(1 << 22)) == NULL
    assert lib.pk_advise_huge_pages(pointer(small), i64(-1)) == SHAPE


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this kernel has no transparent huge pages",
)
def test_a_large_fresh_tensor_is_on_huge_pages() -> None:
    for size, asked in ((64 << 20, True), (1 << 20, False)):
        tensor = on_huge_pages(torch.empty(size, dtype=torch.uint8))
        middle, flags = tensor.data_ptr() + size // 2, []
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                here = int(bounds[1], 16) <= middle < int(bounds[2], 16)
            elif here and line.startswith("VmFlags:"):
                flags += line.split()
        assert ("hg" in flags) == asked, flags


def test_levels(lib: ctypes.CDLL) -> None:
    before = lib.pk_isa()
    names = backends.native().isas()
    assert names[0] == "baseline" and lib.pk_isa_name(len(names)) is None
    assert [lib.pk_set_isa(name) for name in (b"sse9", b"", None)] == [ISA] * 3
    assert lib.pk_isa() == before


def test_how_far_apart_cores_are(lib: ctypes.CDLL) -> None:
    """A round trip between two threads is of ns, or they do not answer; one thread has none to go to. What
    calls take cores for can be said, as one of three."""
    lib.pk_core_distance.restype = ctypes.c_int64
    assert lib.pk_core_distance(1) == 0
    assert all(0 <= lib.pk_core_distance(2) < 10**6 for _ in range(20))
    assert [lib.pk_set_cores(how) for how in (1, 2, 0)] == [OK] * 3
    assert [lib.pk_set_cores(how) for how in (-1, 3)] == [SHAPE] * 2


def _printed(code: str, **variables: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_variable_forces_a_level(lib: ctypes.CDLL) -> None:
    """Chosen once, when the library is loaded; a level the CPU lacks, or no level at all, leaves the best it
    has."""
    path, names = backends.native().__file__, backends.native().isas()
    code = (
        f"import ctypes; lib = ctypes.CDLL({path!r}); lib.pk_isa.restype = ctypes.c_char_p; "
        "print(lib.pk_isa().decode())"
    )
    for name in names:
        assert _printed(code, PEFTKERN_CPU_ISA=name) == name
    assert _printed(code, PEFTKERN_CPU_ISA="sse9") == names[-1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """Two runtimes would each spin their own threads on the same cores."""
    code = (
        "import torch\nfrom peftkern import backends\nbackends.native()\ntorch.ones(300, 300) @ "
        "torch.ones(300, 300)\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or "
        "'libomp' in line or 'libiomp' in line}\n"
        "print(len(names), sorted(names))"
    )
    assert _printed(code).startswith("1 ")


def test_portable_level_compiles_for_aarch64(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip(
            "aarch64-linux-gnu-g++ is not installed (Debian and Ubuntu: apt install g++-aarch64-linux-gnu)"
        )
    for name in ("kernels_baseline", "dispatch"):
        source, out = CSRC / "cpu" / f"{name}.cpp", tmp_path / f"{name}.o"
        built = subprocess.run(
            [compiler, *COMMON, "-O0", "-c", str(source), "-o", str(out)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert built.returncode == 0, built.stderr
