"""The command `peftkern`, also `python -m peftkern`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]


def _env(args: argparse.Namespace) -> int:
    from peftkern import environment

    return environment.main(args)


def _finetune(args: argparse.Namespace) -> int:
    from peftkern.finetune import cli

    return cli.main(args)


def _tune(args: argparse.Namespace) -> int:
    import torch

    from peftkern import tuning, tuning_cpu

    if args.cpu or not torch.cuda.is_available():
        return tuning_cpu.tune(forget=args.forget, busy=args.busy)
    return tuning.main(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one sub-command; returns the exit status."""
    from peftkern import __version__
    from peftkern.adapters import merge_cli
    from peftkern.adapters.arithmetic import commands as arithmetic
    from peftkern.finetune import use
    from peftkern.finetune.cli import add_arguments
    from peftkern.memory.planner import commands as planner
    from peftkern.transfer import adapt, measure, pretrain
    from peftkern.transfer.data import commands as data
    from peftkern.transfer.report import cli as report

    parser = argparse.ArgumentParser(prog="peftkern", description="Fused LoRA and 4-bit kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"peftkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    finetune = commands.add_parser("finetune", help="fine-tune a language model with LoRA on a 4-bit base")
    add_arguments(finetune)
    finetune.set_defaults(run=_finetune)
    use.add_commands(commands)
    arithmetic.add_commands(commands)
    measure.add_commands(commands)
    pretrain.add_commands(commands)
    adapt.add_commands(commands)
    report.add_commands(commands)
    merge_cli.add_commands(commands)
    data.add_commands(commands)
    planner.add_commands(commands)
    env = commands.add_parser(
        "env", help="versions, instruction sets, threads and backends, for a bug report"
    )
    env.set_defaults(run=_env)
    tune = commands.add_parser(
        "tune", help="measure on this GPU or CPU where each kernel pays, and keep the limits"
    )
    tune.add_argument("--cpu", action="store_true", help="the CPU, where there is a GPU too")
    tune.add_argument("--busy", action="store_true", help="on a CPU: also while other processes run")
    tune.add_argument("--forget", action="store_true", help="drop the measured limits")
    tune.set_defaults(run=_tune)
    args = parser.parse_args(arguments)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
