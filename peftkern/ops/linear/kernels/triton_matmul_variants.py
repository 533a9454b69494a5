"""What the own products of a single linear are compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ....runtime.launch import specialization
from ....runtime.specialization import Specialization
from ..matmul_calls import DENSE, Product, product_calls
from ..matmul_config import default_config

__all__ = ["specializations"]


def specializations(arch: int) -> Iterator[Specialization]:
    """Both directions in the defaults for few and many rows, fused and over a dense slab; then other formats,
    dtypes and epilogues."""
    half = torch.bfloat16 if arch >= 80 else torch.float16
    for dense, m in ((False, 256), (True, 4096), (False, 16), (False, 64)):
        for forward in (True, False):
            yield from _variants(arch, half, m, forward, dense=dense)
    for forward in (True, False):
        yield from _variants(arch, half, 16, forward, split_k=4)
        yield from _variants(arch, half, 256, forward, adapter=torch.float32, rank=256, epilogue=True)
        yield from _variants(arch, half, 256, forward, nested=False)
        yield from _variants(arch, half, 64, forward, k=4104)
        yield from _variants(arch, half, 64, forward, k=4097)
        yield from _variants(arch, torch.float16 if arch >= 80 else torch.bfloat16, 64, forward)
        yield from _variants(arch, torch.float32, 64, forward)


def _variants(
    arch: int,
    dtype: torch.dtype,
    m: int,
    forward: bool,
    *,
    dense: bool = False,
    nested: bool = True,
    adapter: torch.dtype | None = None,
    rank: int = 16,
    epilogue: bool = False,
    k: int = 4096,
    split_k: int = 1,
) -> Iterator[Specialization]:
    """epilogue: with a bias, or with dropout. Tensors without storage stand for the call's."""
    n, adapter, blocks = 4096, adapter or dtype, 4096 * k // 64
    j, c = (n, k) if forward else (k, n)

    def of(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    absmax = (
        (None, of(blocks, kind=torch.uint8), of(256), of(-(-blocks // 256)), of(1))
        if nested
        else (of(blocks), *(None,) * 4)
    )
    quant = DENSE if dense else (of(16), *absmax, 64, 256)
    weight = of(n, k, kind=dtype) if dense else of((n * k + 1) // 2, kind=torch.uint8)
    low, factor = of(m, rank), of(n, rank, kind=adapter) if forward else of(rank, k, kind=adapter)
    bias, seed = (
        of(j) if epilogue and forward else None,
        of(1, kind=torch.int64) if epilogue and not forward else None,
    )
    out = of(m, j, kind=dtype)
    product = Product(weight, quant, out, bias, low, factor, 0.5, 0.1, seed, 0)
    ragged = product.words(forward, c) == 0
    config = default_config(m, j, c, arch=arch, dtype=dtype, dense=dense, ragged=ragged)
    config = replace(config, split_k=split_k)
    calls = product_calls(of(m, c, kind=dtype), [product], config, forward=forward, arch=arch)
    form = "dense" if dense else ("nested" if nested else "plain")
    title = "forward" if forward else "dx", form, str(dtype).removeprefix("torch.")
    name = "-".join((*title, f"m{m}", f"k{k}", f"r{rank}", f"split{split_k}"))
    mma = arch >= 80 and dtype != torch.float32
    # Without tensor cores larger tiles, whose rows of codes fill 16-byte loads, do not fit the registers.
    wide = ("words_ptrs", "weight_ptrs") if mma and (dense or k % 32 == 0) else ()
    promises = {"expects_mma": mma, "wide_loads": wide, "unfused": ("absmax_value",)}
    yield specialization(name, calls[0], **promises)
    for reduce in calls[1:]:
        yield specialization(f"reduce-{name}", reduce)
