"""What --no-patch runs on: PEFT's and bitsandbytes' own code, as far as it is right on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import bnb_backend
from ..formats.bnb_repacked import keep_plain
from ..formats.nf4 import NF4Weight
from .config import FinetuneConfig
from .errors import InputError

__all__ = ["prepare_stock", "stock_kernels"]

_ROUNDING = 2.0**-8  # of bf16; bitsandbytes' wrong decodings are off by 0.1 and more


@contextmanager
def stock_kernels(config: FinetuneConfig) -> Iterator[None]:
    """Plain means plain: inside, the hook by which installing peftkern changes bitsandbytes is out where
    `config` says no patch."""
    if config.patch or config.quantization == "none":
        yield
        return
    with bnb_backend.suspended():
        yield


def prepare_stock(model: nn.Module) -> None:
    """Make sure that the stock layers of `model` train rightly, and say what was done; InputError where they
    cannot.

    bitsandbytes repacks weights at the first evaluation on CPUs with AVX512_BF16, and a repacked layer has no
    gradient for its input. On CPUs with AVX-512 it decodes weights wrongly whose in_features is no multiple
    of the block size.
    """
    if kept := keep_plain(model):
        print(
            f"Stock run: {kept} 4-bit layers are kept from being repacked for CPU inference, after "
            "which bitsandbytes has no gradients.",
            file=sys.stderr,
        )
    tried = set()
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or module.weight.device.type != "cpu":
            continue
        kind = tuple(state.shape), state.blocksize, state.quant_type
        if kind not in tried:
            tried.add(kind)
            _require_right_decoding(name, module, state)


def _require_right_decoding(name: str, module: nn.Module, state: Any) -> None:
    import bitsandbytes

    exact = NF4Weight.from_bnb(module).dequantize(torch.float32)
    got = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).float()
    error = ((got - exact).norm() / exact.norm()).item()
    if not error <= _ROUNDING:
        rows, columns = state.shape
        raise InputError(
            f"--no-patch: bitsandbytes {bitsandbytes.__version__} decodes the 4-bit weight of {name} "
            f"({rows} x {columns}, blocks of "
            f"{state.blocksize}) wrongly on this CPU (relative error {error:.2f}): a stock run would "
            "not train this model. "
            "Compare with --quantization none, or on another machine"
        )
