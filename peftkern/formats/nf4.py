"""The 4-bit weight formats (NF4 and FP4, plain and nested absmax) as a frozen dataclass over tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .codes import BLOCKSIZES, CODES, FLOATS, code_tensor, dynamic_map
from .quantize import quantized

__all__ = ["BLOCKSIZES", "CODES", "NF4Weight", "code_tensor", "dynamic_map", "operands"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_LARGEST = 1 << 48  # of a size: no more can be addressed
_TENSORS = ("packed", "code", "absmax", "absmax_8bit", "absmax_code", "nested_absmax", "absmax_offset")


@dataclass(frozen=True)
class NF4Weight:
    """A frozen [N, K] weight in a 4-bit format; holds the tensors it is given, never copies.

    packed        uint8, (N*K+1)//2 bytes in any shape; row-major, the first element in the HIGH nibble
    code          fp32 [16]
    absmax        fp32 [ceil(N*K/blocksize)], or None where the absmax is nested
    absmax_8bit   uint8 [ceil(N*K/blocksize)] with absmax_code fp32 [256], nested_absmax fp32
    [ceil(blocks/nested_blocksize)]
                  and absmax_offset fp32 []; or all None
    shape, dtype  of the dense weight
    """

    packed: Tensor
    code: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    absmax: Tensor | None = None
    absmax_8bit: Tensor | None = None
    absmax_code: Tensor | None = None
    nested_absmax: Tensor | None = None
    absmax_offset: Tensor | None = None
    nested_blocksize: int = 256

    def __post_init__(self) -> None:
        _check(self)

    @property
    def nested(self) -> bool:
        """Whether the absmax itself is quantized ("double quantization")."""
        return self.absmax_8bit is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(
            t.numel() * t.element_size() for name in _TENSORS if (t := getattr(self, name)) is not None
        )

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on a device."""
        return replace(self, **{n: t.to(device) for n in _TENSORS if (t := getattr(self, n)) is not None})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, `dtype` (default: the one it was quantized from), in `shape`."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16 or float16")
        packed, quant = operands(self)
        return torch.ops.peftkern.dequantize_4bit(packed, *quant[:6], self.shape, *quant[6:], dtype)

    @classmethod
    def from_dense(
        cls, weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True
    ) -> NF4Weight:
        """Quantize a dense fp32, bf16 or fp16 weight of any shape; `functional.quantize_4bit` under another
        name."""
        return cls(**quantized(weight, quant_type, blocksize, nested))

    @classmethod
    def from_bnb(cls, weight: Any) -> NF4Weight:
        """View a live `bitsandbytes.nn.Params4bit` or `Linear4bit` without copying a byte.

        Raises ValueError where the weight is not quantized yet, has lost its quant_state, or was repacked by
        bitsandbytes' CPU inference path (whose bytes are in another layout).
        """
        module_state = getattr(weight, "quant_state", None) if isinstance(weight, torch.nn.Module) else None
        param = weight.weight if isinstance(weight, torch.nn.Module) else weight
        state = getattr(param, "quant_state", None) or module_state
        if state is None:
            raise ValueError(
                "weight: has no quant_state. Quantize it first: move the bitsandbytes Linear4bit to a "
                "device (.to('cpu') or .cuda())"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "weight: bitsandbytes repacked it for CPU inference; run peftkern.patch(model), which "
                "unpacks it, or load the model again"
            )
        nested = state.nested
        if nested and state.state2 is None:
            raise ValueError(
                "weight: its absmax is nested, but its quant_state has no state2; load the model again"
            )
        return cls(
            packed=param.data.view(torch.uint8),
            code=state.code,
            shape=tuple(state.shape),
            dtype=state.dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            absmax=None if nested else state.absmax,
            absmax_8bit=state.absmax if nested else None,
            absmax_code=state.state2.code if nested else None,
            nested_absmax=state.state2.absmax if nested else None,
            absmax_offset=state.offset.float()
            if nested
            else None,  # bf16 where bitsandbytes has repacked and unpacked it
            nested_blocksize=state.state2.blocksize if nested else 256,
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
        """Build from the keys bitsandbytes serializes (`<prefix>`, `<prefix>.absmax`,
        `<prefix>.quant_state.bitsandbytes__nf4`, ...)."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict: got {type(state_dict).__name__}, expected a mapping of names to tensors"
            )
        heads = [
            k
            for k in state_dict
            if isinstance(k, str) and k.startswith(f"{prefix}.quant_state.bitsandbytes__")
        ]
        if prefix not in state_dict or len(heads) != 1:
            raise ValueError(
                f"state_dict: expected {prefix!r} and exactly one "
                f"'{prefix}.quant_state.bitsandbytes__<type>', found {heads or 'none'}"
            )
        meta = _read_meta(_entry(state_dict, heads[0]), heads[0])
        packed, code = _entry(state_dict, prefix), _finite(state_dict, f"{prefix}.quant_map")
        nested = "nested_offset" in meta
        absmax = _entry(state_dict, f"{prefix}.absmax") if nested else _finite(state_dict, f"{prefix}.absmax")
        offset = (
            torch.tensor(float(meta["nested_offset"]), dtype=torch.float32, device=packed.device)
            if nested
            else None
        )
        try:
            return cls(
                packed=packed.view(torch.uint8),
                code=code,
                shape=tuple(meta["shape"]),
                dtype=_DTYPES[meta["dtype"]],
                blocksize=meta["blocksize"],
                quant_type=meta["quant_type"],
                absmax=None if nested else absmax,
                absmax_8bit=absmax if nested else None,
                absmax_code=_finite(state_dict, f"{prefix}.nested_quant_map") if nested else None,
                nested_absmax=_finite(state_dict, f"{prefix}.nested_absmax") if nested else None,
                absmax_offset=offset,
                nested_blocksize=meta["nested_blocksize"] if nested else 256,
            )
        except (
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError: of a view that the layout of `packed` does not allow
            if str(error).startswith("state_dict: "):
                raise
            raise ValueError(
                f"state_dict: the entries of {prefix!r} do not fit together: {error}; {_AGAIN}"
            ) from None

    def to_state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The keys `bitsandbytes` writes and reads; the inverse of `from_state_dict`."""
        names = {v: k for k, v in _DTYPES.items()}
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": names[self.dtype],
            "shape": list(self.shape),
        }
        out = {prefix: self.packed, f"{prefix}.quant_map": self.code}
        if self.nested:
            meta |= {
                "nested_blocksize": self.nested_blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.absmax_offset.item(),
            }
            out |= {
                f"{prefix}.absmax": self.absmax_8bit,
                f"{prefix}.nested_absmax": self.nested_absmax,
                f"{prefix}.nested_quant_map": self.absmax_code,
            }
        else:
            out[f"{prefix}.absmax"] = self.absmax
        blob = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8, device=self.device)
        return out | {f"{prefix}.quant_state.bitsandbytes__{self.quant_type}": blob}


_AGAIN = "save the checkpoint again from the quantized model"


def _entry(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict: key {key!r} is missing; the checkpoint is incomplete, {_AGAIN}")
    value = state_dict[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"state_dict: {key!r} is {type(value).__name__}, expected a tensor; {_AGAIN}")
    return value


def _finite(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    """The entry, of which one NaN would make a whole block of weights NaN."""
    value = _entry(state_dict, key)
    if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
        raise ValueError(f"state_dict: {key!r} holds NaN or inf, expected finite numbers; {_AGAIN}")
    return value


def _read_meta(blob: Tensor, key: str) -> dict[str, Any]:
    """What bitsandbytes writes of a weight beside its tensors, as JSON in bytes."""
    try:
        meta = json.loads(bytes(blob.cpu().tolist()).decode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"state_dict: {key!r} is corrupt ({error}); {_AGAIN}") from None
    if not isinstance(meta, dict):
        raise ValueError(
            f"state_dict: {key!r} holds a JSON {type(meta).__name__}, expected an object; {_AGAIN}"
        )
    for name, (expected, valid) in (_PLAIN | _NESTED if "nested_offset" in meta else _PLAIN).items():
        if name not in meta:
            raise ValueError(f"state_dict: {key!r} lacks {name!r}, expected {expected}; {_AGAIN}")
        if not valid(meta[name]):
            raise ValueError(
                f"state_dict: {name!r} of {key!r} is {_short(meta[name])}, expected {expected}; {_AGAIN}"
            )
    if not key.endswith(f"__{meta['quant_type']}"):
        raise ValueError(
            f"state_dict: {key!r} says quant_type {meta['quant_type']!r}, expected the type of its "
            f"name; {_AGAIN}"
        )
    return meta


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 3.4e38


# What each entry of the JSON has to be; of a nested absmax the second too.
_Entries = dict[str, tuple[str, Callable[[Any], bool]]]
_PLAIN: _Entries = {
    "quant_type": (f"one of {sorted(CODES)}", lambda value: isinstance(value, str) and value in CODES),
    "blocksize": (f"one of {BLOCKSIZES}", lambda value: type(value) is int and value in BLOCKSIZES),
    "dtype": (f"one of {sorted(_DTYPES)}", lambda value: isinstance(value, str) and value in _DTYPES),
    "shape": (
        "a list of sizes from 0 to 2**48",
        lambda value: isinstance(value, list) and all(map(_count, value)),
    ),
}
_NESTED: _Entries = {
    "nested_blocksize": ("a power of two", lambda value: _count(value) and value.bit_count() == 1),
    "nested_offset": ("a finite number", _number),
}


def operands(weight: NF4Weight | Tensor) -> tuple[Tensor, tuple]:
    """A weight as the ops take it: its bytes, and what their schemas call code ... nested_blocksize; of a
    dense weight itself and None."""
    if isinstance(weight, Tensor):
        return weight, (None,) * 6 + (64, 256)
    w = weight
    return w.packed, (
        w.code,
        w.absmax,
        w.absmax_8bit,
        w.absmax_code,
        w.nested_absmax,
        w.absmax_offset,
        w.blocksize,
        w.nested_blocksize,
    )


def _check(w: NF4Weight) -> None:
    """Shapes, dtypes and devices; the values are the caller's."""
    if w.quant_type not in CODES:
        raise ValueError(f"quant_type: got {w.quant_type!r}, expected one of {sorted(CODES)}")
    if w.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {w.blocksize}, expected one of {BLOCKSIZES}")
    if w.nested_blocksize < 1 or w.nested_blocksize & (w.nested_blocksize - 1):
        raise ValueError(f"nested_blocksize: got {w.nested_blocksize}, expected a power of two")
    numel = 1
    for size in w.shape:
        if size < 0 or size > _LARGEST:
            raise ValueError(f"shape: got {tuple(map(_short, w.shape))}, expected sizes from 0 to 2**48")
        numel *= size
    blocks = -(-numel // w.blocksize)
    expected = {"packed": (torch.uint8, (numel + 1) // 2), "code": (torch.float32, 16)}
    if w.nested:
        expected["absmax_8bit"] = (torch.uint8, blocks)
        expected["absmax_code"] = (torch.float32, 256)
        expected["nested_absmax"] = (torch.float32, -(-blocks // w.nested_blocksize))
        expected["absmax_offset"] = (torch.float32, 1)
        if w.absmax is not None:
            raise ValueError("absmax: give either absmax (plain) or absmax_8bit (nested), not both")
    else:
        expected["absmax"] = (torch.float32, blocks)
    for name, (dtype, count) in expected.items():
        tensor = getattr(w, name)
        if tensor is None:
            raise ValueError(
                f"{name}: is missing; a {'nested' if w.nested else 'plain'} weight needs {sorted(expected)}"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(
                f"{name}: got {tensor.dtype} with {tensor.numel()} elements, expected {dtype} with "
                f"{count} for shape {w.shape}"
            )
        if tensor.device != w.packed.device:
            raise ValueError(
                f"{name}: is on {tensor.device}, packed is on {w.packed.device}; move the weight with "
                ".to(device)"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")


assert {f.name for f in fields(NF4Weight)} >= set(_TENSORS)
