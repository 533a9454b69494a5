"""How far it is from a call to the arithmetic: the files and functions of the package that Python enters. The
bounds are what was reached with Python 3.11; a change may lower them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
import torch

import peftkern

models = pytest.importorskip("tests.patching.models")

ROOT = Path(peftkern.__file__).parent


class Trace(NamedTuple):
    """Files and functions by their first entry; back: calls, from file to file, into one that waits for the
    caller."""

    files: list[str]
    functions: list[tuple[str, str]]
    back: set[tuple[str, str]]


def trace(call: Callable[[], object]) -> Trace:
    files, functions, back, own = [], [], set(), {}

    def name(frame: FrameType) -> str | None:
        path = frame.f_code.co_filename
        if path not in own:
            inside = path.startswith(f"{ROOT}/")
            own[path] = str(Path(path).relative_to(ROOT)) if inside else None
        return own[path]

    def enter(frame: FrameType, event: str, _: object) -> None:
        file = name(frame) if event == "call" else None
        if file is None:
            return
        function = (file, frame.f_code.co_name, frame.f_code.co_firstlineno)
        files.extend([file] if file not in files else [])
        functions.extend([function] if function not in functions else [])
        below, outer = [], frame.f_back
        while outer is not None:
            below.extend([name(outer)] if name(outer) is not None else [])
            outer = outer.f_back
        if below and below[0] != file and file in below:
            back.add((below[0], file))

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trace(files, [function[:2] for function in functions], back)


@pytest.fixture
def layer() -> torch.nn.Module:
    """A patched LoRA layer on a 4-bit weight, which belongs to no group."""
    model = models.lora(models.llama())
    peftkern.patch(model)
    return models.first(model)


@pytest.mark.parametrize(
    ("rows", "grad", "files", "functions"), [(1, False, 8, 17), (1, True, 7, 15), (512, True, 7, 15)]
)
def test_a_patched_linears_call(
    layer: torch.nn.Module, rows: int, grad: bool, files: int, functions: int
) -> None:
    x = torch.randn(rows, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        layer(x)
        found = trace(lambda: layer(x))
    assert len(found.files) <= files, found.files
    assert len(found.functions) <= functions, found.functions
    assert found.back <= {("patching/decode.py", "patching/linears.py")}  # which asks if all is as it was


def test_its_backward(layer: torch.nn.Module) -> None:
    x = torch.randn(512, 64, requires_grad=True)
    layer(x).sum().backward()
    found = trace(layer(x).sum().backward)
    assert len(found.files) <= 6 and len(found.functions) <= 11 and not found.back, found


def test_patch_comes_back_to_no_file() -> None:
    """But for methods of one forward's base classes, each in the file of its own kind."""
    model = models.lora(models.llama())
    found = trace(lambda: peftkern.patch(model, fused_loss=True))
    forwards = {f"patching/{name}.py" for name in ("forwards", "wrappers", "reads", "linears")}
    forwards |= {f"patching/{name}.py" for name in ("attention", "blocks", "layers", "loss", "mlp")}
    assert all(file in forwards for pair in found.back for file in pair), found.back
    assert len(found.files) <= 30, found.files
    assert not trace(lambda: peftkern.unpatch(model)).back
