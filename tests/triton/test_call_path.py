"""How far it is from a patched linear's call to its launches on a GPU, once it has been met: the files and
functions of the package that Python enters. Counted in the interpreter, where a launch is a function of
`runtime/launch.py` in place of Triton's own, which is not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import peftkern
from peftkern import use_backend
from peftkern.runtime import backends, replay
from tests.test_call_path import Trace, trace

models = pytest.importorskip("tests.patching.models")

LAUNCH = "runtime/launch.py"


@pytest.fixture
def layer(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.nn.Module]:
    """A patched LoRA layer on a 4-bit weight, which belongs to no group."""
    model = models.lora(models.llama()).to(device)
    peftkern.patch(model)
    if device == "cpu":
        monkeypatch.setattr(replay, "_on_gpu", lambda first: True)
        monkeypatch.setattr(replay, "_current_device", lambda: -1)
    replay.forget()
    with use_backend("triton"):
        # which is asked of a backend that is forced alone
        monkeypatch.setattr(backends, "_check_forced", lambda name, device: None)
        yield models.first(model)
    replay.forget()


def _launches(call: Callable[[], object]) -> Trace:
    """Without the launch's function, and the kernels' that the interpreter runs."""
    found = trace(call)
    functions = [f for f in found.functions if f[0] != LAUNCH and "triton" not in f[0]]
    return Trace(sorted({file for file, _ in functions}), functions, found.back)


# Beside these there is the recorded call itself. Without gradients the CPU, which interprets, is asked for
# its kernel for few rows first.
@pytest.mark.parametrize(
    ("rows", "grad", "files", "functions"), [(1, True, 9, 17), (64, True, 9, 17), (64, False, 10, 19)]
)
def test_a_patched_linears_call(
    layer: torch.nn.Module, device: str, rows: int, grad: bool, files: int, functions: int
) -> None:
    x = torch.randn(rows, 64, device=device, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            layer(x)
        found = _launches(lambda: layer(x))
    assert len(found.files) <= files, found.files
    assert len(found.functions) <= functions, found.functions


def test_its_backward(layer: torch.nn.Module, device: str) -> None:
    x = torch.randn(64, 64, device=device, requires_grad=True)
    for _ in range(4):
        layer(x).sum().backward()
    found = _launches(layer(x).sum().backward)
    assert len(found.files) <= 8, found.files
    assert len(found.functions) <= 12, found.functions
