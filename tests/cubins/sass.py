"""What a cubin says of itself: resources by cuobjdump, instructions and the source lines they come from by
nvdisasm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Instruction", "Resources", "count", "disassemble", "mma", "reserved_shared", "resources", "tool"]

# Tensor-core products by generation: mma.sync, its integer form, wgmma of sm_90, tcgen05 of sm_100.
MMA = re.compile(r"(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC[HIQO]MMA)")
_FUNCTION = re.compile(r"^\s*Function (\S+):\s*$")
_SECTION = re.compile(r"^\.text\.(\S+):$")
_LINE = re.compile(r'//## File "(.*)", line (\d+)')
_CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Resources:
    """Of one kernel; `stack`: bytes of local memory a thread, which spilled registers and indexed local
    arrays live in."""

    registers: int
    stack: int
    static_shared: int


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction of `function` and the source line it was compiled from ("" and 0 where the cubin
    does not say)."""

    function: str
    opcode: str
    operands: str
    file: str
    line: int


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: Triton's package carries both, so that no CUDA toolkit is needed; else the
    toolkit's."""
    try:
        import triton
    except ImportError:
        packaged = None
    else:
        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(packaged) if packaged and packaged.exists() else shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on PATH")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def reserved_shared(arch: int) -> int:
    """Bytes of shared memory that the system takes of each block; from sm_90 on cuobjdump counts them as the
    kernel's own."""
    return 1024 if arch >= 80 else 0


def resources(cubin: Path, arch: int) -> dict[str, Resources]:
    """By kernel name."""
    found: dict[str, Resources] = {}
    function = ""
    for line in _run(tool("cuobjdump"), "--dump-resource-usage", str(cubin)).splitlines():
        if match := _FUNCTION.match(line):
            function = match[1]
        elif "REG:" in line:
            fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            shared = fields["SHARED"] - (reserved_shared(arch) if arch >= 90 else 0)
            found[function] = Resources(fields["REG"], fields["STACK"] + fields["LOCAL"], max(shared, 0))
    return found


def disassemble(cubin: Path) -> list[Instruction]:
    """Every instruction of every kernel in the cubin."""
    instructions: list[Instruction] = []
    function, file, number = "", "", 0
    for line in _run(tool("nvdisasm"), "-g", "-c", str(cubin)).splitlines():
        if match := _SECTION.match(line.strip()):
            function, file, number = match[1], "", 0
        elif match := _LINE.search(line):
            file, number = match[1], int(match[2])
        elif match := _CODE.match(line):
            instructions.append(Instruction(function, match[1], match[2], file, number))
    return instructions


def count(instructions: Iterable[Instruction], *prefixes: str) -> int:
    """Instructions whose opcode is one of `prefixes` or a form of it (LDG: LDG, LDG.E.128, ...)."""
    return sum(i.opcode.split(".")[0] in prefixes for i in instructions)


def mma(instructions: Iterable[Instruction]) -> Counter[str]:
    """Tensor-core products by opcode, without operand shapes and types."""
    return Counter(match[1] for i in instructions if (match := MMA.match(i.opcode)))
