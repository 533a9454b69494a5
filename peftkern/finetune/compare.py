"""The same steps on plain PEFT and bitsandbytes, in a process of their own, and both results side by side."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from ..files import write_json
from .config import FinetuneConfig
from .recipe import FinetuneResult
from .signals import stop_signals

__all__ = ["compare", "run_stock", "table"]


def compare(config: FinetuneConfig, ours: FinetuneResult) -> str:
    """Run the stock libraries, write compare.json, return the table. Only the linear layers differ: data,
    loss and seed are the same."""
    stock = run_stock(config)
    results = {"peftkern": dataclasses.asdict(ours), "stock": dataclasses.asdict(stock)}
    write_json(Path(config.output) / "compare.json", results)
    return table(ours, stock)


def run_stock(config: FinetuneConfig) -> FinetuneResult:
    """The run of `config` with --no-patch, in the folder "stock" of its output; a new process, so that its
    peak memory is its own."""
    output = Path(config.output) / "stock"
    plain = dataclasses.replace(
        config, output=str(output), patch=False, compare=False, overwrite=False, resume=True
    )
    command = [sys.executable, "-m", "peftkern", "finetune", *plain.to_arguments()]
    status = _wait(command)
    if status:
        raise ChildProcessError(
            f"the run on the stock libraries ended with status {status} (its message is above); "
            f"the run on peftkern is complete in {config.output}, and the same command with --resume "
            "tries again"
        )
    return FinetuneResult(**json.loads((output / "result.json").read_text(encoding="utf-8")))


def _wait(command: list[str]) -> int:
    """The exit status of a child process, to which a signal that ends this one is passed on, so that it saves
    what it has."""
    with stop_signals():
        # In a session of its own Ctrl-C reaches it through us only: a second signal would keep it from
        # saving.
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def table(ours: FinetuneResult, stock: FinetuneResult) -> str:
    """Both runs' figures and the ratio, as text."""
    rows = [("last training loss", ours.final_loss, stock.final_loss, ".4f")]
    for name, value in ours.perplexity_after.items():
        rows.append((f"perplexity after ({name})", value, stock.perplexity_after[name], ".3f"))
    rows.append(("tokens/s", ours.tokens_per_second, stock.tokens_per_second, ".0f"))
    rows.append(("peak memory, GiB", ours.peak_memory / 2**30, stock.peak_memory / 2**30, ".2f"))
    lines = [f"{'':28}{'peftkern':>12}{'stock':>12}{'ratio':>9}"]
    lines += [
        f"{name:28}{left:>12{form}}{right:>12{form}}{left / right:>9.3f}" for name, left, right, form in rows
    ]
    return "\n".join(lines)
