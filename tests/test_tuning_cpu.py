"""`peftkern tune` on a CPU: every variant it compares takes the kernels it is named after, and the limits
follow from the times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from peftkern import tuning_cpu
from peftkern.__main__ import main
from peftkern.ops import attention as attention_op
from peftkern.ops.linear import config, cpu, cpu_rows
from peftkern.ops.linear.config import TABLE
from peftkern.ops.linear.problem import Linear
from peftkern.ops.linear_cross_entropy import tiles
from peftkern.runtime import backends

SMALL = dict(shapes=((64, 64), (32, 128)), few=(1, 2, 4), rows=(1, 16, 40), tokens=((1, 32),))
SMALL |= dict(head=(70, 64), head_rows=(5,))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    cpu_rows.read_again()
    yield
    monkeypatch.undo()
    cpu_rows.read_again()


def test_every_variant_takes_its_own_kernels(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    choose, attend, lose = cpu_rows.choose, attention_op.attention, tiles.linear_cross_entropy

    def recorded(**sizes) -> config.Choice:
        choice = choose(**sizes)
        tiled = choice.regime == "gemm" and "tiles" in choice.why
        taken.append("tiles" if tiled else choice.regime)
        return choice

    def attended(*args):
        taken.append("tiles")
        return attend(*args)

    def lost(*args):
        taken.append("tiles")
        return lose(*args)

    recorded.cache_clear = choose.cache_clear
    monkeypatch.setattr(cpu_rows, "choose", recorded)
    monkeypatch.setattr(attention_op, "attention", attended)
    monkeypatch.setattr(tiles, "linear_cross_entropy", lost)
    monkeypatch.setattr(tuning_cpu, "_too_slow", lambda *_: False)
    compared: list[str] = []

    def timer(functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The order of the variants as their times, after one run of each."""
        for name, function in functions.items():
            taken.clear()
            function()
            if name == "torch":
                assert not taken
            elif name == "many":
                assert taken and "gemv" not in taken
            else:  # y of a dense fp32 weight is the vendor's, whoever makes dx
                assert taken[-1] == name and set(taken) - {"vendor"} <= {name}, name
            compared.append(name)
        return {name: float(i + 1) for i, name in enumerate(functions)}

    lines: list[str] = []
    timings = tuning_cpu.measure(isa, timer, **SMALL, print_row=lines.append)
    assert all(value > 0 for value in timings.values()) and len(timings) == len(compared)
    level = TABLE[isa]
    assert ("tiles" in compared) == bool(level.tiles) and "gemv" in compared and "vendor" in compared
    assert {key.split("/")[0] for key in timings} >= {"few float32 64x64", "large bfloat16 32x128"}
    for what in ("attention/32/tiles", "loss/5/tiles", "loss/5/vendor"):
        assert (what in timings) == backends.native().attention_served()
    assert len(lines) == len({key.rpartition("/")[0] for key in timings})
    row = tuning_cpu.derive(timings, level, 3)
    assert row.gemv_max_m == 4 and "3 threads" in row.measured and row.vendor == ()  # all first ones win
    assert row.dense_vendor == {"float32": 0, "bfloat16": 0, "float16": 0}


def times(**found: tuple[float, ...]) -> dict[str, float]:
    """few: gemv and many by M of 1, 4, 16, of two shapes; large: tiles of bf16, gemm, vendor; dense: gemm,
    vendor by M."""
    out = {}
    for dtype in tuning_cpu.DTYPES:
        for shape, gemv in zip(("8x8", "9x9"), (found["gemv"], found["other"]), strict=True):
            for m, ours, many in zip((1, 4, 16), gemv, found["many"], strict=True):
                out |= {f"few {dtype} {shape}/{m}/gemv": ours, f"few {dtype} {shape}/{m}/many": many}
            for name, ms in zip(("tiles", "gemm", "vendor"), found["large"], strict=True):
                if name != "tiles" or dtype == "bfloat16":
                    out[f"large {dtype} {shape}/512/{name}"] = ms
        for m, (ours, vendor) in zip((1, 16, 512), found["dense"], strict=True):
            out |= {f"dense {dtype}/{m}/gemm": ours, f"dense {dtype}/{m}/vendor": vendor}
    for name, other in (("attention", "torch"), ("loss", "vendor")):
        out |= {f"{name}/256/{kind}": ms for kind, ms in zip(("tiles", other), found[name], strict=True)}
    return out


def test_limits_follow_from_the_times() -> None:
    few = dict(gemv=(1.0, 2.0, 9.0), other=(1.0, 4.0, 9.0), many=(3.0, 3.0, 3.0))
    dense = ((1.0, 0.5), (1.0, 0.5), (1.0, 5.0))
    row = tuning_cpu.derive(
        times(**few, large=(2.5, 3.0, 2.0), dense=dense, attention=(1.0, 2.0), loss=(1.0, 2.0)),
        TABLE["amx"],
        2,
    )
    assert row.gemv_max_m == 1 and row.attention and row.loss  # of the shape that ends first
    assert row.vendor == tuning_cpu.DTYPES and row.tiles == {}
    assert row.dense_vendor == dict.fromkeys(tuning_cpu.DTYPES, 16)
    row = tuning_cpu.derive(
        times(**few, large=(1.5, 1.0, 2.0), dense=((1.0, 2.0),) * 3, attention=(2.0, 1.0), loss=(2.0, 1.0)),
        TABLE["avx512bf16"],
        2,
    )
    assert row.vendor == () and row.tiles == {} and not row.attention and not row.loss
    assert row.dense_vendor == dict.fromkeys(tuning_cpu.DTYPES, 0)
    row = tuning_cpu.derive(
        times(**few, large=(1.0, 3.0, 2.0), dense=dense, attention=(2.0, 1.0), loss=(1.0, 1.0)),
        TABLE["amx"],
        2,
    )
    assert row.tiles == {"bfloat16": 1} and row.vendor == tuning_cpu.DTYPES  # for what has no tiles
    assert asdict(tuning_cpu.derive({}, TABLE["amx"], 2)) == asdict(TABLE["amx"])


def test_a_measured_row_is_kept_and_used(caplog: pytest.LogCaptureFixture) -> None:
    isa = backends.native().isa()
    asked = dict(dtype="float32", isa=isa, m=7, n=64, k=64)
    table = config.choose(**asked)
    assert cpu_rows.choose(**asked) == table and cpu_rows.row(isa) is TABLE[isa]
    row = config.Config(7, (), 512, {"float32": None, "bfloat16": 1, "float16": 1}, "measured here")
    file = cpu_rows.save(isa, row, {"few": 1.0}, {"torch": "2"})
    assert cpu_rows.choose(**asked).regime == "gemv" and "measured here" in cpu_rows.choose(**asked).why
    assert cpu_rows.choose(**asked | {"m": 8}).regime == "gemm"
    assert asdict(cpu_rows.row(isa)) == asdict(row) and json.loads(file.read_text())["level"] == isa
    with cpu_rows.use_row(isa, config.Config(0, (), 512, row.dense_vendor, "forced")):
        assert cpu_rows.choose(**asked).regime == "gemm"
    for wrong in ("{", '{"config": 3}', json.dumps({"config": asdict(row) | {"gemv_max_m": -1}})):
        file.write_text(wrong)
        cpu_rows.read_again()
        caplog.clear()
        assert cpu_rows.row(isa) is TABLE[isa] and "run: peftkern tune --cpu" in caplog.text
    cpu_rows.forget(isa)
    assert not file.exists() and cpu_rows.row(isa) is TABLE[isa]


def test_kernels_follow_the_row() -> None:
    isa = backends.native().isa()
    quant, packed = (torch.empty(16),) + (None,) * 5 + (64, 256), torch.empty(2048, dtype=torch.uint8)
    row = TABLE[isa]
    for most, regime in ((3, "gemv"), (2, "gemm")):
        limits = config.Config(most, (), 512, row.dense_vendor, "test")
        with cpu_rows.use_row(isa, limits):
            described = cpu.Described(Linear(packed, quant, 64, 64))
            assert described.regime(dtype="float32", isa=isa, m=3, forward=True).regime == regime


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning_cpu, "measure", lambda isa, timer, **_: {})
    isa = backends.native().isa()
    assert main(["tune", "--cpu", "--busy"]) == 0
    assert f"kept in {cpu_rows.path(isa)}" in capsys.readouterr().out and cpu_rows.load(isa) is not None
    assert main(["tune", "--cpu", "--forget"]) == 0
    assert "back to the table's row" in capsys.readouterr().out and cpu_rows.load(isa) is None


def test_the_timer_runs_each_in_turn() -> None:
    order: list[str] = []
    found = tuning_cpu.wall_timer({name: (lambda name=name: order.append(name)) for name in "ab"}, 0.0)
    assert order == ["a", "b", "a", "b"] and set(found) == {"a", "b"}


def test_a_busy_machine_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 3.0, 3.0))
    monkeypatch.setattr(tuning_cpu, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["tune", "--cpu"]) == 1
    assert "load 3.0" in capsys.readouterr().out and cpu_rows.load(backends.native().isa()) is None
