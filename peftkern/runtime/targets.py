"""Hardware limits as data: what an architecture allows a block, and what a card's data sheet promises.
Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "CARDS", "Architecture", "Card", "Occupancy", "nearest", "occupancy"]

_KB = 1024
_MB = 1024 * 1024


@dataclass(frozen=True)
class Architecture:
    """Limits of one compute capability, in bytes, registers of 32 bits, warps and blocks.

    shared_per_block: most that a block may opt in to; shared_reserved: what the system takes of each block
    beside it; shared_unit: shared memory is allocated in multiples of it. Registers are allocated by warp in
    multiples of 256, from a quarter of the file each.
    bf16_mma: tensor cores take bf16 (else fp16 only).
    """

    sm: int
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int
    shared_unit: int
    warps_per_sm: int
    blocks_per_sm: int
    bf16_mma: bool = True
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    threads_per_block: int = 1024


# CUDA programming guide, table "Technical Specifications per Compute Capability"; allocation units:
# cuda_occupancy.h of CUDA 13.0.
_ROWS = (
    Architecture(75, 64 * _KB, 64 * _KB, 0, 256, 32, 16, bf16_mma=False),
    Architecture(80, 163 * _KB, 164 * _KB, _KB, 128, 64, 32),
    Architecture(86, 99 * _KB, 100 * _KB, _KB, 128, 48, 16),
    Architecture(89, 99 * _KB, 100 * _KB, _KB, 128, 48, 24),
    Architecture(90, 227 * _KB, 228 * _KB, _KB, 128, 64, 32),
    Architecture(100, 227 * _KB, 228 * _KB, _KB, 128, 64, 32),
    Architecture(120, 99 * _KB, 100 * _KB, _KB, 128, 48, 24),
)
ARCHITECTURES = {row.sm: row for row in _ROWS}


def nearest(sm: int) -> Architecture:
    """Its row; of an architecture without one, the newest that is not newer, else the oldest."""
    older = [row for row in _ROWS if row.sm <= sm]
    return older[-1] if older else _ROWS[0]


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel that an SM holds at once, the share of its warps that is, and what keeps it from
    more."""

    blocks: int
    share: float
    limit: str


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: Architecture, *, registers: int, shared: int, warps: int) -> Occupancy:
    """Of a kernel with `registers` a thread, `shared` bytes (static and dynamic) and `warps` a block; 0
    blocks where it cannot start."""
    by_quarter = arch.registers_per_sm // 4 // _round_up(32 * max(registers, 1), 256)
    per_block = _round_up(shared + arch.shared_reserved, arch.shared_unit)
    limits = {
        "warps": arch.warps_per_sm // warps,
        "blocks": arch.blocks_per_sm,
        "registers": 4 * by_quarter // warps if registers <= arch.registers_per_thread else 0,
        "shared memory": (arch.shared_per_sm // per_block if per_block else arch.blocks_per_sm)
        if shared <= arch.shared_per_block
        else 0,
    }
    blocks = min(limits.values()) if 32 * warps <= arch.threads_per_block else 0
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(blocks, blocks * warps / arch.warps_per_sm, limit)


@dataclass(frozen=True)
class Card:
    """One card's data-sheet figures.

    dram: bytes/s. half: dense tensor-core FLOP/s of bf16 (fp16 where there is no bf16) with fp32
    accumulation; tf32: of TF32, 0 for none.
    fp32: FLOP/s of the CUDA cores, a multiply-add being two. l2, memory: bytes.
    """

    name: str
    sm: int
    sms: int
    memory: int
    dram: float
    l2: int
    half: float
    tf32: float
    fp32: float
    source: str

    @property
    def arch(self) -> Architecture:
        return nearest(self.sm)

    @property
    def alu(self) -> float:
        """32-bit integer and logic operations/s: 64 lanes an SM beside 64 (sm_75, sm_80) or 128 for fp32,
        whose FLOP/s count a lane twice. sm_120's lanes do either; it is taken as the others here."""
        return self.fp32 / (2 if self.sm <= 80 else 4)


_GB = 1024 * _MB
_T = 1e12
_GA102, _ADA = "GA102 architecture whitepaper v2", "Ada architecture whitepaper"
_CARDS = (
    Card(
        "T4",
        75,
        40,
        16 * _GB,
        320e9,
        4 * _MB,
        65 * _T,
        0,
        8.1 * _T,
        "T4 data sheet; Turing whitepaper (SMs, L2)",
    ),
    Card(
        "A100",
        80,
        108,
        80 * _GB,
        2039e9,
        40 * _MB,
        312 * _T,
        156 * _T,
        19.5 * _T,
        "A100 80 GB SXM data sheet; A100 whitepaper (L2)",
    ),
    Card(
        "RTX 3090", 86, 82, 24 * _GB, 936e9, 6 * _MB, 71 * _T, 35.6 * _T, 35.6 * _T, f"{_GA102}, appendix A"
    ),
    Card(
        "A10",
        86,
        72,
        24 * _GB,
        600e9,
        6 * _MB,
        125 * _T,
        62.5 * _T,
        31.2 * _T,
        f"A10 data sheet; {_GA102} (L2)",
    ),
    Card(
        "RTX 4090",
        89,
        128,
        24 * _GB,
        1008e9,
        72 * _MB,
        165.2 * _T,
        82.6 * _T,
        82.6 * _T,
        f"{_ADA}, appendix A",
    ),
    Card(
        "L4",
        89,
        58,
        24 * _GB,
        300e9,
        48 * _MB,
        121 * _T,
        60 * _T,
        30.3 * _T,
        f"L4 data sheet (half of its sparse figures); {_ADA} (L2)",
    ),
    Card(
        "H100",
        90,
        132,
        80 * _GB,
        3350e9,
        50 * _MB,
        989.4 * _T,
        494.7 * _T,
        66.9 * _T,
        "H100 whitepaper, SXM5",
    ),
    Card(
        "H200",
        90,
        132,
        141 * _GB,
        4800e9,
        50 * _MB,
        989.4 * _T,
        494.7 * _T,
        66.9 * _T,
        "H200 SXM data sheet (memory); H100 whitepaper",
    ),
    Card(
        "B200",
        100,
        148,
        180 * _GB,
        8000e9,
        126 * _MB,
        2250 * _T,
        1100 * _T,
        80 * _T,
        "Blackwell brief, HGX B200; SMs and L2 from reports",
    ),
    Card(
        "RTX 5090",
        120,
        170,
        32 * _GB,
        1792e9,
        96 * _MB,
        209.5 * _T,
        104.8 * _T,
        104.8 * _T,
        "RTX Blackwell whitepaper, appendix A",
    ),
)
CARDS = {card.name: card for card in _CARDS}
