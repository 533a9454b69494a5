"""Every test of a Triton kernel runs under the interpreter on the CPU, and with `-m gpu` on the device."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test's tensors live."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: pytest -m slow selects the device's slow tests too")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CUDA device is present: the kernels run on it (pytest -m gpu), not in the interpreter")
    if request.param == "cpu":
        from .interpreter import broken

        if reason := broken():
            pytest.skip(reason)
    return request.param


class Launched(TorchDispatchMode):
    """Names what runs within: Triton's kernels, of which none is run, and torch's products and additions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor

        super().__init__()
        self.names: list[str] = []
        patch.setattr(GridExecutor, "__call__", lambda call, *_, **__: self.names.append(call.fn.__name__))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        aten = torch.ops.aten
        packets = {aten.mm: "mm", aten.addmm: "mm", aten.addmm_: "mm", aten.add_: "add"}
        if func.overloadpacket in packets:
            self.names.append(packets[func.overloadpacket])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The order of a call's launches in the interpreter, without their work."""
    if device != "cpu":
        pytest.skip("the interpreter counts launches here; on a device benchmarks.gpu --part launches does")
    return Launched(monkeypatch)


def kernels(plan: list) -> list[str]:
    """A plan's launches by the names of `Launched`."""
    return [one.name if one.call is None else one.call.kernel.fn.__name__ for one in plan]
