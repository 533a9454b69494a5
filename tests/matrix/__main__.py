"""`python -m tests.matrix`: patching, recipe, ops, adapters, memory and transfer with the oldest and the
newest libraries.

Makes an environment for each combination of torch, transformers and {PEFT, bitsandbytes, TRL} (oldest
supported: the lower bounds of pyproject.toml), runs the tests in each, with torch's instruction sets as they
are and, but for those marked any_isa, held to AVX2, and writes docs/compatibility.csv and
docs/compatibility.md. Lines of earlier runs stay unless this run has the same combination. The committed tree
is tested. Exit status: 0 where every run passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from . import environments, report
from .rows import (
    CAPPED,
    CAPPED_TESTS,
    ISAS,
    LIBRARIES,
    Combination,
    Result,
    combinations,
    lower_bounds,
    pairs,
)

REPOSITORY = Path(__file__).parents[2]
TESTS = (
    "tests/patching",
    "tests/finetune",
    "tests/ops",
    "tests/adapters",
    "tests/memory",
    "tests/transfer",
    "tests/test_bnb_backend.py",
    "tests/test_bnb_repacking.py",
)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 where every run passed."""
    options = _parse(argv)
    chosen = _chosen(options)
    if options.list:
        print("\n".join(f"torch {item.torch}: {' '.join(item.requirements)}" for item in chosen))
        return 0
    record = Path(options.out) / "compatibility.csv"
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        work = Path(options.work or folder).resolve()
        tree, wheel = environments.export(REPOSITORY, work)
        failed = False
        for item in chosen:
            for result in _results(item, options, work, tree, wheel):
                failed = failed or result.outcome != "passed"
                ordered = report.write(record, report.read(record), [result])
                record.with_suffix(".md").write_text(report.page(ordered))
    return int(failed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=TESTS, help=f"default: {' '.join(TESTS)}")
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="only as many combinations as let every two choices meet: 6 of 12",
    )
    parser.add_argument(
        "--only", type=int, nargs="+", help="only these, by their place in --list, counted from 1"
    )
    parser.add_argument(
        "--isa", nargs="+", choices=ISAS, default=ISAS, help="instruction sets; default: both"
    )
    parser.add_argument("--list", action="store_true", help="name the combinations, run nothing")
    parser.add_argument(
        "--work", help="folder for the environments, kept for the next run (about 7 GB for each torch)"
    )
    parser.add_argument(
        "--out", default=str(REPOSITORY / "docs"), help="folder of compatibility.csv and compatibility.md"
    )
    parser.add_argument("--workers", default="2", help="pytest-xdist's -n")
    for name in ("transformers", *LIBRARIES):
        parser.add_argument(
            f"--{name}", help=f"another oldest {name}, to try whether the lower bound could be lower"
        )
    return parser.parse_args(argv)


def _chosen(options: argparse.Namespace) -> list[Combination]:
    oldest = lower_bounds((REPOSITORY / "pyproject.toml").read_text())
    oldest |= {name: value for name in oldest if (value := getattr(options, name)) is not None}
    found = combinations(
        {name: version if version.count(".") == 2 else f"{version}.0" for name, version in oldest.items()}
    )
    found = pairs(found) if options.pairs else found
    return [found[place - 1] for place in options.only] if options.only else found


def _results(
    item: Combination, options: argparse.Namespace, work: Path, tree: Path, wheel: Path
) -> list[Result]:
    """One for each instruction set; one that says why, where the environment cannot be made."""
    try:
        python = environments.environment(item, work, wheel)
    except environments.CannotInstall as error:
        asked = dict(
            zip(
                ("torch", "transformers", *LIBRARIES),
                (item.torch, item.transformers, *item.libraries),
                strict=True,
            )
        )
        return [
            Result(
                **asked,
                python="",
                cpu=_cpu(),
                isa="",
                passed=0,
                failed=0,
                skipped=0,
                minutes=0,
                outcome=str(error),
            )
        ]
    return [_run(python, isa, options, tree) for isa in options.isa]


def _run(python: Path, isa: str, options: argparse.Namespace, tree: Path) -> Result:
    """pytest in the exported tree."""
    installed = environments.versions(python)
    outcomes = tree / "outcomes.xml"
    outcomes.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-rfEs", "-n", options.workers]
    command += [f"--junit-xml={outcomes}", *(CAPPED_TESTS if isa == "avx2" else ()), *options.tests]
    print(f"{isa}: {installed}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | (CAPPED if isa == "avx2" else {}),
        stdout=subprocess.PIPE,
        text=True,
    )
    print("\n".join(filter(_telling, done.stdout.splitlines())), flush=True)
    counts = _counts(outcomes) if outcomes.exists() else {"passed": 0, "failed": 0, "skipped": 0}
    outcome = (
        "passed"
        if done.returncode == 0
        else "failed"
        if counts["failed"]
        else f"pytest ended with status {done.returncode}"
    )
    minutes = round((time.monotonic() - started) / 60, 1)
    return Result(**installed, cpu=_cpu(), isa=isa, **counts, minutes=minutes, outcome=outcome)


def _telling(line: str) -> bool:
    return line.startswith(("FAILED", "ERROR", "SKIPPED")) or " passed" in line or " failed" in line


def _counts(outcomes: Path) -> dict[str, int]:
    suite = ElementTree.parse(outcomes).getroot().find("testsuite")
    numbers = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = numbers["failures"] + numbers["errors"]
    return {
        "passed": numbers["tests"] - failed - numbers["skipped"],
        "failed": failed,
        "skipped": numbers["skipped"],
    }


def _cpu() -> str:
    """The processor's kind, and the levels of instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "x86-64")
    vendor = next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")
    return f"{ {'GenuineIntel': 'Intel', 'AuthenticAMD': 'AMD'}.get(vendor, vendor) } {best}".strip()


if __name__ == "__main__":
    sys.exit(main())
