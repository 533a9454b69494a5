"""Every test of a Triton kernel runs under the interpreter on the CPU, and with `-m gpu` on the device."""

import os

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the test's tensors live."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: pytest -m slow selects the device's slow tests too")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CUDA device is present: the kernels run on it (pytest -m gpu), not in the interpreter")
    return request.param
