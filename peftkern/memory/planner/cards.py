"""What cards have: a table of stated figures, and this machine's own card where there is one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ...errors import InputError

__all__ = ["CARDS", "CPU", "GIB", "Card", "card_of", "generic_card", "this_card"]

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """A device, and the rates that step times are made from.

    name: as the driver says it, shortened. arch: compute capability (8.9 as 89); 0: no GPU. sms: its
    multiprocessors. l2: bytes. memory: bytes that torch can have, the driver's own part taken off. tflops:
    dense 16-bit TFLOP/s that a training step reaches (an assumption: 0.67 of the data sheet's figure with
    fp32 sums). link: GB/s over PCIe each way. disk: GB/s written. stated: where these come from.
    """

    name: str
    arch: int
    sms: int
    l2: int
    memory: int
    tflops: float
    link: float = 25.0
    disk: float = 2.0
    stated: str = "data sheet; TFLOP/s, link and disk are assumptions"

    @property
    def is_gpu(self) -> bool:
        return self.arch > 0

    @property
    def context(self) -> int:
        """Bytes of the CUDA context and of loaded kernels, outside torch's allocator: an assumption."""
        return int(0.45 * GIB) if self.is_gpu else 0

    @property
    def blas_workspace(self) -> int:
        """Bytes of cuBLAS's workspaces: one for the forward's thread, one for autograd's."""
        return 0 if not self.is_gpu else 2 * ((32 << 20) if self.arch >= 90 else 8_519_680)

    @property
    def flash(self) -> bool:
        """Whether FlashAttention runs on it."""
        return self.arch >= 80


def _card(name: str, arch: int, sms: int, l2_mib: int, gib: float, tflops: float, link: float = 25.0) -> Card:
    return Card(name, arch, sms, l2_mib << 20, int(gib * GIB), tflops, link)


# gib: what torch has of it on Linux without a display, 0.3 to 0.4 GiB below the number on the box.
CARDS = {
    card.name.lower(): card
    for card in (
        _card("RTX 4090", 89, 128, 72, 23.6, 110),
        _card("RTX 3090", 86, 82, 6, 23.6, 45),
        _card("RTX 5090", 120, 170, 96, 31.4, 140, 50),
        _card("RTX 4080", 89, 76, 64, 15.6, 65),
        _card("RTX 4070", 89, 46, 36, 11.6, 39),
        _card("RTX 4060", 89, 24, 24, 7.65, 20, 12),
        _card("RTX 3060", 86, 28, 3, 11.6, 17),
        _card("T4", 75, 40, 4, 14.6, 30, 12),
        _card("L4", 89, 58, 48, 22.0, 60),
        _card("A10", 86, 72, 6, 22.0, 60),
        _card("A100", 80, 108, 40, 79.1, 200),
        _card("H100", 90, 132, 50, 79.1, 500, 50),
        _card("H200", 90, 132, 50, 139.8, 500, 50),
        _card("B200", 100, 148, 126, 178.0, 1000, 50),
    )
}
CPU = Card("CPU", 0, 0, 0, 0, 0.5, 0.0, 2.0, "an assumption: 0.5 TFLOP/s")

# The card that a bare number of GB stands for.
_BY_SIZE = (
    (8, "rtx 4060"),
    (12, "rtx 4070"),
    (16, "rtx 4080"),
    (24, "rtx 4090"),
    (32, "rtx 5090"),
    (80, "h100"),
)


def generic_card(gigabytes: float) -> Card:
    """The card that "24 GB" stands for: the rates of the nearest GeForce not larger, and as much memory as
    such a card leaves torch.
    """
    known = [(size, name) for size, name in _BY_SIZE if size <= gigabytes + 0.5] or [_BY_SIZE[0]]
    size, name = known[-1]
    base = CARDS[name]
    memory = base.memory if abs(size - gigabytes) < 0.5 else int((gigabytes - 0.4) * GIB)
    if memory <= 0:
        raise InputError(f"--gpu {gigabytes:g}: expected the card's memory in GB, more than 0.4")
    return replace(base, name=f"{gigabytes:g} GB card (as {base.name})", memory=memory)


def card_of(text: str) -> Card:
    """`24`, `24GB`, `23.5GiB` (exactly that much for torch), or the name of a card in the table.

    Raises: InputError with the names that are known.
    """
    plain = text.strip().lower().removeprefix("nvidia ").removeprefix("geforce ")
    number = re.fullmatch(r"([\d.]+)\s*(gib|gb|g)?", plain)
    if number:
        try:
            size = float(number[1])
        except ValueError:
            size = 0.0
        if size <= 0:
            raise InputError(f"--gpu {text}: expected a size above 0")
        if number[2] == "gib":
            return replace(generic_card(max(size, 1.0)), name=f"{size:g} GiB card", memory=int(size * GIB))
        return generic_card(size)
    for name, card in CARDS.items():
        if plain == name or plain == name.removeprefix("rtx "):
            return card
    if plain == "cpu":
        return CPU
    raise InputError(f"--gpu {text}: expected GB (24), GiB (23.5GiB) or one of {', '.join(CARDS)}")


def this_card() -> Card:
    """The current CUDA device; `CPU` where there is none."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    short = found.name.lower().replace("nvidia", "").replace("geforce", "").strip()
    known = next((card for name, card in CARDS.items() if name in short), None)
    arch = found.major * 10 + found.minor
    base = known or Card(found.name, arch, 0, 0, 0, 0.5 * found.multi_processor_count)
    return replace(
        base,
        name=found.name,
        arch=arch,
        sms=found.multi_processor_count,
        l2=found.L2_cache_size,
        memory=found.total_memory,
        stated="read from the device; TFLOP/s, link and disk are assumptions",
    )
