"""The benchmarks' own logic: what is wrong is never timed, what is slow is called once, ratios come per
round; and a smoke run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import bench_curves, harness, panels, report
from benchmarks.harness import OURS, Provider, Row, Spec, measure, measure_spec, write_csv
from benchmarks.machine import Load

ROOT = Path(__file__).parents[1]


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    return clock


def _provider(clock: Clock, name: str, seconds: float, calls: list[str] | None = None) -> Provider:
    def call() -> None:
        clock.now += seconds
        if calls is not None:
            calls.append(name)

    return Provider(name, call, lambda result: None)


def test_what_is_wrong_is_not_timed(clock: Clock) -> None:
    calls: list[str] = []

    def refuse(result: object) -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        measure([Provider(OURS, _provider(clock, OURS, 0.01, calls).call, refuse)], rounds=3)
    assert calls == [OURS]


def test_a_wrong_peer_is_left_out_and_named(clock, capsys) -> None:
    calls: list[str] = []

    def refuse(_) -> None:
        raise AssertionError("relative error 1.0")

    wrong = Provider("peer", _provider(clock, "peer", 0.01, calls).call, refuse)
    timings = measure([_provider(clock, OURS, 0.01, calls), wrong], rounds=2)
    assert timings.keys() == {OURS} and calls.count("peer") == 1
    assert "peer: left out" in capsys.readouterr().err


def test_a_slow_provider_is_called_once_and_says_so(clock: Clock) -> None:
    calls: list[str] = []
    providers = [_provider(clock, OURS, 0.01), _provider(clock, "slow", 6.0, calls)]
    timings = measure(providers, rounds=4, cap_s=5.0)
    assert calls == ["slow"] and timings["slow"].once and timings["slow"].seconds == pytest.approx((6.0,))
    assert len(timings[OURS].seconds) == 4 and not timings[OURS].once
    assert timings["slow"].ratios == pytest.approx((600.0,) * 4)
    rows = measure_spec(Spec("k", "m", "float32", 2, 3), providers, rounds=2, cap_s=5.0)
    assert [row.note for row in rows] == ["", "one call only, over the time cap"]
    assert [row.p50 for row in rows] == pytest.approx([10.0, 6000.0])


def test_quick_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    calls: list[str] = []
    timings = measure([_provider(clock, OURS, 0.0015, calls)], rounds=2)
    # a check, a look at the time, and two rounds of two calls, since 4 ms hold two of 1.5
    assert len(calls) == 2 + 2 * 2
    assert timings[OURS].seconds == pytest.approx((0.0015, 0.0015))


def test_ratios_are_taken_within_a_round(clock: Clock) -> None:
    """A machine that slows down from round to round leaves the ratios as they are."""
    calls = {OURS: 0, "twice": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        clock.now += seconds * calls[name]

    providers = [
        Provider(n, lambda n=n, s=s: run(n, s), lambda result: None)
        for n, s in ((OURS, 0.01), ("twice", 0.02))
    ]
    timings = measure(providers, rounds=3)
    # after the check and a look at the time
    assert timings[OURS].seconds == pytest.approx((0.03, 0.04, 0.05))
    assert timings["twice"].ratios == pytest.approx((2.0, 2.0, 2.0))


def test_rounds_interleave_and_turn(clock: Clock) -> None:
    order: list[str] = []
    measure([_provider(clock, n, 0.01, order) for n in (OURS, "b", "c")], rounds=3)
    assert order[6:] == [OURS, "b", "c", "b", "c", OURS, "c", OURS, "b"]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_load_sees_other_processes() -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 20: pass"]
    )
    try:
        loaded = Load()
        time.sleep(0.6)
        cores = loaded.cores()
    finally:
        other.kill()
        other.wait()
    assert cores is not None and cores > 0.2
    assert re.fullmatch(r"average \S+; cores apart \d+ to \d+ ns; others \S+ cores( BUSY)?", loaded.words())


def _row(provider: str, ratio: float, **changes: object) -> Row:
    values = (
        dict(kernel="qlora_linear", mode="dropout 0", dtype="bfloat16", shape="4096x4096", M=512) | changes
    )
    head = (
        "Test CPU",
        "avx2",
        2,
        "peftkern 0",
        values["kernel"],
        provider,
        values["mode"],
        values["dtype"],
        values["shape"],
        values["M"],
    )
    return Row(
        *head,
        1.0,
        ratio,
        2.0,
        ratio,
        "ms",
        "average 0.00; others 0.00 cores",
        note=str(values.get("note", "")),
    )


def test_report_judges_by_the_faster_dense(tmp_path: Path) -> None:
    rows = [
        _row(OURS, 1.0),
        _row("dense bfloat16", 500.0, note="one call only, over the time cap"),
        _row("dense float32", 0.5),
    ]
    rows += [
        _row(OURS, 1.0, kernel="dequantize", mode="allocating", M=0),
        _row("bitsandbytes", 13.0, kernel="dequantize", mode="allocating", M=0),
    ]
    rows += [_row("copy", 0.8, kernel="dequantize", mode="allocating", M=0)]
    write_csv(tmp_path / "a.csv", rows[:3])
    write_csv(tmp_path / "b.csv", rows[3:])
    lines = report.load(tmp_path)
    assert len(lines) == 6 and lines[1]["provider"] == "dense bfloat16"
    text = report.table(lines).splitlines()
    found = {
        line.split("|")[6].strip(): [cell.strip() for cell in line.split("|")[13:15]] for line in text[2:]
    }
    assert found["dense float32"] == ["ours ≤ 1.06×", "NO (2)"]
    assert found["dense bfloat16 *"] == ["", ""]
    assert found["bitsandbytes"] == ["≥ 12×", "yes (13)"]
    assert found["copy"] == ["ours ≤ 1.3×", "yes (1.25)"]


def test_report_without_results_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "benchmarks.run_all" in capsys.readouterr().err


def test_report_writes_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_csv(tmp_path / "a.csv", [_row(OURS, 1.0), _row("dense float32", 0.9)])
    assert report.main([str(tmp_path)]) == 0
    assert "Test CPU" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_panel_answers_one_question_with_a_dozen_bars() -> None:
    """Of the recorded figures: every panel has bars, few enough to read; the title says what they span,
    losses included."""
    lines = report.load(Path(report.__file__).parent / "results/zen3-2core-avx2")
    for panel in panels.PANELS:
        bars = panels.bars_of(panel, lines)
        assert 2 <= len(bars) <= panels.MOST_BARS and len({name for name, _ in bars}) == len(bars), (
            panel.subject
        )
        ratios = [ratio for _, ratio in bars]
        recorded = {float(line["ratio"]) for line in lines if panel.holds(line)}
        assert recorded >= set(ratios)
        assert f"{min(ratios):.3g} to {max(ratios):.3g}" in panels.title_of(panel, ratios)


@pytest.mark.parametrize("name", ["dequantize", "memory", "linear_cross_entropy"])
def test_smoke(tmp_path: Path, name: str) -> None:
    _smoke(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "quantize",
        "gemv",
        "qlora_linear",
        "switching",
        "step",
        "blocks",
        "memory_store",
        "tiled_mlp",
        "options",
        "generate",
        "bottleneck",
    ],
)
def test_smoke_of_the_longer_ones(tmp_path: Path, name: str) -> None:
    if name in ("step", "memory_store", "generate", "bottleneck"):
        for package in ("transformers", "peft", "bitsandbytes"):
            pytest.importorskip(package)
    _smoke(tmp_path, name)


def _smoke(tmp_path: Path, name: str) -> None:
    """--small runs, its results pass their gates, and the CSV has its columns."""
    out = tmp_path / "out.csv"
    command = [
        sys.executable,
        "-m",
        f"benchmarks.bench_{name}",
        "--small",
        "--rounds",
        "2",
        "--isa",
        "baseline",
        "--out",
        str(out),
    ]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["provider"] for line in lines} >= {OURS} and {line["isa"] for line in lines} == {"baseline"}
    assert all(float(line["p20"]) <= float(line["p50"]) <= float(line["p80"]) for line in lines)


def _curves(shift: float) -> dict[tuple[str, int], list[float]]:
    """Two seeds, 0.2 apart; the patched ones `shift` above stock in the second half."""
    stock = {("stock", seed): [4.0 - 0.1 * step + 0.2 * seed for step in range(8)] for seed in (0, 1)}
    ours = {
        ("peftkern", seed): [v + (shift if i >= 4 else 0.0) for i, v in enumerate(stock["stock", seed])]
        for seed in (0, 1)
    }
    return stock | ours


def test_curves_within_the_noise_of_seeds_pass() -> None:
    found = bench_curves.windows(_curves(0.1), 4)
    assert [(w.first, w.last) for w in found] == [(1, 4), (5, 8)]
    assert found[1].difference == pytest.approx(0.1) and found[1].noise == pytest.approx(0.2 / 2**0.5)
    assert bench_curves.judge(found) == []


@pytest.mark.parametrize("shift", [0.2, -0.2, float("nan")])
def test_curves_outside_of_it_fail(shift: float) -> None:
    (message,) = bench_curves.judge(bench_curves.windows(_curves(shift), 4))
    assert message.startswith("steps 5-8")


def test_curves_that_do_not_match_are_refused() -> None:
    losses = _curves(0.0)
    losses["stock", 1].pop()
    with pytest.raises(ValueError, match="one length"):
        bench_curves.windows(losses, 4)
