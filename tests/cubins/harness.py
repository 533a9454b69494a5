"""Every variant of every Triton kernel, compiled for every architecture without a GPU, in processes of their
own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

import peftkern.ops
from peftkern.runtime.specialization import Specialization

from . import worker
from .worker import Facts, Job

__all__ = ["ARCHS", "Compiler", "jobs", "module_names", "modules", "specialization", "specializations"]

ARCHS = (75, 80, 86, 89, 90, 100, 120)
OPS = Path(peftkern.ops.__file__).parent


def module_names() -> list[str]:
    """The ops' modules `triton*.py`; those with a launcher have `specializations`."""
    return [
        ".".join(("peftkern.ops", *path.relative_to(OPS).with_suffix("").parts))
        for path in sorted(OPS.rglob("triton*.py"))
    ]


def modules() -> list[ModuleType]:
    """Those that can be imported: a broken one fails a test of its own and hides no other."""
    found: list[ModuleType] = []
    for name in module_names():
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name))
    return found


def specializations(module: ModuleType, arch: int) -> list[Specialization]:
    """None of a module that only defines device functions."""
    return list(module.specializations(arch)) if hasattr(module, "specializations") else []


def jobs(of: Iterable[ModuleType], archs: Sequence[int] = ARCHS) -> list[Job]:
    """Every variant on every architecture; the first one of a kernel is its main one."""
    found: list[Job] = []
    for module in of:
        for arch in archs:
            kernels: set[str] = set()
            for spec in specializations(module, arch):
                kernel = spec.kernel.__name__
                found.append(
                    Job(
                        module.__name__,
                        spec.name,
                        kernel,
                        arch,
                        main=kernel not in kernels,
                        product=spec.expects_mma,
                    )
                )
                kernels.add(kernel)
    return found


def specialization(job: Job) -> Specialization:
    """The job's variant, as its module yields it in this process."""
    return next(
        spec
        for spec in importlib.import_module(job.module).specializations(job.arch)
        if spec.name == job.name
    )


class Compiler:
    """Compiles jobs in `processes` workers, each job once; a context manager."""

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._pool = self._new_pool(processes)
        self._futures: dict[Job, Future[Facts]] = {}

    @staticmethod
    def _new_pool(processes: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, mp_context=context, initializer=worker.start)

    def submit(self, wanted: Iterable[Job]) -> None:
        """Starts on these in the background."""
        for job in wanted:
            if job not in self._futures:
                self._futures[job] = self._pool.submit(worker.compile_job, job)

    def facts(self, job: Job) -> Facts:
        """Waits for it. A compiler that crashes takes its process along: the job is then tried once more,
        alone."""
        try:
            self.submit([job])
            return self._futures[job].result()
        except BrokenProcessPool:
            with self._new_pool(1) as alone:
                return alone.submit(worker.compile_job, job).result()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
