"""The ten-minute profile of a card, proven without one: its plan, what it does when a stage fails or hangs,
its pytest plugin, and the arguments that stand for a launch's."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import outcomes, profile, run
from benchmarks.gpu.__main__ import PARTS, main, parser
from benchmarks.gpu.profile import STAGES, command, deadlines

ROOT = Path(__file__).parents[1]


def _arguments(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def test_the_stages_share_the_minutes() -> None:
    assert sum(stage.seconds for stage in STAGES) == 600
    ends = deadlines(10)
    assert list(ends) == [stage.part for stage in STAGES] and ends["report"] == pytest.approx(600)
    assert list(ends.values()) == sorted(ends.values())
    assert deadlines(5)["linear"] == pytest.approx(ends["linear"] / 2)
    assert all(stage.part in PARTS for stage in STAGES)


def test_a_stage_is_a_part_s_command_line() -> None:
    (linear,) = (stage for stage in STAGES if stage.part == "linear")
    words = command(linear, _arguments("--out", "x", "--peers", "p", "--flush"), 100.0)
    parsed = parser().parse_args(words[3:])
    assert (parsed.part, parsed.out, parsed.peers, parsed.budget) == ("linear", Path("x"), Path("p"), 88.0)
    assert parsed.flush and parsed.no_compile and parsed.rounds == 9 and parsed.only == linear.only
    small = parser().parse_args(command(linear, _arguments("--device", "cpu", "--small"), 100.0)[3:])
    assert small.small and small.device == "cpu" and not small.only


def test_every_alternative_names_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parts' own cases, as on a GPU; nothing is measured."""
    monkeypatch.setenv("PEFTKERN_BNB_BACKEND", "0")
    names = {"dequantize": 4, "decode": 6, "linear": 9, "memory": None}
    for stage in STAGES:
        if stage.part not in names:
            continue
        part = importlib.import_module(f"benchmarks.gpu.{PARTS[stage.part].module}")
        here = run.Run(stage.part, tmp_path, device="cpu", only=stage.only)
        here.cuda = True
        seen: list[str] = []
        monkeypatch.setattr(here, "wanted", lambda case, seen=seen: bool(seen.append(case.id)))
        for name in ("weights", "Problem", "steps"):
            monkeypatch.setattr(part, name, lambda *_, **__: {}, raising=False)
        getattr(part, PARTS[stage.part].function)(here)
        chosen = {words: [case for case in seen if words in case] for words in stage.only.split("|")}
        assert all(chosen.values()), [words for words, cases in chosen.items() if not cases]
        if names[stage.part]:
            assert sum(map(len, chosen.values())) == names[stage.part]


def test_alternatives_select(tmp_path: Path) -> None:
    here = run.Run("linear", tmp_path, device="cpu", only="4096x4096 M=2048|M=512")
    wanted = [here.wanted(run.Case("linear", "r 16", n=4096, k=4096, m=m)) for m in (2048, 512, 256)]
    assert wanted == [True, True, False]


@pytest.mark.parametrize("failing", [None, "tests", "warm"])
def test_a_stage_that_fails_or_hangs_leaves_the_others(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran: list[str] = []

    def fake(words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        part = words[words.index("--part") + 1]
        assert timeout > 0
        ran.append(part)
        if part == failing == "warm":
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, 2 if part == failing else 0)

    monkeypatch.setattr(profile.subprocess, "run", fake)
    words = ("--device", "cpu", "--small", "--out", str(tmp_path))
    assert profile.profile(_arguments(*words)) == bool(failing)
    assert ran == [stage.part for stage in STAGES]
    said = capsys.readouterr()
    assert (f"not done: {failing} (" in said.err) == bool(failing) and "== linear: done" in said.out
    assert ("its rows so far are kept" in said.err) == (failing == "warm")


def test_a_row_that_says_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    here = run.Run("tests", tmp_path, device="cpu")
    here.add(run.Case("tests", "pytest -m gpu"), "seconds", note="error: exit status 1, see tests.log")
    monkeypatch.setattr(profile.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0))
    assert profile.profile(_arguments("--device", "cpu", "--small", "--out", str(tmp_path), "--resume")) == 1
    assert "not done: tests (rows with errors: 1)" in capsys.readouterr().err


def test_a_stage_without_time_is_not_begun(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(profile.subprocess, "run", lambda *_, **__: pytest.fail("begun"))
    assert profile.profile(_arguments("--device", "cpu", "--small", "--minutes", "0.01")) == 1
    assert "build (no time left)" in capsys.readouterr().err


def test_without_arguments_and_without_a_gpu_one_message(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present: it would be profiled")
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "no CUDA device was found; --device cpu --small" in said.err


TESTS = """
import os, pytest
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_many(m, backend): assert m < 3
def test_fails(): assert False
def test_skips(): pytest.skip("")
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
def test_last(): os._exit(1) if os.environ.get("CRASH") else None
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"PEFTKERN_FIRST_CASES": "1"}, {"passed": 3, "failed": 1, "error": 1, "skipped": 1}),
        ({"PEFTKERN_FIRST_CASES": "0", "CRASH": "1"}, {"passed": 4, "failed": 3, "error": 1, "skipped": 1}),
    ],
)
def test_outcomes_are_kept_also_of_a_run_that_ends_early(
    tmp_path: Path, changes: dict, expected: dict
) -> None:
    """The second run's process is gone before its last test ends."""
    (tmp_path / "test_it.py").write_text(TESTS)
    written = tmp_path / "outcomes"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PEFTKERN_OUTCOMES": str(written), **changes}
    words = ["-m", "pytest", "-q", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider", "test_it.py"]
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert outcomes.counts(written) == expected
    assert outcomes.counts(tmp_path / "none") == dict.fromkeys(expected, 0)


WARM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 86, 32)
driver.set_active(Driver())
from benchmarks.gpu import warm
from peftkern.ops.rope import triton as rope
from peftkern.runtime.launch import Call
module, name = next(v for v in warm.variants(86) if v[0].endswith("rope.triton"))
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["key"])
warm.compile_variant(module, name, 86)
spec = next(s for s in rope.specializations(86) if s.name == name)
arguments = warm.arguments(spec)
other = {k: v + 16 if type(v) is int and k not in spec.constexprs else v for k, v in arguments.items()}
spec.kernel.run(**other, num_warps=spec.num_warps, num_stages=spec.num_stages, grid=(7,), warmup=True)
assert len(compiled) == 1, compiled
pointer = next(k for k, v in arguments.items() if isinstance(v, warm.Pointer))
other[pointer] = warm.Pointer(arguments[pointer].dtype, False)
spec.kernel.run(**other, num_warps=spec.num_warps, num_stages=spec.num_stages, grid=(7,), warmup=True)
assert len(compiled) == 2, compiled
"""


@pytest.mark.slow
def test_a_variant_compiled_before_is_found_by_a_launch(tmp_path: Path) -> None:
    """Triton's own look-up, told of a card of 8.6: other sizes of the same kind find what is there, a pointer
    that is not aligned does not. In a process without the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed here")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WARM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.cubin"))


@pytest.mark.slow
def test_the_profile_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every stage in its process; the GPU's own say that they are skipped."""
    words = ["-m", "benchmarks.gpu", "--device", "cpu", "--small", "--minutes", "15", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {stage.part: run.read_rows(tmp_path / f"{stage.part}.csv") for stage in STAGES[:-1]}
    assert all(rows.values()) and (tmp_path / "report.md").exists()
    assert not [row for part in rows.values() for row in part if row["note"].startswith("error")]
    assert "skipped" in rows["warm"][0]["note"]
    told = {row["provider"]: row["p50"] for row in rows["tests"] if row["unit"] == "tests"}
    assert told["failed"] == told["error"] == "0"
