"""Shared fixtures: every test that takes `isa` runs on each level this CPU has."""

import pytest
import torch

from peftkern import backends


def _levels() -> list[str]:
    return backends.native().isas() if backends.available("cpu")[0] else []


@pytest.fixture(params=_levels() or [pytest.param("none", marks=pytest.mark.skip(reason="the native extension is not built"))])
def isa(request: pytest.FixtureRequest):
    native = backends.native()
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
