"""Every benchmark in a process of its own, one after the other, into CSVs under a folder, then the report and
its plot."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import report

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS = (
    "dequantize",
    "quantize",
    "gemv",
    "qlora_linear",
    "switching",
    "memory",
    "step",
    "linear_cross_entropy",
    "blocks",
    "tiled_mlp",
    "attention",
    "options",
    "option_steps",
    "bottleneck",
    "forgetting",
    "generate",
)


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--small", action="store_true", help="smoke sizes")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the CSVs, the table and the plot: benchmarks/results/<device>",
    )
    p.add_argument(
        "--isa", action="append", help="measure on this level too (repeatable); default: the best one"
    )
    p.add_argument("--only", nargs="*", choices=BENCHMARKS, default=BENCHMARKS)
    args = p.parse_args(arguments)
    failed = []
    for isa in args.isa or [None]:
        for name in args.only:
            out = args.out / f"{name}{f'-{isa}' if isa else ''}.csv"
            out.unlink(missing_ok=True)
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--out", str(out)]
            command += ["--small"] * args.small + (["--isa", isa] if isa else [])
            print("+", " ".join(command[1:]), flush=True)
            if subprocess.run(command, env=os.environ | {"PEFTKERN_BNB_BACKEND": "0"}).returncode:
                failed.append(f"{name} {isa or ''}".strip())
    report.main([str(args.out)])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
