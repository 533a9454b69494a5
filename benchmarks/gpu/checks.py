"""The parts that build and prove before anything is timed: build, tests, compute-sanitizer; and tune, which
keeps the card's limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .run import Case, Run, device_name

__all__ = ["build", "build_environment", "find_tool", "sanitizer", "tests", "tune"]

ROOT = Path(__file__).parents[2]
GPU_TESTS = ("tests/cuda", "tests/triton", "tests/memory")
PROCESSES = max(1, min(14, (os.cpu_count() or 1) - 2))
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def find_tool(name: str, environment: Mapping[str, str]) -> str | None:
    """A CUDA tool on the PATH, under CUDA_HOME, or in the usual folders."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    folders = [environment.get("PATH", ""), *([f"{home}/bin"] if home else []), *CUDA_FOLDERS]
    return shutil.which(name, path=os.pathsep.join(folders))


def build_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment of the build, and in words whether the CUDA C++ kernels are in it."""
    nvcc = find_tool("nvcc", environment)
    if nvcc is None:
        return dict(environment), "nvcc was not found: the CUDA C++ kernels are not built and not measured"
    home = str(Path(nvcc).resolve().parents[1])
    path = os.pathsep.join((str(Path(nvcc).parent), environment.get("PATH", "")))
    return {
        **environment,
        "PEFTKERN_CUDA": "1",
        "CUDA_HOME": environment.get("CUDA_HOME", home),
        "PATH": path,
    }, f"CUDA C++ with {nvcc}"


def _command(
    run: Run, case: Case, words: Sequence[str], environment: Mapping[str, str], log: str, limit_s: float
) -> tuple[int, str]:
    """Run a command from the repository's root, keep its output as a file; (status, output). A row says how
    long it took."""
    start = time.monotonic()
    path = run.out / log
    with path.open("w") as file:
        try:
            status = subprocess.run(
                words, cwd=ROOT, env=dict(environment), stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
    seconds = time.monotonic() - start
    note = {0: "ok", 124: f"error: over {limit_s:.0f} s, stopped"}.get(
        status, f"error: exit status {status}, see {log}"
    )
    run.add(case, "seconds", p20=seconds, p50=seconds, p80=seconds, unit="s", note=note)
    return status, path.read_text(errors="replace")


def build(run: Run) -> None:
    """The extension in place, with the CUDA code where nvcc is found; then `peftkern env`."""
    environment, words = build_environment(os.environ)
    print(words, flush=True)
    if not run.cuda:  # what is there serves the CPU already
        return _environment(run, environment)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output = _command(
        run, Case("build", words, "", timed=""), command, environment, "build.log", run.budget_s
    )
    print(output[-3000:], flush=True)
    # Triton's kernels and the CPU's can be measured without it
    if status and environment.get("PEFTKERN_CUDA") == "1":
        environment["PEFTKERN_CUDA"] = "0"
        _command(
            run,
            Case("build", "without CUDA C++", "", timed=""),
            command,
            environment,
            "build-without-cuda.log",
            120,
        )
    _environment(run, environment)


def _environment(run: Run, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "peftkern", "env"]
    _, output = _command(run, Case("env", "", "", timed=""), command, environment, "env.txt", 120)
    print(output, flush=True)


def tests(run: Run) -> None:
    """pytest -m gpu on the device; log and outcomes stay beside the CSV, also of a run that is stopped. On a
    CPU, where all of them are skipped, one file."""
    from .outcomes import counts

    outcomes = run.out / "tests.outcomes"
    changes = {"PEFTKERN_OUTCOMES": str(outcomes), "PEFTKERN_FIRST_CASES": str(int(run.first_cases))}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    # In processes, as compiling the kernels is what takes the time; each has a CUDA context of half a GB.
    where = (*GPU_TESTS, "-n", str(PROCESSES)) if run.cuda else ("tests/triton/test_device.py",)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *where, "-p", "benchmarks.gpu.outcomes"]
    command += ["-q", "-rs", "--durations=15"]
    case = Case("tests", "pytest -m gpu", "", timed="")
    status, output = _command(run, case, command, environment, "tests.log", run.budget_s)
    print(output[-6000:], flush=True)
    for name, count in counts(outcomes).items():
        run.add(case, name, p20=count, p50=count, p80=count, unit="tests")
    if status == 5:
        run.add(case, "passed", note="error: no test is marked gpu")


def sanitizer(run: Run) -> None:
    """compute-sanitizer's memcheck and racecheck over every kernel, small; and which kernels that script does
    not reach."""
    script = [sys.executable, "-m", "benchmarks.gpu.every_kernel", "--device", run.device, "--quick"]
    case = Case("sanitizer", "coverage", "", timed="")
    status, output = _command(run, case, [*script, "--names"], os.environ, "every_kernel.log", 300)
    print(output[-2000:], flush=True)
    if status == 0:
        _coverage(run, json.loads(output.strip().splitlines()[-1]))
    checker = find_tool("compute-sanitizer", os.environ)
    for tool in ("memcheck", "racecheck"):
        case = Case("sanitizer", tool, "", timed="")
        if checker is None:
            run.add(case, "compute-sanitizer", note="skipped: compute-sanitizer was not found")
            continue
        # Without the caching allocator every tensor has bounds of its own that memcheck can see.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        words = [checker, "--tool", tool, "--error-exitcode", "9", "--print-limit", "50", *script]
        _in_shards(run, case, words, environment, tool)


def _in_shards(run: Run, case: Case, words: Sequence[str], environment: Mapping[str, str], tool: str) -> None:
    """The script in several processes, as a checker loads and slows every kernel; a row each."""

    def one(shard: int) -> None:
        name = f"{tool}-{shard}.log"
        _, output = _command(run, case, [*words, "--shard", f"{shard}/{PROCESSES}"], environment, name, 240)
        print(output[-1000:], flush=True)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(one, range(PROCESSES)))


def _coverage(run: Run, found: Mapping[str, object]) -> None:
    for language, key in (("Triton", "missing_triton"), ("CUDA C++", "missing_cuda")):
        names = found[key]
        count = float(len(names))
        note = "not built" if language != "Triton" and not found["cuda_built"] else ", ".join(names)
        case = Case("sanitizer", f"{language} kernels never launched", "", timed="")
        run.add(case, "every_kernel", p20=count, p50=count, p80=count, unit="kernels", note=note)


def tune(run: Run) -> None:
    """`peftkern tune`: its output, its file, and its timings as rows."""
    from peftkern.ops.linear import tuned

    case = Case("tune", "limits", timed="")
    status, output = _command(
        run, case, [sys.executable, "-m", "peftkern", "tune"], os.environ, "tune.log", 480
    )
    print(output[-4000:], flush=True)
    path = tuned.path(device_name(run.device))
    if status or not path.exists():
        return
    shutil.copy(path, run.out / "tune.json")
    stored = json.loads(path.read_text())
    for key, ms in stored["milliseconds"].items():
        what, m, variant = key.split("/")
        run.add(Case("tune", what, m=int(m), timed="eager"), variant, p20=ms, p50=ms, p80=ms)
    run.add(case, "row", note=json.dumps(stored["config"]))
