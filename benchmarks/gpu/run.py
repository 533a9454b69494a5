"""One part's run: where it measures, how long it may, and its CSV, written row by row so that a killed run
keeps what it has."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import math
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .. import machine

__all__ = ["DENSE", "NO_DROPOUT", "Case", "ContextLost", "Row", "Run", "device_name", "read_rows", "versions"]

DENSE, NO_DROPOUT = "frozen bf16", "peftkern, dropout 0"  # providers that targets name
FALLBACK_L2 = 1 << 16  # bytes; a CPU run only proves the script, so that its rotations stay short


class ContextLost(RuntimeError):
    """The CUDA context is gone (an illegal access, say): nothing after it can be measured in this process."""


@dataclass(frozen=True)
class Case:
    """What is measured. `timed`: "graph" (replays of a CUDA graph: kernels alone), "eager" (calls as a user
    makes them), "" (no time)."""

    what: str
    mode: str = ""
    dtype: str = "bfloat16"
    n: int = 0
    k: int = 0
    m: int = 0
    timed: str = "eager"

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.k}" if self.n else ""

    @property
    def id(self) -> str:
        return " ".join(
            filter(
                None,
                (self.what, self.mode, self.dtype, self.shape, f"M={self.m}" if self.m else "", self.timed),
            )
        )


@dataclass(frozen=True)
class Row:
    """One line of the CSV. ratio: this provider's value divided by peftkern's, per round, then the median;
    above 1, peftkern is faster.

    percent_bandwidth, percent_gemm: of the copy bandwidth and the bf16 GEMM rate measured in the same run.
    note: why there is no figure.
    """

    device: str
    versions: str
    what: str
    mode: str
    dtype: str
    shape: str
    M: int
    timed: str
    provider: str
    p20: float = math.nan
    p50: float = math.nan
    p80: float = math.nan
    unit: str = "ms"
    ratio: float = math.nan
    percent_bandwidth: float = math.nan
    percent_gemm: float = math.nan
    note: str = ""


@functools.cache
def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else machine.device()


@functools.cache
def versions() -> str:
    found = [machine.versions()]
    for package in ("triton", "axolotl", "liger-kernel"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found + ([f"CUDA {torch.version.cuda}"] if torch.version.cuda else []))


class Run:
    """A part being measured. Rows of an earlier run are dropped, or with `resume` kept and their cases not
    measured again."""

    def __init__(
        self,
        part: str,
        out: Path,
        *,
        device: str = "cuda",
        small: bool = False,
        rounds: int = 0,
        budget_s: float = 500.0,
        resume: bool = False,
        only: str = "",
        interpret: bool = False,
        flush: bool = False,
    ) -> None:
        self.part, self.out, self.device, self.small = part, out, device, small
        self.rounds = rounds or (3 if small else 25)
        self.budget_s, self.only, self.interpret, self.flush = budget_s, only, interpret, flush
        self.cuda = device == "cuda"
        self.first_cases, self.compiled = (
            False,
            True,
        )  # tests: one case a function; linear: compiled peers too
        self.path = out / f"{part}.csv"
        self._start = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.path.unlink(missing_ok=True)
        keys = ("what", "mode", "dtype", "shape", "M", "timed")
        # A case that only has skipped rows was cut off before it was timed.
        done = (row for row in read_rows(self.path) if row["p50"] or row["note"].startswith("error"))
        self._done = {tuple(row[k] for k in keys) for row in done}

    @functools.cached_property
    def l2_bytes(self) -> int:
        return (
            torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            if self.cuda
            else FALLBACK_L2
        )

    def copies(self, nbytes: int) -> int:
        """How many inputs of that size a rotation needs so that none is still in the L2 when its turn comes
        again."""
        return max(2, min(64, -(-2 * self.l2_bytes // max(nbytes, 1))))

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.monotonic() - self._start)

    def modes(self) -> tuple[str, ...]:
        return ("graph", "eager") if self.cuda else ("eager",)

    def wanted(self, case: Case) -> bool:
        """Whether to measure a case: it is asked for, not there yet, and within the time budget (else a row
        says so)."""
        key = (case.what, case.mode, case.dtype, case.shape, str(case.m), case.timed)
        if key in self._done or not any(words in case.id for words in self.only.split("|")):
            return False
        if self.left_s() < 0:
            self.add(
                case,
                "all",
                note=f"not measured: over the part's {self.budget_s:.0f} s; run again with --resume",
            )
            return False
        return True

    def add(self, case: Case, provider: str, **values: object) -> Row:
        """Append a row to the CSV at once, and show it."""
        head = (
            device_name(self.device),
            versions(),
            case.what,
            case.mode,
            case.dtype,
            case.shape,
            case.m,
            case.timed,
        )
        row = Row(*head, provider, **values)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerow({k: _text(v) for k, v in asdict(row).items()})
        print(f"[{time.monotonic() - self._start:5.0f} s] {_words(case, row)}", flush=True)
        return row

    def note_clocks(self, when: str) -> None:
        """Clocks, power and temperature into clocks.txt: short parts ride boost clocks, long ones may not."""
        if self.cuda and (tool := shutil.which("nvidia-smi")):
            words = [tool, "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE"]
            told = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
            with (self.out / "clocks.txt").open("a") as file:
                file.write(f"{when} {self.part}\n{told}\n")

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def check_alive(self) -> None:
        """ContextLost where an earlier failure took the CUDA context with it."""
        try:
            self.sync()
        except RuntimeError as error:
            raise ContextLost(
                f"{self.part}: the CUDA context is lost ({error}); go on with --resume"
            ) from error


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def _words(case: Case, row: Row) -> str:
    head = f"{case.id:58s} {row.provider:34s}"
    if math.isnan(row.p50):
        return f"{head} {row.note}"
    extra = "".join(
        f"  {text}"
        for text, value in (
            (f"x{row.ratio:.3f}", row.ratio),
            (f"{row.percent_bandwidth:.1f} % of copy", row.percent_bandwidth),
            (f"{row.percent_gemm:.1f} % of GEMM", row.percent_gemm),
        )
        if not math.isnan(value)
    )
    return f"{head} {row.p50:10.4f} {row.unit}{extra}  {row.note}".rstrip()
