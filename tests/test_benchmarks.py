"""The benchmarks' own logic: what is wrong is never timed, what is slow is called once, ratios come per round; and a smoke run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.harness import OURS, Provider, Row, Spec, measure, measure_spec, write_csv
from benchmarks.machine import Load
from peftkern import backends

ROOT = Path(__file__).parents[1]


def _sleeper(seconds: float, calls: list[float]) -> Callable[[], None]:
    return lambda: (calls.append(seconds), time.sleep(seconds))[0]


def _provider(name: str, seconds: float = 0.0, calls: list | None = None) -> Provider:
    return Provider(name, _sleeper(seconds, [] if calls is None else calls), lambda result: None)


def test_what_is_wrong_is_not_timed() -> None:
    calls: list[float] = []

    def refuse(result: object) -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        measure([Provider(OURS, _sleeper(0.0, calls), refuse)], rounds=3)
    assert len(calls) == 1


def test_a_slow_provider_is_called_once_and_says_so() -> None:
    calls: list[float] = []
    providers = [_provider(OURS, 0.006), _provider("slow", 0.12, calls)]
    timings = measure(providers, rounds=4, cap_s=0.1)
    assert len(calls) == 1 and timings["slow"].once and len(timings["slow"].seconds) == 1
    assert len(timings[OURS].seconds) == 4 and not timings[OURS].once
    assert len(timings["slow"].ratios) == 4 and min(timings["slow"].ratios) > 3
    rows = measure_spec(Spec("k", "m", "float32", 2, 3), providers, rounds=2, cap_s=0.1)
    assert [row.note for row in rows] == ["", "one call only, over the time cap"]


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down between rounds leaves the ratio as it is."""
    pace = [1.0]
    calls = {OURS: 0, "twice": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds * pace[0])
        if name == "twice" and calls[name] % 2 == 0:
            pace[0] *= 2

    providers = [Provider(n, lambda n=n, s=s: run(n, s), lambda result: None) for n, s in ((OURS, 0.01), ("twice", 0.02))]
    timings = measure(providers, rounds=3)
    assert max(timings[OURS].seconds) > 1.5 * min(timings[OURS].seconds)
    assert timings["twice"].ratios == tuple(a / b for a, b in zip(timings["twice"].seconds, timings[OURS].seconds, strict=True))


def test_rounds_interleave_and_turn() -> None:
    order: list[str] = []
    providers = [Provider(n, lambda n=n: (order.append(n), time.sleep(0.005)), lambda result: None) for n in (OURS, "b", "c")]
    measure(providers, rounds=3)
    assert order[6:] == [OURS, "b", "c", "b", "c", OURS, "c", OURS, "b"]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_load_sees_other_processes() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 20: pass"])
    try:
        loaded = Load()
        time.sleep(0.6)
        cores = loaded.cores()
    finally:
        other.kill()
        other.wait()
    assert cores is not None and cores > 0.2


def _row(provider: str, ratio: float, **changes: object) -> Row:
    values = dict(kernel="qlora_linear", mode="dropout 0", dtype="bfloat16", shape="4096x4096", M=512) | changes
    head = ("Test CPU", "avx2", 2, "peftkern 0", values["kernel"], provider, values["mode"], values["dtype"], values["shape"], values["M"])
    return Row(*head, 1.0, ratio, 2.0, ratio, "ms", "average 0.00; others 0.00 cores", note=str(values.get("note", "")))


def test_report_judges_by_the_faster_dense(tmp_path: Path) -> None:
    rows = [_row(OURS, 1.0), _row("dense bfloat16", 500.0, note="one call only, over the time cap"), _row("dense float32", 0.5)]
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
    found = {line.split("|")[6].strip(): [cell.strip() for cell in line.split("|")[13:15]] for line in text[2:]}
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


@pytest.mark.skipif(not backends.available("cpu")[0], reason="the native extension is not built")
@pytest.mark.parametrize("name", ["dequantize", "quantize", "memory"])
def test_smoke(tmp_path: Path, name: str) -> None:
    _smoke(tmp_path, name)


@pytest.mark.slow
@pytest.mark.skipif(not backends.available("cpu")[0], reason="the native extension is not built")
@pytest.mark.parametrize("name", ["gemv", "qlora_linear", "switching", "step"])
def test_smoke_of_the_longer_ones(tmp_path: Path, name: str) -> None:
    if name == "step":
        for package in ("transformers", "peft", "bitsandbytes"):
            pytest.importorskip(package)
    _smoke(tmp_path, name)


def _smoke(tmp_path: Path, name: str) -> None:
    """--small runs, its results pass their gates, and the CSV has its columns."""
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--small", "--rounds", "2", "--isa", "baseline", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["provider"] for line in lines} >= {OURS} and {line["isa"] for line in lines} == {"baseline"}
    assert all(float(line["p20"]) <= float(line["p50"]) <= float(line["p80"]) for line in lines)
