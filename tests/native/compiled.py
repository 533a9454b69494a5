"""Compiling csrc/ by hand, as a project that vendors it would, and calling the result through ctypes: no
Python extension involved."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch requires it
from torch import Tensor

from peftkern import NF4Weight

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CXX = os.environ.get("CXX", "").split() or [
    next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "c++")
]
COMMON = ["-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CWeight(ctypes.Structure):
    """pk_weight."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("data", "code", "absmax", "absmax_8bit", "absmax_code", "nested_absmax", "absmax_offset")
    ]
    _fields_ += [
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("blocksize", ctypes.c_int32),
        ("nested_blocksize", ctypes.c_int32),
    ]
    _fields_ += [("dtype", ctypes.c_int32)]


class CLora(ctypes.Structure):
    """pk_lora."""

    _fields_ = [
        ("lora_a", ctypes.c_void_p),
        ("lora_b", ctypes.c_void_p),
        ("r", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]
    _fields_ += [
        ("scaling", ctypes.c_float),
        ("dropout_threshold", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Its data, NULL for None; the caller holds the tensor."""
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def c_weight(weight: NF4Weight | Tensor) -> CWeight:
    """The descriptor of a 4-bit or dense [n, k] weight; the caller holds the weight."""
    n, k = weight.shape
    if isinstance(weight, Tensor):
        return CWeight(data=weight.data_ptr(), n=n, k=k, dtype=DTYPES[weight.dtype])
    w = weight
    parts = (w.packed, w.code, w.absmax, w.absmax_8bit, w.absmax_code, w.nested_absmax, w.absmax_offset)
    return CWeight(*(pointer(t).value for t in parts), n, k, w.blocksize, w.nested_blocksize, 0)


def c_lora(
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float = 1.0,
    dropout_threshold: int = 0,
    seed: int = 0,
) -> CLora:
    if lora_a is None or lora_b is None:
        return CLora()
    shape = (lora_a.data_ptr(), lora_b.data_ptr(), lora_a.shape[0], DTYPES[lora_a.dtype])
    return CLora(*shape, scaling, dropout_threshold, seed)


def load(path: Path) -> ctypes.CDLL:
    """The shared library with the return types that are not int."""
    lib = ctypes.CDLL(str(path))
    lib.pk_status_string.restype = lib.pk_isa.restype = lib.pk_isa_name.restype = ctypes.c_char_p
    lib.pk_qlora_linear_scratch_bytes.restype = ctypes.c_int64
    return lib


def compile_objects(folder: Path, jobs: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
    """Compile (source, flags) pairs, two at a time; the compiler's words become the failure's message."""
    objects = [folder / f"{source.stem}.o" for source, _ in jobs]
    commands = [
        [*CXX, *COMMON, *flags, "-c", str(source), "-o", str(out)]
        for (source, flags), out in zip(jobs, objects, strict=True)
    ]
    for start in range(0, len(commands), 2):
        running = [
            subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands[start : start + 2]
        ]
        for command, process in zip(commands[start:], running, strict=False):
            _, words = process.communicate(timeout=300)
            assert process.returncode == 0, f"{' '.join(command)}\n{words}"
    return objects


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]) -> Path:
    """What `build` makes in a folder of its own: made once, though modules and workers of pytest-xdist ask
    for it."""
    base = factory.getbasetemp()
    # the workers' folders lie in the session's
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        made = base / f"{name}.path"
        if not made.exists():
            (base / name).mkdir(exist_ok=True)
            made.write_text(str(build(base / name)))
        return Path(made.read_text())


def link_shared(objects: Sequence[Path], out: Path) -> Path:
    subprocess.run(
        [*CXX, "-shared", "-fopenmp", *map(str, objects), "-o", str(out)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return out
