"""What a version of Triton makes of our kernels: each is compiled for a few architectures, and its cubin is
held to what it promises; no GPU takes part.

python -m tests.cubins                               # with the Triton that is installed
python -m tests.cubins --triton 3.6.0 3.7.1          # with these, each fetched into a folder of its own
python -m tests.cubins --all --arch 75 80 86 89 90 100 120 --processes 8     # every variant
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peftkern.files import cache_dir

from . import harness
from .checks import broken_promises
from .worker import Job

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
ARCHS = (86, 89, 90)  # mma.sync with the least shared memory, a 4090's, and wgmma


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(given)
    if not args.triton:
        return _here(args)
    failed = []
    for version in args.triton:
        try:
            folder = _fetched(version, args.folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(version)
            continue
        if _with(folder, args):
            failed.append(version)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cubins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--triton", nargs="+", metavar="VERSION", help="versions to fetch and to compile with"
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="compute capabilities")
    parser.add_argument("--all", action="store_true", help="every variant, not each kernel's main one alone")
    parser.add_argument("--kernel", default="", help="only kernels whose name holds this")
    parser.add_argument("--processes", type=int, default=1)
    kept = cache_dir() / "triton"
    parser.add_argument(
        "--folder", type=Path, default=kept, help=f"where versions are kept (default: {kept})"
    )
    return parser


def _fetched(version: str, folder: Path) -> Path:
    """The folder of a version; pip fills it where it is not there yet. RuntimeError where pip cannot."""
    target = folder / version
    if not (target / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise RuntimeError(f"--triton: pip cannot install {version} ({last})")
    return target


def _with(folder: Path, args: argparse.Namespace) -> int:
    """This command in a process that finds that folder's Triton first."""
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    words = ["--arch", *map(str, args.arch), "--kernel", args.kernel, "--processes", str(args.processes)]
    command = [sys.executable, "-m", "tests.cubins", *words, *(["--all"] if args.all else [])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def _here(args: argparse.Namespace) -> int:
    wanted = [
        job
        for job in harness.jobs(harness.modules(), args.arch)
        if (args.all or job.main) and args.kernel in job.kernel
    ]
    version = importlib.metadata.version("triton")
    archs = ", ".join(f"sm_{arch}" for arch in args.arch)
    print(f"Triton {version}: {len(wanted)} variants for {archs}", flush=True)
    broken = _broken(wanted, args.processes)
    for job, words in broken.items():
        print(f"{job.id}: {words}", flush=True)
    print(f"Triton {version}: {len(wanted) - len(broken)} of {len(wanted)} are as promised")
    return 1 if broken or not wanted else 0


def _broken(wanted: Sequence[Job], processes: int) -> dict[Job, str]:
    """What is wrong with each variant that did not compile, or is not what it promises."""
    broken: dict[Job, str] = {}
    with harness.Compiler(processes) as compiler:
        compiler.submit(wanted)
        for job in wanted:
            try:
                found = broken_promises(harness.specialization(job), compiler.facts(job))
            except RuntimeError as error:
                found = [f"not compiled: {error}"]
            if found:
                broken[job] = "; ".join(found)
    return broken


if __name__ == "__main__":
    sys.exit(main())
