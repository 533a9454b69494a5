"""How two runs of PEFT's tests are compared; the runs themselves need the network: `python -m
tests.peft_suite`."""

from tests.peft_suite.__main__ import _regressions, _summary


def outcome(kind, modules=0):
    return {"outcome": kind, "modules": modules, "message": "why"}


KINDS = {"a::1": "passed", "a::2": "failed", "b::1": "passed", "b::2": "xfailed", "b::3": "skipped"}
STOCK = {name: outcome(kind) for name, kind in KINDS.items()}


def test_what_passes_stock_must_pass_patched():
    assert _regressions(STOCK, STOCK) == []
    worse = STOCK | {"a::1": outcome("failed"), "b::2": outcome("passed"), "b::3": outcome("failed")}
    assert _regressions(STOCK, worse) == ["a::1", "b::2"]
    assert _regressions(STOCK, {}) == ["a::1", "b::1", "b::2"]  # a test that vanishes is a failure


def test_the_summary_counts_and_names():
    patched = STOCK | {"a::1": outcome("failed", modules=3)}
    lines = _summary(STOCK, patched, ["a::1"]).splitlines()
    assert [line.split() for line in lines if line.startswith("all")] == [["all", "2/1/2", "1/2/2", "3"]]
    assert "1 tests pass stock and fail patched" in lines[-2] and lines[-1] == "  a::1: why"
