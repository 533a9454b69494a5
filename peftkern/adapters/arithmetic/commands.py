"""The sub-command `arithmetic`: adapters, or full checkpoints, added and merged by an expression."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .folders import folders_of

__all__ = ["add_commands"]

_METHODS = ("sum", "ties", "dare", "dare_ties")
_EPILOG = """examples:
  peftkern arithmetic "a + 0.5*b - c" a=runs/a b=runs/b c=runs/c --output runs/mixed
  peftkern arithmetic "0.5*(kjv + code)" --rank 16 --output mixed      (kjv and code are folders)
  peftkern arithmetic "(-a)" a=runs/toxic --output runs/less-toxic     (a leading - needs parentheses)
  peftkern arithmetic "x*(kjv + code)" --sweep x=0:1:11 --data val.txt --control other.txt --output best
  peftkern arithmetic "a + b" a=models/a b=models/b --base models/base --method ties --output models/merged
"""


def add_commands(commands: Any) -> None:
    """Add `arithmetic` to the sub-parsers of `peftkern`."""
    parser = commands.add_parser(
        "arithmetic",
        help="add, scale, negate and merge adapters or full checkpoints by an expression",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "expression",
        help='such as "a + 0.5*b - c"; names of other than letters, digits, _ and . in quotes',
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="NAME=PATH",
        help="the folder of a name; default: the folder of that name",
    )
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an adapter that this command wrote there before",
    )
    _add_merging(parser.add_argument_group("merging"))
    _add_adapters(parser.add_argument_group("adapters"))
    _add_sweep(parser.add_argument_group("which lambda (adapters)"))
    checkpoints = parser.add_argument_group("full checkpoints")
    checkpoints.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the output; default: the base's",
    )
    parser.set_defaults(run=_run)


def _add_merging(group: Any) -> None:
    group.add_argument("--method", choices=_METHODS, default="sum", help="default: sum, which is exact")
    group.add_argument(
        "--density",
        type=float,
        default=0.2,
        help="the part of all entries that TIES keeps (default: 0.2)",
    )
    group.add_argument(
        "--drop",
        type=float,
        default=0.9,
        help="the part of the entries that DARE drops (default: 0.9)",
    )
    group.add_argument("--seed", type=int, default=0, help="of DARE's drops (default: 0)")
    group.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="lambda: times the merged task vector (default: 1)",
    )


def _add_adapters(group: Any) -> None:
    group.add_argument(
        "--rank",
        type=int,
        help="the most ranks a module may have; default: the sum of the ranks",
    )
    group.add_argument(
        "--max-error",
        type=float,
        help="the fewest ranks within this relative error of each module's update",
    )
    group.add_argument(
        "--space",
        choices=("core", "weights"),
        default="core",
        help="where TIES and DARE act on adapters (default: core)",
    )
    group.add_argument(
        "--base",
        help="the base's folder: for DoRA and adapters that replace tensors; always for full checkpoints",
    )
    group.add_argument("--any-base", action="store_true", help="combine adapters that name different bases")


def _add_sweep(group: Any) -> None:
    group.add_argument(
        "--sweep",
        metavar="NAME=FROM:TO:COUNT",
        help="let NAME in the expression run over these numbers; keep the best",
    )
    group.add_argument(
        "--data",
        help="validation text for --sweep, as --eval-data of finetune: its loss is to fall",
    )
    group.add_argument("--maximize", action="store_true", help="its loss is to rise instead, as for negation")
    group.add_argument("--control", help="text whose loss must not rise by more than --budget")
    group.add_argument("--budget", type=float, default=0.05, help="part of the control loss (default: 0.05)")
    group.add_argument(
        "--model",
        help="the base to sweep on: hub id, folder or `sample`; default: the adapter's",
    )
    group.add_argument("--quantization", help="nf4, fp4 or none; default: the run's, else nf4")
    group.add_argument("--seq-length", type=int, help="tokens of a window; default: the run's, else 1024")
    group.add_argument(
        "--eval-tokens",
        type=int,
        help="most tokens of each text; default: the run's, else 32768",
    )


def _run(args: argparse.Namespace) -> int:
    """Run the command; what the user can mend is one message and status 2."""
    from ...errors import exit_status

    def run() -> None:
        _require("peft", "safetensors", "numpy", "tqdm")
        print(_combined(args))

    return exit_status("arithmetic", run, mendable=(ValueError,))


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"it needs {', '.join(missing)}: run pip install 'peftkern[finetune]'")


def _combined(args: argparse.Namespace) -> str:
    from .expression import parse
    from .rules import Method

    if args.sweep is not None:
        from .sweep_command import swept

        return swept(args)
    coefficients = parse(args.expression)
    folders = folders_of(coefficients, args.folders)
    method = Method(args.method, density=args.density, drop=args.drop, seed=args.seed, scale=args.scale)
    if any((folder / "adapter_config.json").is_file() for folder in folders.values()):
        if args.dtype:
            raise ValueError("--dtype is for full checkpoints; an adapter's sum is fp32")
        return _adapters(args, coefficients, folders, method)
    if args.base is None and any((folder / "config.json").is_file() for folder in folders.values()):
        raise ValueError(
            "--base is needed for full checkpoints: the folder of the model that they were trained from",
        )
    return _checkpoints(args, coefficients, folders, method)


def _adapters(
    args: argparse.Namespace,
    coefficients: dict[str, float],
    folders: dict[str, Path],
    method: Any,
) -> str:
    from .combine import combine
    from .lora_files import check_output, read_adapter, write_adapter

    check_output(Path(args.output), overwrite=args.overwrite)
    adapters = {name: read_adapter(folder, name) for name, folder in folders.items()}
    options = {name: getattr(args, name) for name in ("space", "rank", "max_error", "base", "any_base")}
    result = combine(coefficients, adapters, method=method, **options)
    result.adapter.record["expression"] = args.expression
    result.adapter.record["adapters"] = {name: str(folder) for name, folder in folders.items()}
    return f"{write_adapter(result.adapter, args.output, overwrite=args.overwrite)}: {result}"


def _checkpoints(
    args: argparse.Namespace,
    coefficients: dict[str, float],
    folders: dict[str, Path],
    method: Any,
) -> str:
    from .checkpoints import combine_checkpoints

    for option in ("rank", "max_error"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"--{option.replace('_', '-')} is for adapters; {next(iter(folders.values()))} is none",
            )
    if args.base is None:
        raise ValueError(
            f"{next(iter(folders.values()))} is neither an adapter that PEFT saved nor a checkpoint with a"
            " --base"
        )
    output = combine_checkpoints(
        coefficients,
        args.base,
        folders,
        args.output,
        method=method,
        dtype=args.dtype,
    )
    return f"{output}: a checkpoint of the base's shards and tokenizer"
