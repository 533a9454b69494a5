"""Compiles one kernel variant to a cubin and reads its facts; runs in a process of its own, where Triton's
interpreter is off."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import linecache
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkern.runtime.specialization import mapped

from . import ptx, sass

__all__ = ["LOADS", "Facts", "Job", "compile_job", "start"]

# from global memory to registers, to shared memory, and whole tiles by the TMA unit
LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Job:
    """A variant by name: the kernel itself stays in its module. `main`: the first of its kernel; `product`:
    on tensor cores."""

    module: str
    name: str
    kernel: str
    arch: int
    main: bool
    product: bool

    @property
    def id(self) -> str:
        return f"{self.module.removeprefix('peftkern.ops.')}-{self.name}-sm{self.arch}"


@dataclass(frozen=True)
class Facts:
    """What is asserted of a cubin.

    shared: static and dynamic bytes a block; stack: local memory, where spilled registers go; loads: global
    loads by opcode; wide, narrow: those of the declared pointers of 16 bytes and of less, by source line;
    fused: multiply-adds where none may be.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: int
    mma: Mapping[str, int] = field(default_factory=dict)
    local_loads: int = 0
    local_stores: int = 0
    permutes: int = 0
    fmas: int = 0
    loads: Mapping[str, int] = field(default_factory=dict)
    wide: Mapping[str, int] = field(default_factory=dict)
    narrow: Mapping[str, int] = field(default_factory=dict)
    fused: Mapping[str, int] = field(default_factory=dict)


def start() -> None:
    """Runs first in a worker: pytest's own process has the interpreter on, which would replace every
    kernel."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("TRITON_DISABLE_LINE_INFO", None)
    # Triton's cache knows a kernel by its text, the cubin's line information by its path too: a cache of its
    # own for these paths.
    root = Path(os.path.realpath(__file__)).parents[2]
    paths = [str(root), *sorted(str(path.relative_to(root)) for path in root.glob("peftkern/ops/**/*.py"))]
    key = hashlib.sha1("\n".join(paths).encode()).hexdigest()[:8]
    os.environ["TRITON_CACHE_DIR"] = str(Path.home() / ".triton" / f"peftkern-{key}")


def _path(kernel: Any, name: Any) -> tuple[int, ...]:
    """Of an argument, or of (argument, index, ...) within a tuple."""
    first, *inside = (name,) if isinstance(name, str) else name
    return kernel.arg_names.index(first), *inside


def _attributes(kernel: Any, divisible: Iterable[Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    return {_path(kernel, name): [["tt.divisibility", 16]] for name in divisible}


def _constants(spec: Any) -> dict[Any, Any]:
    """By name, those inside tuples by path."""
    inside = (leaf for name, parts in spec.signature.items() for leaf in _leaves((name,), parts))
    return dict(spec.constexprs) | {
        _path(spec.kernel, path): part for path, part in inside if not isinstance(part, str)
    }


def _leaves(path: tuple[Any, ...], kind: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What stands in a tuple, and in those in it, with its path."""
    if not isinstance(kind, tuple):
        yield path, kind
        return
    for i, part in enumerate(kind):
        yield from _leaves((*path, i), part)


def _signature(spec: Any) -> dict[str, Any]:
    names = spec.kernel.arg_names
    given, constant = set(spec.signature), set(spec.constexprs)
    if given & constant or given | constant != set(names):
        both, missing, unknown = (
            given & constant,
            set(names) - given - constant,
            (given | constant) - set(names),
        )
        raise ValueError(
            f"{spec.name}: in signature and constexprs {sorted(both)}, in neither {sorted(missing)}, "
            f"unknown {sorted(unknown)}"
        )
    if stray := {name if isinstance(name, str) else name[0] for name in spec.divisible_by_16} - given:
        raise ValueError(f"{spec.name}: divisible_by_16 names {sorted(stray)}, which signature does not have")
    found = {name: spec.signature.get(name, "constexpr") for name in names}
    of = lambda kind: mapped(kind, lambda part: part if isinstance(part, str) else "constexpr")  # noqa: E731
    return {name: of(kind) for name, kind in found.items()}


def _compile(spec: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        spec.kernel, _signature(spec), _constants(spec), _attributes(spec.kernel, spec.divisible_by_16)
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, **spec.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _device_functions(kernel: Any) -> dict[str, Any]:
    """The kernel and every device function it calls, directly or not, by name."""
    found: dict[str, Any] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        if function.__name__ not in found:
            found[function.__name__] = function
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            waiting += [value for value in called if isinstance(value, type(kernel))]
    return found


def _lines_of(spec: Any, names: Iterable[str]) -> set[tuple[str, int]]:
    """(file, line) of every line of the device functions `names`."""
    known = _device_functions(spec.kernel)
    if missing := set(names) - set(known):
        raise ValueError(
            f"unfused names {sorted(missing)}, which the kernel does not call; it calls {sorted(known)}"
        )
    found: set[tuple[str, int]] = set()
    for function in map(known.__getitem__, names):
        lines, first = inspect.getsourcelines(function)
        file = os.path.realpath(inspect.getsourcefile(function) or "")
        found.update((file, first + i) for i in range(len(lines)))
    return found


def _statement(file: str, line: int) -> str:
    """The source from this line on to where its brackets are closed, as one line."""
    text, depth = "", 0
    while following := linecache.getline(file, line):
        text = f"{text} {following.strip()}".strip()
        depth += sum(following.count(c) for c in "([{") - sum(following.count(c) for c in ")]}")
        if depth <= 0:
            break
        line += 1
    return text


def _declared_loads(code: str, pointers: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """Loads of statements that load from one of `pointers`: (16 bytes and more, less)."""
    found = [(load.width, _statement(load.file, load.line)) for load in ptx.loads(code)]
    names = tuple(pointers)
    lines = [(width, text) for width, text in found if any(re.search(rf"\b{name}\b", text) for name in names)]
    if names and not lines:
        raise ValueError(
            f"wide_loads names {', '.join(names)}, which no line that loads does: "
            f"{sorted({text for _, text in found})}"
        )
    wide, narrow = (
        Counter(f"{width} bytes: {text}" for width, text in lines if (width >= 16) == is_wide)
        for is_wide in (True, False)
    )
    return wide, narrow


def _fused(instructions: Iterable[sass.Instruction], lines: set[tuple[str, int]]) -> Counter[str]:
    """Multiply-adds there. One that adds the zero register is a plain product: the compiler picks it for its
    unit."""
    found: Counter[str] = Counter()
    for i in instructions:
        if i.opcode.split(".")[0] in ("FFMA", "FFMA2") and (os.path.realpath(i.file), i.line) in lines:
            addend = i.operands.rsplit(",", 1)[-1].strip()
            if addend.lstrip("-").removesuffix(".reuse") != "RZ":
                found[f"{i.opcode} {i.operands}: {linecache.getline(i.file, i.line).strip()}"] += 1
    return found


def _facts(spec: Any, arch: int, compiled: Any) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (used,) = sass.resources(cubin, arch).values()
        code = sass.disassemble(cubin)
    wide, narrow = _declared_loads(compiled.asm["ptx"], spec.wide_loads)
    return Facts(
        kernel=spec.kernel.__name__,
        arch=arch,
        warps=spec.num_warps,
        registers=used.registers,
        stack=used.stack,
        shared=used.static_shared + compiled.metadata.shared,
        instructions=len(code),
        mma=dict(sass.mma(code)),
        local_loads=sass.count(code, "LDL"),
        local_stores=sass.count(code, "STL"),
        permutes=sass.count(code, "PRMT"),
        fmas=sass.count(code, "FFMA", "FFMA2"),
        loads=dict(Counter(i.opcode for i in code if i.opcode.split(".")[0] in LOADS)),
        wide=dict(wide),
        narrow=dict(narrow),
        fused=dict(_fused(code, _lines_of(spec, spec.unfused))),
    )


def compile_job(job: Job) -> Facts:
    """The facts of one variant; whatever the compiler raises, as RuntimeError with the variant's name."""
    try:
        specs = {spec.name: spec for spec in importlib.import_module(job.module).specializations(job.arch)}
        return _facts(specs[job.name], job.arch, _compile(specs[job.name], job.arch))
    # its own type may not survive the way between processes, and its causes do not
    except Exception as error:
        words = [f"{job.id}:"]
        cause: BaseException | None = error
        while cause is not None:  # a Triton error in a device function is the cause of one at its call
            words.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__
        raise RuntimeError("\n".join(words)) from None
