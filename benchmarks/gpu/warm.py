"""The part that fills Triton's cache: every variant that our launchers use on this card, compiled by several
processes before anything is timed."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any

import torch

import peftkern.ops
from peftkern.runtime import backends
from peftkern.runtime.specialization import Specialization

from .run import Case, Run

__all__ = ["arguments", "compile_variant", "variants", "warm"]

OPS = Path(peftkern.ops.__file__).parent
PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 2))
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}


class Pointer:
    """Stands for a tensor in a launch that only compiles: a dtype, and whether it is aligned to 16 bytes."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype, self._address = dtype, 0 if aligned else 8

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


def variants(arch: int) -> list[tuple[str, str]]:
    """(module, name) of every variant, each kernel's main one first."""
    found: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for path in sorted(OPS.rglob("triton*.py")):
        name = ".".join(("peftkern.ops", *path.relative_to(OPS).with_suffix("").parts))
        seen: set[object] = set()
        for spec in _specializations(name, arch):
            (others if spec.kernel in seen else found).append((name, spec.name))
            seen.add(spec.kernel)
    return found + others


def _specializations(module: str, arch: int) -> Iterator[Specialization]:
    yield from getattr(importlib.import_module(module), "specializations", lambda _: ())(arch)


def _argument(path: tuple[Any, ...], kind: Any, divisible: Collection[Any]) -> Any:
    """Something that Triton takes for an argument of this type; None and 1 in a tuple are constants."""
    if isinstance(kind, tuple):
        parts = [_argument((*path, i), part, divisible) for i, part in enumerate(kind)]
        return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
    if not isinstance(kind, str):
        return kind
    of_16 = (path if len(path) > 1 else path[0]) in divisible
    if kind.startswith("*"):
        return Pointer(DTYPES[kind[1:]], of_16)
    if kind == "fp32":
        return 0.5
    return (16 if of_16 else 17) + (1 << 40 if kind == "i64" else 0)


def arguments(spec: Specialization) -> dict[str, Any]:
    """Arguments of a launch that Triton compiles to this variant."""
    found: dict[str, Any] = dict(spec.constexprs)
    divisible = frozenset(spec.divisible_by_16)
    return found | {name: _argument((name,), kind, divisible) for name, kind in spec.signature.items()}


def compile_variant(module: str, name: str, arch: int) -> None:
    """Into Triton's cache, under the key by which a launch looks for it."""
    spec = next(spec for spec in _specializations(module, arch) if spec.name == name)
    stages = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    spec.kernel.run(**arguments(spec), **stages, **spec.options, grid=(1,), warmup=True)


def warm(run: Run) -> None:
    """A row: how many variants are compiled, and how many were there before the time was over."""
    case = Case("warm", "Triton's cache", timed="")
    if not run.cuda:
        run.add(case, "variants", note="skipped: Triton compiles for a CUDA device alone")
        return
    arch, start = backends.gpu_arch(), time.monotonic()
    jobs = variants(arch)
    failed: list[str] = []
    done = 0
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(PROCESSES, mp_context=context)
    futures = {pool.submit(compile_variant, *job, arch): job for job in jobs}
    try:
        for future in as_completed(futures, timeout=max(1.0, run.left_s())):
            done += 1
            if error := future.exception():
                failed.append(f"{futures[future][1]}: {error}"[:80])
    except Late:
        print(f"warm: {len(jobs) - done} variants are left to the launches", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    count, seconds = float(done - len(failed)), time.monotonic() - start
    note = f"of {len(jobs)}" + (f"; error: {len(failed)} failed: {'; '.join(failed)}"[:300] if failed else "")
    run.add(case, "variants", p20=count, p50=count, p80=count, unit="variants", note=note)
    run.add(case, "seconds", p20=seconds, p50=seconds, p80=seconds, unit="s")
