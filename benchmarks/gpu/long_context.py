"""The longest sequence that one card trains on: a Llama of random 4-bit weights, QLoRA on every linear,
batch 1, checkpoints in a store on the host, tiled MLP, loss without logits, under the memory of a 24 GB card.

    python -m benchmarks.gpu.long_context --shape 8b --tokens 16384 65536 --confirm --out $OUT
    python -m benchmarks.gpu.long_context --shape 70b --layers-on-host --embedding-on-host --tokens 4096 8192

Every length runs in a process of its own. Two lengths give the line peak = fixed + slope * tokens; with
--confirm the longest sequence that it promises is run too. Figures of --device cpu mean nothing: they prove
the script.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .long_model import SHAPES, build, planned
from .step import CAP_GIB

__all__ = ["Row", "line"]

_LONG_S = 45.0  # a first step that takes longer is the only one
_ROUND = 1024  # of the longest sequence


@dataclass(frozen=True)
class Row:
    """One length. Bytes are tensors' (without the CUDA context); fixed: before the first step; host: of the
    store's pools, of layers and of the embedding there; seconds: of the last step; planned: what the planner
    says of peak_allocated."""

    device: str
    versions: str
    shape: str
    options: str
    tokens: int
    peak_allocated: int = 0
    planned: int = 0
    peak_reserved: int = 0
    fixed: int = 0
    host: int = 0
    rss: int = 0
    seconds: float = float("nan")
    loss: float = float("nan")
    gradient_norm: float = float("nan")
    note: str = ""


# ---- a process for each length


def child(args: argparse.Namespace) -> Row:
    """One length in this process."""
    import bitsandbytes as bnb
    import transformers

    cuda = args.device == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    (length,) = args.tokens
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, bitsandbytes {bnb.__version__}"
    )
    head = dict(device=name, versions=versions, shape=args.shape, options=_options(args), tokens=length)
    try:
        head["planned"] = planned(args, length)
    except Exception as error:  # what is measured counts without it
        print(f"planner: {type(error).__name__}: {error}", file=sys.stderr)
    try:
        model, handles = build(args)
        return Row(**head, **_steps(args, model, handles, length, bnb if cuda else None))
    except (torch.OutOfMemoryError, MemoryError) as error:
        peak = dict(peak_allocated=torch.cuda.max_memory_allocated()) if cuda else {}
        return Row(**head, **peak, note=f"does not fit: {' '.join(str(error).split())[:400]}")


def _steps(
    args: argparse.Namespace, model: nn.Module, handles: list[Any], length: int, bnb: Any
) -> dict[str, Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if bnb is None else bnb.optim.PagedAdamW8bit
    optimizer = kind(parameters, lr=1e-5)
    torch.manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=args.device)
    if bnb is not None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if args.checkpoints == "host":
        hidden, _, layers, *_ = SHAPES[args.shape]
        handles[-1].reserve((layers - 1) * hidden * 2 * length)
    fixed = torch.cuda.memory_allocated() if bnb is not None else 0
    seconds: list[float] = []
    with _attention(args):
        while len(seconds) < args.steps and (not seconds or seconds[0] < _LONG_S):
            start = time.perf_counter()
            loss, norm = _step(args.device, model, optimizer, parameters, ids)
            seconds.append(time.perf_counter() - start)
    found = dict(
        fixed=fixed,
        seconds=seconds[-1],
        loss=loss,
        gradient_norm=norm,
        rss=_rss(),
        host=_host(model, handles),
    )
    if bnb is not None:
        found |= dict(
            peak_allocated=torch.cuda.max_memory_allocated(), peak_reserved=torch.cuda.max_memory_reserved()
        )
    finite = all(map(torch.isfinite, (torch.tensor(loss), torch.tensor(norm))))
    steps = ", ".join(f"{s:.2f}" for s in seconds)
    return found | {"note": f"steps of {steps} s" if finite else "error: loss or gradient is not finite"}


def _step(
    device: str, model: nn.Module, optimizer: Any, parameters: list[nn.Parameter], ids: Tensor
) -> tuple[float, float]:
    """Loss and gradient norm of one step. Reading them waits for the device."""
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
    optimizer.step()
    return loss.item(), norm.item()


def _attention(args: argparse.Namespace) -> Any:
    """The attention whose workspace the planner's formula describes, or torch's choice."""
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash = args.device == "cuda" and args.attention == "flash"
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if flash else nullcontext()


def _host(model: nn.Module, handles: list[Any]) -> int:
    total = 0
    for handle in handles:
        if hasattr(handle, "host_bytes"):
            total += handle.host_bytes()
        elif hasattr(handle, "report"):
            total += handle.report()["host"]
        else:
            total += handle.embedding.weight.nbytes
    return total


def _rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _options(args: argparse.Namespace) -> str:
    parts = [f"r {args.rank}", f"{args.adapter_dtype} adapters", f"checkpoints: {args.checkpoints}"]
    parts += [f"MLP tiles of {args.mlp_tile_mib} MiB"] if args.mlp_tile_mib else ["MLP whole"]
    parts += ["attention by key/value heads"] if args.attention_groups else []
    parts += [f"loss tiles of {args.loss_tile_mib} MiB"] if args.loss_tile_mib else []
    parts += ["norms again"] if args.rebuild_norms else []
    parts += ["layers on the host"] if args.layers_on_host else []
    parts += ["embedding on the host"] if args.embedding_on_host else []
    return ", ".join([*parts, f"{args.cap_gib:g} GiB", args.attention])


# ---- all lengths


def run(args: argparse.Namespace, lengths: list[int]) -> Iterator[Row]:
    """Each length in turn, until one does not fit."""
    for length in lengths:
        row = _in_process(args, length)
        yield row
        if row.note.startswith(("does not fit", "error")):
            return


def _in_process(args: argparse.Namespace, length: int) -> Row:
    own = [flag for flag in sys.argv[1:] if flag != "--confirm"]
    command = [sys.executable, "-m", "benchmarks.gpu.long_context", *own, "--child", "--tokens", str(length)]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    nothing = Row("", "", args.shape, _options(args), length)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.child_s, env=environment)
    except subprocess.TimeoutExpired:
        return Row(**asdict(nothing) | {"note": f"error: over {args.child_s:g} s"})
    lines = [text for text in done.stdout.splitlines() if text.startswith("{")]
    if not lines:
        last = " ".join(done.stderr.strip().splitlines()[-3:])[-400:]
        return Row(**asdict(nothing) | {"note": f"error: status {done.returncode}: {last}"})
    return Row(**json.loads(lines[-1]))


def line(rows: list[Row]) -> tuple[float, float] | None:
    """Slope in bytes a token and intercept in bytes of the peak, by the two longest sequences that fit."""
    fitting = [row for row in rows if row.peak_allocated and row.note.startswith("steps")][-2:]
    if len(fitting) < 2:
        return None
    short, long = fitting
    slope = (long.peak_allocated - short.peak_allocated) / (long.tokens - short.tokens)
    return slope, long.peak_allocated - slope * long.tokens


def _save(out: Path | None, rows: list[Row]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "long_context.csv").open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _show(row: Row) -> str:
    rate = row.tokens / row.seconds
    return (
        f"{row.shape} {row.tokens:7d} tokens  allocated {row.peak_allocated / 1e9:6.2f} GB"
        f" (planned {row.planned / 1e9:.2f})"
        f"  reserved {row.peak_reserved / 1e9:6.2f}  fixed {row.fixed / 1e9:5.2f}  host {row.host / 1e9:6.2f}"
        f"  {row.seconds:7.2f} s ({rate:6.0f} tokens/s)  loss {row.loss:.4f}  |g| {row.gradient_norm:.3g}"
        f"  {row.note}"
    )


def _parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="8b")
    p.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536], metavar="TOKENS")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--cap-gib", type=float, default=CAP_GIB, help="of a 24 GB card after its context")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--adapter-dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--checkpoints", choices=["host", "device", "disk"], default="host")
    p.add_argument("--disk-gb", type=int, default=0, help="of a temporary file, behind the host or alone")
    p.add_argument("--directory", type=Path, help="of the temporary file")
    p.add_argument("--mlp-tile-mib", type=int, default=352, help="0: the MLP whole")
    p.add_argument("--loss-tile-mib", type=int, default=0, help="0: the loss's own choice")
    p.add_argument("--rebuild-norms", action="store_true", help="norm outputs are computed again in backward")
    p.add_argument("--layers-on-host", action="store_true")
    p.add_argument("--embedding-on-host", action="store_true")
    p.add_argument("--attention-groups", action="store_true", help="its backward a key/value head at a time")
    p.add_argument("--attention", choices=["flash", "auto"], default="flash")
    p.add_argument("--steps", type=int, default=2, help=f"one alone where it takes over {_LONG_S:g} s")
    p.add_argument("--confirm", action="store_true", help="run the longest sequence that the line promises")
    p.add_argument("--child-s", type=float, default=400.0, help="a length may take this long")
    p.add_argument("--out", type=Path)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> int:
    args = _parse()
    if args.child:
        print(json.dumps(asdict(child(args))), flush=True)
        return 0
    rows: list[Row] = []

    def measured(lengths: list[int]) -> None:
        for row in run(args, lengths):
            rows.append(row)
            print(_show(row), flush=True)
            _save(args.out, [row])

    measured(sorted(args.tokens))
    found = line(rows)
    if found is not None:
        slope, intercept = found
        longest = int((args.cap_gib * 2**30 - intercept) / slope)
        words = f"{slope / 1e3:.1f} KB a token + {intercept / 1e9:.2f} GB"
        print(f"{words}: {longest} tokens in {args.cap_gib:g} GiB")
        if args.confirm:
            measured([longest * 97 // 100 // _ROUND * _ROUND])
    failed = [row for row in rows if row.note.startswith("error")]
    rates = [row.tokens / row.seconds for row in rows if row.note.startswith("steps")]
    if rates:
        print(f"{len(rates)} lengths, {statistics.median(rates):.0f} tokens/s at the median")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
