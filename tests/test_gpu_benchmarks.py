"""The GPU benchmarks, proven on the CPU: what is wrong is a row with its error, a stopped part goes on,
targets are judged; a smoke run."""

from __future__ import annotations

import ast
import csv
import importlib.util
import math
import os
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, every_kernel, report, timing
from benchmarks.gpu.__main__ import PARTS, main
from benchmarks.gpu.run import DENSE, NO_DROPOUT, Case, ContextLost, Row, Run, read_rows
from benchmarks.gpu.timing import Candidate, Ceilings, measure, rotating, skipped
from benchmarks.harness import OURS

ROOT = Path(__file__).parents[1]
CASE = Case("linear", "r 16, dropout 0", n=4096, k=4096, m=2048)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when a call says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "ceilings", lambda run: Ceilings(copy_gb_s=1000.0, gemm_tflop_s=100.0))
    return now


def _run(tmp_path: Path, part: str = "linear", **options: object) -> Run:
    return Run(part, tmp_path, device="cpu", small=True, **options)


def _candidate(
    clock: list[float], name: str, seconds: float, moved: int = 0, flops: int = 0, result: object = None
) -> Candidate:
    def call() -> object:
        clock[0] += seconds
        return result

    def check(got: object) -> None:
        if got == "wrong":
            raise AssertionError("relative error 1.0")

    return Candidate(name, call, check, moved, flops)


def _rows(run: Run) -> dict[str, dict[str, str]]:
    return {row["provider"]: row for row in read_rows(run.path)}


def test_a_wrong_provider_is_refused_and_the_others_are_timed(tmp_path: Path, clock: list[float]) -> None:
    run = _run(tmp_path, rounds=4)
    broken = _candidate(clock, "broken", 1e-3, result="wrong")
    measure(
        run,
        CASE,
        {
            "broken": lambda: broken,
            "raising": lambda: 1 / 0,
            "absent": skipped("axolotl is not installed"),
            OURS: lambda: _candidate(clock, OURS, 2e-3, moved=10**9, flops=10**11),
            DENSE: lambda: _candidate(clock, DENSE, 1e-3),
        },
    )
    rows = _rows(run)
    assert list(rows) == ["broken", "raising", "absent", OURS, DENSE]
    assert (
        rows["broken"]["note"] == "error: AssertionError: relative error 1.0" and rows["broken"]["p50"] == ""
    )
    assert (
        rows["raising"]["note"].startswith("error: ZeroDivisionError")
        and rows["absent"]["note"] == "skipped: axolotl is not installed"
    )
    ours, dense = rows[OURS], rows[DENSE]
    assert [float(ours[p]) for p in ("p20", "p50", "p80")] == pytest.approx([2.0] * 3)
    assert float(ours["percent_bandwidth"]) == pytest.approx(50.0)  # 1 GB in 2 ms, of 1000 GB/s
    assert float(ours["percent_gemm"]) == pytest.approx(50.0)  # 0.1 TFLOP in 2 ms, of 100 TFLOP/s
    assert float(dense["ratio"]) == pytest.approx(0.5) and dense["percent_bandwidth"] == ""
    assert (dense["what"], dense["mode"], dense["shape"], dense["M"], dense["unit"]) == (
        "linear",
        CASE.mode,
        "4096x4096",
        "2048",
        "ms",
    )
    assert "peftkern" in dense["versions"] and dense["device"]


def test_a_rotation_is_checked_in_every_place_and_timed_by_the_call(
    tmp_path: Path, clock: list[float]
) -> None:
    def call(result: str) -> str:
        clock[0] += 1e-3
        return result

    run, check = _run(tmp_path, rounds=2), _candidate(clock, "", 0).check
    good, bad = ["right"] * 4, ["right", "right", "wrong", "right"]
    factories = {
        name: lambda name=name, results=results: rotating(name, [lambda r=r: call(r) for r in results], check)
        for name, results in ((OURS, good), ("third is wrong", bad))
    }
    measure(run, CASE, factories)
    assert float(_rows(run)[OURS]["p50"]) == pytest.approx(1.0)
    assert _rows(run)["third is wrong"]["note"].startswith("error")


def test_rounds_interleave_and_turn(tmp_path: Path, clock: list[float]) -> None:
    order: list[str] = []
    factories = {}
    for name in (OURS, "b", "c"):
        candidate = _candidate(clock, name, 5e-3)
        factories[name] = lambda c=candidate: Candidate(
            c.name, lambda: (order.append(c.name), c.call()), c.check
        )
    measure(_run(tmp_path, rounds=3), CASE, factories)
    assert order[6:] == [
        OURS,
        "b",
        "c",
        "b",
        "c",
        OURS,
        "c",
        OURS,
        "b",
    ]  # after a check and a look at the time of each


def test_a_lost_context_ends_the_part_with_its_row_kept(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(tmp_path)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails() -> Candidate:
        monkeypatch.setattr(run, "sync", lost)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ContextLost, match="--resume"):
        measure(run, CASE, {"faulty": fails, OURS: lambda: _candidate(clock, OURS, 1e-3)})
    assert list(_rows(run)) == ["faulty"]
    resumed = _run(tmp_path, resume=True)
    assert not resumed.wanted(CASE) and resumed.wanted(
        Case("linear", "r 64, dropout 0", n=4096, k=4096, m=2048)
    )


def test_resume_keeps_what_was_timed_and_a_new_run_drops_it(tmp_path: Path, clock: list[float]) -> None:
    first = _run(tmp_path)
    measure(first, CASE, {OURS: lambda: _candidate(clock, OURS, 1e-3)})
    cut_off = Case("linear", "r 64, dropout 0", n=4096, k=4096, m=2048)
    first.add(cut_off, "absent", note="skipped: axolotl is not installed")
    resumed = _run(tmp_path, resume=True)
    assert not resumed.wanted(CASE) and resumed.wanted(cut_off)
    assert measure(resumed, CASE, {OURS: lambda: 1 / 0}) == [] and len(read_rows(resumed.path)) == 2
    assert not _run(tmp_path).path.exists()


def test_over_the_budget_nothing_begins_and_a_row_says_so(tmp_path: Path) -> None:
    run = _run(tmp_path, budget_s=-1.0)
    assert measure(run, CASE, {OURS: lambda: 1 / 0}) == []
    (row,) = read_rows(run.path)
    assert row["note"].startswith("not measured: over") and row["p50"] == ""
    assert _run(tmp_path, resume=True).wanted(CASE)


def test_only_selects_by_words(tmp_path: Path) -> None:
    run = _run(tmp_path, only="4096x4096 M=2048")
    assert run.wanted(CASE) and not run.wanted(Case("linear", CASE.mode, n=4096, k=4096, m=512))


def test_copies_exceed_the_cache(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.__dict__["l2_bytes"] = 60 << 20  # an H200's
    assert run.copies(8_650_000) * 8_650_000 >= 2 * (60 << 20)
    assert run.copies(1 << 30) == 2 and run.copies(1) == 64


def _line(provider: str, ratio: float = 1.0, **changes: str) -> dict[str, str]:
    base = {field.name: "" for field in fields(Row)}
    base |= dict(
        device="Test GPU",
        versions="peftkern 0",
        what="linear",
        mode="r 16, dropout 0",
        dtype="bfloat16",
        shape="4096x4096",
    )
    base |= dict(
        M="8192", timed="eager", provider=provider, p20="1", p50="1", p80="1", unit="ms", ratio=f"{ratio}"
    )
    return base | changes


def _write(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _judged(lines: list[dict[str, str]]) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.target_table(lines).splitlines()[2:]
    ]
    return {row[0]: row[1:] for row in cells}


def test_targets_are_judged_by_the_worst_row() -> None:
    dropped = dict(mode="r 16, dropout 0.1", M="2048")
    decoding = dict(what="decode", mode="nested", timed="graph", M="4")
    lines = [
        _line(DENSE, 1 / 1.10),
        _line(DENSE, 1 / 1.20, shape="14336x4096"),
        _line(DENSE, 1 / 1.24, M="2048"),
        _line(NO_DROPOUT, 1 / 1.01, **dropped),
        _line("bitsandbytes", 1.5, **decoding),
        _line("bitsandbytes", 1.2, **decoding | dict(timed="eager")),
        _line(OURS, percent_bandwidth="69", **decoding),
        _line(OURS, what="launches", mode="linear, r 16, dropout 0", timed="", p50="7", unit="kernels"),
        _line(OURS, what="launches", mode="linear, r 16, dropout 0.1", timed="", p50="9", unit="kernels"),
        _line(OURS, what="launches", mode="dequantize", timed="", p50="2", unit="operators"),
        _line(OURS, what="memory", mode="saved, r 16, dropout 0", timed="", p50="100"),
        _line(OURS, what="memory", mode="saved, r 16, dropout 0.1", timed="", p50="164"),
    ]
    judged = _judged(lines)
    assert judged["QLoRA linear ÷ frozen bf16, M = 8192 ≤ 1.12"] == [
        "1.2",
        "14336x4096 M=8192",
        "2",
        "NO (1 do)",
    ]
    assert judged["QLoRA linear ÷ frozen bf16, M = 2048 ≤ 1.25"][3] == "yes"
    assert judged["dropout 0.1 ÷ no dropout ≤ 1.02"][::3] == ["1.01", "yes"]
    assert judged["decode ≥ 1.3 x bitsandbytes"] == ["1.5", "4096x4096 M=4", "1", "yes"]
    assert judged["decode ≥ 70 % of copy, M = 1 ... 8"][::3] == ["69", "NO (0 do)"]
    assert judged["launches forward + backward ≤ 7, dropout 0"][::3] == ["7", "yes"]
    assert judged["launches forward + backward ≤ 8, dropout 0.1"][::3] == ["9", "NO (0 do)"]
    assert judged["dequantize in one launch"][3] == "not measured"  # operators of a CPU run are no launches
    assert judged["dropout saves no extra bytes (MB)"][::3] == ["64", "NO"]
    assert judged["dx ≥ 1.3 x bitsandbytes, M = 32 ... 256"][3] == "not measured"


def test_report_writes_targets_rows_failures_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(tmp_path) == 1 and "benchmarks.gpu --part all" in capsys.readouterr().out
    _write(
        tmp_path / "linear.csv",
        [_line(OURS), _line(DENSE, 0.9), _line("faulty", p50="", note="error: wrong | value")],
    )
    assert report.main(tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert (
        "Test GPU; peftkern 0." in text
        and "Failed:" in text
        and "| not measured |" in text
        and "wrong / value" in text
    )
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "linear.png").read_bytes()[:4] == b"\x89PNG"


def test_build_takes_the_cuda_kernels_where_nvcc_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CUDA_FOLDERS", ())
    environment, words = checks.build_environment({"PATH": str(tmp_path)})
    assert "PEFTKERN_CUDA" not in environment and "not measured" in words
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    environment, words = checks.build_environment({"PATH": str(nvcc.parent)})
    assert (
        environment["PEFTKERN_CUDA"] == "1"
        and environment["CUDA_HOME"] == str(tmp_path / "cuda")
        and str(nvcc) in words
    )


def test_every_kernel_of_the_sources_is_looked_for() -> None:
    """The names are read by pattern: as many as the sources have, and only a launched kernel's own name
    counts."""
    cuda, triton = every_kernel.source_kernels()
    sources = [p.read_text() for p in (ROOT / "csrc" / "cuda").rglob("*.cu")]
    assert len(cuda) == sum(text.count("__global__ void") for text in sources)
    trees = [ast.parse(p.read_text()) for p in (ROOT / "peftkern" / "ops").rglob("triton*.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    jitted = {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}
    assert triton == {name for name in jitted if name.endswith("_kernel")}
    names = sorted(cuda | triton)
    assert every_kernel.missing(set()) == (cuda, triton)
    assert every_kernel.missing({f"void pk::{name}<__nv_bfloat16, 4>(int)" for name in names}) == (
        set(),
        set(),
    )
    assert every_kernel.missing({f"{name}_other" for name in names}) == (cuda, triton)


def test_command_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PARTS) and "not measured yet" in listed
    assert all(part.seconds <= 600 and part.minutes * 60 < part.seconds for part in PARTS.values())
    readme = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    assert all(
        f"timeout {part.seconds:3d} python -m benchmarks.gpu --part {name} " in readme
        for name, part in PARTS.items()
    )
    assert main(["--part", "nonsense"]) == 2 and "expected all or some of" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert (
            main(["--part", "linear", "--out", str(tmp_path)]) == 2
            and "no CUDA device" in capsys.readouterr().err
        )


DRIVER = """
import sys
from benchmarks.gpu.__main__ import main
from benchmarks.gpu import every_kernel, layers
for part in sys.argv[2:]:
    assert main(["--part", part, "--device", "cpu", "--small", "--rounds", "2", "--out", sys.argv[1]]) == 0
print(every_kernel.run_all("cpu", quick=True), "calls")
"""
BREAK = """
import sys
from benchmarks.gpu.__main__ import main
from benchmarks.gpu import layers
right = layers.qlora_linear
def measure(name, wrong):
    layers.qlora_linear = wrong
    options = ["--device", "cpu", "--small", "--rounds", "1", "--only", "r 16"]
    options += ["--out", f"{sys.argv[1]}/{name}"]
    assert main(["--part", "linear", *options]) == 0
measure("scaled", lambda *a, **k: right(*a, **k) * 1.02)
measure("undropped", lambda *a, **k: right(*a, **k | dict(dropout_p=0.0)))
print("0 calls")
"""


def _drive(tmp_path: Path, program: str, *parts: str) -> None:
    """In a process of its own: bitsandbytes must be imported with our hook off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path), *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " calls" in done.stdout, done.stdout + done.stderr


def _smoke(tmp_path: Path, *parts: str) -> dict[str, list[dict[str, str]]]:
    _drive(tmp_path, DRIVER, *parts)
    found = {part: read_rows(tmp_path / f"{part}.csv") for part in parts}
    for rows in found.values():
        assert not [row for row in rows if row["note"].startswith("error")]
        timed = [row for row in rows if row["p50"]]
        assert timed and all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in timed)
    return found


def _provided(rows: list[dict[str, str]], what: str) -> set[str]:
    return {row["provider"] for row in rows if row["what"] == what and row["p50"]}


def test_smoke(tmp_path: Path) -> None:
    found = _smoke(tmp_path, "baseline", "dequantize", "decode", "linear", "memory")
    ceilings = {row["unit"]: float(row["p50"]) for row in found["baseline"] if row["what"] == "ceiling"}
    assert ceilings.keys() == {"GB/s", "TFLOP/s"} and min(ceilings.values()) > 0
    assert {OURS, "copy"} <= _provided(found["dequantize"], "dequantize")
    assert {OURS, "dense bf16"} <= _provided(found["decode"], "decode")
    assert {OURS, DENSE, NO_DROPOUT, f"{OURS}, fp32 adapters"} <= _provided(found["linear"], "linear")
    shares = [
        float(row["percent_bandwidth"]) for row in found["decode"] if row["provider"] == OURS and row["p50"]
    ]
    assert shares and all(math.isfinite(share) and share > 0 for share in shares)
    skips = {row["provider"] for row in found["linear"] if row["note"].startswith("skipped")}
    assert f"{OURS}, Triton only" in skips
    saved = {row["mode"]: float(row["p50"]) for row in found["memory"] if row["provider"] == OURS}
    assert saved["saved, r 16, dropout 0.1"] - saved["saved, r 16, dropout 0"] == pytest.approx(
        8e-6, abs=1e-6
    )  # the seed


def test_a_wrong_linear_is_refused(tmp_path: Path) -> None:
    """With the real checks: 2 % off in y and every gradient; and a mask that is not applied, which only the
    dropout's cases can show."""
    _drive(tmp_path, BREAK)
    for name, cases in (
        ("scaled", {"r 16, dropout 0", "r 16, dropout 0.1"}),
        ("undropped", {"r 16, dropout 0.1"}),
    ):
        rows = [row for row in read_rows(tmp_path / name / "linear.csv") if row["provider"] == OURS]
        assert {
            row["mode"] for row in rows if "plain PyTorch's allows" in row["note"] and not row["p50"]
        } == cases
        assert {row["mode"] for row in rows if row["p50"]} == {"r 16, dropout 0", "r 16, dropout 0.1"} - cases


def test_bytes_of_the_launch_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the activations read once each way, less than every one of them read five times."""
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", "0")
    from benchmarks.gpu import layers

    monkeypatch.setattr(layers, "has", lambda *packages: False)
    problem = layers.Problem(layers.weights("cpu", 128, 192, torch.bfloat16), 600, 16, 0.1)
    once = problem.x.nbytes * 2 + problem.dy.nbytes * 2
    assert once < layers._planned_bytes(problem) < 5 * once


@pytest.mark.slow
def test_smoke_of_the_longer_ones(tmp_path: Path) -> None:
    for package in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    found = _smoke(tmp_path, "quantize", "small", "launches", "step")
    assert {OURS, "bitsandbytes"} <= _provided(found["quantize"], "quantize") & _provided(
        found["small"], "small"
    )
    assert {OURS, DENSE} <= _provided(found["launches"], "launches")
    assert {OURS, "PEFT + bitsandbytes"} <= _provided(found["step"], "step")
