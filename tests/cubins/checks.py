"""What a variant's machine code must be, given what its Specialization promises."""

from __future__ import annotations

from peftkern.runtime.specialization import Specialization
from peftkern.runtime.targets import nearest, occupancy

from .worker import Facts

__all__ = ["broken_promises", "unfit"]


def unfit(facts: Facts) -> list[str]:
    """What keeps a kernel from running on its architecture, or from running out of registers alone."""
    limits = nearest(facts.arch)
    found: list[str] = []
    if facts.shared > limits.shared_per_block:
        found.append(
            f"{facts.shared} bytes of shared memory, and sm_{facts.arch} gives a block "
            f"{limits.shared_per_block}"
        )
    elif not occupancy(limits, registers=facts.registers, shared=facts.shared, warps=facts.warps).blocks:
        found.append(
            f"a block of {facts.warps} warps with {facts.registers} registers a thread does not fit an "
            f"SM of sm_{facts.arch}"
        )
    if facts.stack or facts.local_loads or facts.local_stores:
        found.append(
            f"{facts.stack} bytes of local memory a thread (spills): {facts.local_loads} loads, "
            f"{facts.local_stores} stores"
        )
    return found


def broken_promises(spec: Specialization, facts: Facts) -> list[str]:
    """A sentence for each."""
    found = unfit(facts)
    if spec.expects_mma and not facts.mma:
        found.append("no tensor-core instruction")
    for pointer in spec.wide_loads:
        if narrow := {line: count for line, count in facts.narrow.items() if pointer in line}:
            found.append(f"loads of {pointer} below 16 bytes: {narrow}")
    if facts.fused:
        found.append(f"multiplications fused with additions: {dict(facts.fused)}")
    return found
