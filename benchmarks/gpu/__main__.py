"""GPU measurements: `python -m benchmarks.gpu` profiles a card in ten minutes; `--part NAME --out DIR` runs
one part whole, parts in `--list`.

Needs torch, Triton and a CUDA device; no network. The comparison libraries (bitsandbytes, axolotl, Liger) may
lie in a folder, `--peers`. `--device cpu --small` proves the script on any machine with tiny shapes; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PARTS", "Part", "main"]


@dataclass(frozen=True)
class Part:
    """module.function measures it. minutes: expected on an H200, not measured yet. seconds: when to stop
    it."""

    module: str
    function: str
    minutes: float
    seconds: int
    words: str


PARTS = {
    "build": Part(
        "checks",
        "build",
        3,
        540,
        "the extension in place, with the CUDA C++ kernels where nvcc is found; peftkern env",
    ),
    "warm": Part("warm", "warm", 1, 300, "Triton's cache: every variant, compiled by several processes"),
    "tests": Part("checks", "tests", 5, 540, "pytest -m gpu"),
    "sanitizer": Part("checks", "sanitizer", 7, 590, "every kernel, small: coverage, memcheck, racecheck"),
    "tune": Part(
        "checks",
        "tune",
        3,
        500,
        "peftkern tune: measures and keeps this card's limits; run it before what it decides",
    ),
    "baseline": Part("kernels", "baseline", 1, 300, "ceilings: copies and bf16 products by size"),
    "dequantize": Part(
        "kernels", "dequantize", 2, 400, "4-bit to dense: ours, Triton only, bitsandbytes, a copy"
    ),
    "quantize": Part("kernels", "quantize", 1, 300, "dense to 4-bit: ours, Triton only, bitsandbytes"),
    "decode": Part("kernels", "decode", 2, 400, "M = 1 ... 16"),
    "small": Part("kernels", "small_m", 5, 540, "M = 16 ... 512, forward and dx"),
    "linear": Part(
        "linear", "linear", 7, 590, "forward + backward against a frozen bf16 linear, PEFT, axolotl"
    ),
    "launches": Part("linear", "launches", 1, 300, "kernels a call, counted by torch.profiler"),
    "memory": Part("linear", "memory", 1, 300, "saved, held and peak bytes of a linear"),
    "step": Part(
        "step", "step", 8, 595, "an 8B-shaped Llama under a 24 GB cap: tokens/s, peak memory, longest context"
    ),
    "report": Part("report", "main", 0.2, 60, "targets, table and plots of the folder's CSVs"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--part", default="", help="one part, several with commas, or all (each then in a process of its own)"
    )
    p.add_argument(
        "--minutes", type=float, default=10, help="for the profile that runs where no part is named (10)"
    )
    p.add_argument("--list", action="store_true", help="the parts and how long each is expected to take")
    p.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the CSVs, logs and plots")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--small", action="store_true", help="tiny shapes, to try the script")
    p.add_argument(
        "--interpret",
        action="store_true",
        help="with --device cpu: also run our Triton kernels in its interpreter (slow)",
    )
    p.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only cases whose words contain it, e.g. 'dropout 0 bfloat16 4096x4096 M=8192'; | between "
        "alternatives",
    )
    p.add_argument(
        "--first-cases", action="store_true", help="of the part tests: one case of each test function"
    )
    p.add_argument(
        "--no-compile",
        action="store_true",
        help="without the peers that torch.compile makes, which takes long",
    )
    p.add_argument("--resume", action="store_true", help="keep the CSV's rows and measure only what it lacks")
    p.add_argument("--rounds", type=int, default=0, help="default 25, small 3")
    p.add_argument(
        "--budget",
        type=float,
        default=0,
        help="seconds after which a part begins no further case; default: the part's, less 60",
    )
    p.add_argument("--flush", action="store_true", help="empty the L2 before every sample")
    p.add_argument(
        "--peers",
        type=Path,
        default=Path(".peers"),
        help="folder with bitsandbytes, axolotl, liger_kernel, used if it is there",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.list:
        _print_parts()
        return 0
    if not args.part:
        if missing := _no_device(args.device):
            print(missing, file=sys.stderr)
            return 2
        from .profile import profile

        return profile(args)
    names = list(PARTS) if args.part == "all" else [name for name in args.part.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        print(f"--part: got {args.part!r}, expected all or some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported
    _add_peers(args.peers)
    if len(names) > 1:
        return _separately(names, sys.argv[1:] if arguments is None else list(arguments))
    return _one(names[0], args)


def _no_device(device: str) -> str:
    """What is wrong with the device asked for; empty where it is there."""
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return ""
    return "no CUDA device was found; --device cpu --small tries the script, with tiny shapes"


def _print_parts() -> None:
    print("part        expected min  limit s  what (expected on an H200; not measured yet)")
    for name, part in PARTS.items():
        print(f"{name:11s} {part.minutes:12g} {part.seconds:8d}  {part.words}")


def _add_peers(folder: Path) -> None:
    """For this process and the ones it starts."""
    if folder.is_dir():
        where = str(folder.resolve())
        sys.path.insert(0, where)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (where, os.environ.get("PYTHONPATH"))))


def _separately(names: Sequence[str], arguments: Sequence[str]) -> int:
    """Each part in a process of its own: one that crashes or hangs does not take the others along."""
    failed = []
    for name in names:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            *arguments,
            "--part",
            name,
        ]  # the last --part counts
        print("+", " ".join(command[1:]), flush=True)
        try:
            status = subprocess.run(command, timeout=PARTS[name].seconds + 30).returncode
        except subprocess.TimeoutExpired:
            status = 124
        if status:
            failed.append(f"{name} ({status})")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _one(name: str, args: argparse.Namespace) -> int:
    part = PARTS[name]
    os.environ["PEFTKERN_BNB_BACKEND"] = (
        "0"  # bitsandbytes runs its own kernels here; it looks when it is imported
    )
    if name == "report":
        from .report import main as write

        return write(args.out)
    import torch

    from .run import ContextLost, Run

    if missing := _no_device(args.device):
        print(f"{name}: {missing}", file=sys.stderr)
        return 2
    budget = args.budget or part.seconds - 60
    options = dict(
        device=args.device,
        small=args.small,
        rounds=args.rounds,
        budget_s=budget,
        resume=args.resume,
        only=args.only,
    )
    run = Run(name, args.out, **options, interpret=args.interpret, flush=args.flush)
    run.first_cases, run.compiled = args.first_cases, not args.no_compile
    run.note_clocks("before")
    measure = getattr(importlib.import_module(f"{__package__}.{part.module}"), part.function)
    print(f"{name}: {part.words}; rows go to {run.path}", flush=True)
    # A stream of its own: what is captured into a graph, its backward included, must not be on the default
    # stream.
    with torch.cuda.stream(torch.cuda.Stream()) if run.cuda else contextlib.nullcontext():
        try:
            measure(run)
        except ContextLost as lost:
            print(lost, file=sys.stderr)
            return 3
    run.note_clocks("after")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
