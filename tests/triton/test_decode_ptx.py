"""The shipped PTX sequences, run instruction by instruction in numpy: every code at every place of a word,
any absmax, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftkern.formats.nf4 import CODES, code_tensor

pytest.importorskip("triton")

from peftkern.ops.triton_nf4 import LOOKUP, TABLE, to_ptx  # noqa: E402


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray | int) -> np.ndarray:
    """prmt.b32: byte i of the result is the byte of {b, a} that nibble i of the selector names; its top bit
    asks for the sign alone."""
    pool = np.stack([(r >> np.uint32(8 * i)) & np.uint32(0xFF) for r in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for i in range(4):
        nibble = np.broadcast_to(
            (np.asarray(selector, dtype=np.uint32) >> np.uint32(4 * i)) & np.uint32(0xF), a.shape
        )
        byte = np.take_along_axis(pool, (nibble & 7)[None].astype(np.int64), axis=0)[0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _round(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 -> the 16 bits of `dtype`, to nearest even, as uint32."""
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().astype(np.uint16).astype(np.uint32)


def _run(instructions: tuple, registers: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    for operation, out, *names in instructions:
        a, *rest = (registers[n] if isinstance(n, str) else np.uint32(n) for n in names)
        if operation == "mul":
            registers[out] = a * rest[0]
        elif operation == "pair":
            registers[out] = _round(a, dtype) | _round(rest[0], dtype) << np.uint32(16)
        elif operation == "prmt":
            registers[out] = _prmt(a, *rest)
        else:
            registers[out] = {"and": np.bitwise_and, "or": np.bitwise_or, "shr": np.right_shift}[operation](
                a, rest[0]
            )
    return registers


def _words() -> np.ndarray:
    """Every value of every byte (two codes) at each of the four places, among random other bytes; then random
    words."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 4 * 256 + 3000, dtype=np.uint32)
    for place in range(4):
        part = slice(256 * place, 256 * (place + 1))
        words[part] = (words[part] & ~np.uint32(0xFF << 8 * place)) | (
            np.arange(256, dtype=np.uint32) << np.uint32(8 * place)
        )
    return words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_the_sequences_decode_exactly(quant_type: str, dtype: torch.dtype) -> None:
    words = _words()
    absmax = torch.exp(torch.randn(len(words)) * 4)
    absmax[::50], absmax[1::50], absmax[2::50] = 0.0, 1e-40, 1e5  # nothing, fp32 subnormal, beyond fp16
    code = code_tensor(quant_type)
    registers = {f"code{i}": np.full(len(words), code[i].item(), np.float32) for i in range(16)}
    registers |= {"absmax": absmax.numpy(), "word": words}
    outs = _run(LOOKUP, _run(TABLE, registers, dtype), dtype)
    got = np.stack(
        [(outs[f"out{i // 2}"] >> np.uint32(16 * (i % 2))) & np.uint32(0xFFFF) for i in range(8)], axis=1
    )
    bytes_ = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).copy())
    index = torch.stack([bytes_ >> 4, bytes_ & 15], dim=2).view(-1, 8).long()
    exact = (code[index] * absmax[:, None]).to(dtype)
    assert torch.equal(torch.from_numpy(got.astype(np.uint16).view(np.int16)), exact.view(torch.int16))


def test_a_wrong_selector_is_seen() -> None:
    """The emulator reads the selectors: with one changed the values differ."""
    broken = tuple((*i[:-1], 0x4150) if i[-1] == 0x4051 else i for i in LOOKUP)
    registers = {f"low{i}": np.uint32([i]) for i in range(4)} | {
        f"high{i}": np.uint32([0x100 + i]) for i in range(4)
    }
    registers["word"] = np.uint32([0x12345678])
    first, second = (_run(table, dict(registers), torch.bfloat16)["out0"] for table in (LOOKUP, broken))
    assert first != second


def test_ptx_has_every_instruction_once_and_in_order() -> None:
    text = to_ptx(
        LOOKUP, ["word", *(f"{p}{i}" for p in ("low", "high") for i in range(4))], [f"e{i}" for i in range(8)]
    )
    lines = [line for line in text.splitlines() if line.endswith(";") and not line.startswith(".reg")]
    assert len(lines) == len(LOOKUP)
    assert [line.split()[1].rstrip(",") for line in lines] == [i[1] for i in LOOKUP]
    assert all("$" in line or "," in line for line in lines) and "$8" in lines[0]
