"""Global loads in PTX by source line. Triton writes them as inline assembly, whose own lines are counted on:
SASS names wrong ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Load", "loads"]

_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LD = re.compile(r"\bld(?:\.[\w:]+)*?\.global((?:\.[\w:]+)*)")
_ASYNC = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)"
)
_BULK = "cp.async.bulk"
TILE = 1 << 10  # bytes reported of a load by the TMA unit, whose tile PTX does not tell


@dataclass(frozen=True)
class Load:
    """`width`: bytes a thread reads by it."""

    width: int
    file: str
    line: int


def _width(suffixes: str) -> int:
    """.v4.b32 is 16."""
    vector = re.search(r"\.v(\d+)\b", suffixes)
    bits = re.search(r"\.[bsuf](?:\d+x)?(\d+)$", suffixes)
    return (int(vector[1]) if vector else 1) * (int(bits[1]) if bits else 8) // 8


def loads(ptx: str) -> Iterator[Load]:
    """Every load from global memory, to registers or to shared memory; inline assembly's is its first
    line's."""
    files = {number: name for number, name in _FILE.findall(ptx)}
    file, line = "", 0
    assembly, placed = False, False
    for text in ptx.splitlines():
        if "inline asm" in text:
            assembly, placed = "begin" in text, False
        elif match := _LOC.search(text):
            if not placed:
                file, line = files.get(match[1], ""), int(match[2])
            placed = assembly
        elif match := _LD.search(text):
            yield Load(_width(match[1]), file, line)
        elif match := _ASYNC.search(text):
            yield Load(int(match[1], 0), file, line)
        elif _BULK in text and ".shared" in text.split(_BULK, 1)[1].split(".global")[0]:
            yield Load(TILE, file, line)
