"""Shared fixtures: every test that takes `isa` runs on each level this CPU has."""

import os
from collections.abc import Iterator

import pytest

# Two workers on two cores: OpenMP's threads wait asleep, or each would spin on the cores the other's work
# needs. Read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read when huggingface_hub is imported: what is not in the cache is told at once, not after its retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_HOOK = os.environ.get("PEFTKERN_BNB_BACKEND")

import torch  # noqa: E402

# Triton decides at the kernels' import whether they are interpreted: without a CUDA device their numerics are
# proven on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from peftkern.runtime import backends  # noqa: E402


def _forced(name: str) -> Iterator[str]:
    native = backends.native()
    before = native.isa()
    native.set_isa(name)
    yield name
    native.set_isa(before)


# Without the extension this raises, and names the fix: the kernels' tests must not pass by being skipped.
@pytest.fixture(params=backends.native().isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced(request.param)


@pytest.fixture(params=[level for level in backends.native().isas() if level in ("avx512bf16", "amx")])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `isa`, of the levels with bf16 products."""
    yield from _forced(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What a test module imports must not switch the bitsandbytes hook off in this process, as
    benchmarks.peers does: it would not come back after a test that takes it out."""
    if os.environ.get("PEFTKERN_BNB_BACKEND") != _HOOK:
        raise pytest.UsageError(
            "a test module's import has set PEFTKERN_BNB_BACKEND: import within the test, see "
            "test_long_context.py"
        )


# Their kernels have no code of their own on avx512bf16: what runs there is what runs on amx, compiled with
# fewer flags.
WITHOUT_PRODUCTS = ("add_rms_norm", "glu", "lora_add", "rms_norm", "rope")
# The level that a module of tests emulates: a CPU that has it runs the same kernels in every other test.
EMULATED = {"test_avx512_emulated": "avx512", "test_avx512_emulated_linear": "avx512"}


@pytest.hookimpl(tryfirst=True)  # before what is marked slow is deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What another test shows on this CPU is left to the nightly run: those kernels on the lower of two
    levels, and the emulation of a level that is there."""
    levels = backends.native().isas()
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        twice = "amx" in levels and parameters.get("isa") == "avx512bf16"
        twice = twice and item.path.stem.removeprefix("test_") in WITHOUT_PRODUCTS
        emulated = [EMULATED.get(item.path.stem)]
        emulated += [v.removesuffix(" emulated") for v in parameters.values() if str(v).endswith(" emulated")]
        if twice or not set(levels).isdisjoint(emulated):
            item.add_marker(pytest.mark.slow)
